# Idiom: conditions by type, of nodes and pods
# Reads: spec.nodeName status.conditions[*].type status.conditions[*].status nodes:status.conditions[*].type nodes:status.conditions[*].status
package idioms.ready_nodes

conditions(object) := {condition.type: condition.status | some condition in object.status.conditions}

is_ready(object) if conditions(object).Ready == "True"

reachable contains name if {
	some name, pod in data.kubernetes.pods[input.namespace]
	is_ready(pod)
	is_ready(data.kubernetes.nodes[pod.spec.nodeName])
}
