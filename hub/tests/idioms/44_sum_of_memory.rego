# Idiom: the memory of a namespace in bytes
# Reads: spec.containers[*].resources.limits.memory
package idioms.sum_of_memory

total := sum([units.parse_bytes(container.resources.limits.memory) |
	some pod in data.kubernetes.pods[input.namespace]
	some container in pod.spec.containers
])

over_quota if total > units.parse_bytes("4Gi")
