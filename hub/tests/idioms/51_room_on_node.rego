# Idiom: requests of a node's pods against what it has
# Reads: spec.nodeName spec.containers[*].resources.requests.cpu nodes:status.allocatable.cpu
package idioms.room_on_node

requested := sum([units.parse(container.resources.requests.cpu) |
	some pod in data.kubernetes.pods[_]
	pod.spec.nodeName == input.node
	some container in pod.spec.containers
])

free := units.parse(data.kubernetes.nodes[input.node].status.allocatable.cpu) - requested

is_full if free < 1
