# Idiom: two annotated rules that share a helper
# Reads: spec.hostNetwork spec.nodeName status.podIP
# Asked: /idioms/two_entrypoints/deny /idioms/two_entrypoints/node
package idioms.two_entrypoints

# METADATA
# entrypoint: true
deny contains "pods of the host network are not called" if target.spec.hostNetwork

deny contains "the address is of another pod" if target.status.podIP != input.source

# METADATA
# description: Where the request goes.
# entrypoint: true
node := target.spec.nodeName

target := data.kubernetes.pods[input.namespace][input.pod]
