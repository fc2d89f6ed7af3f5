# Idiom: the Deployment from the name of the ReplicaSet
# Reads: metadata.ownerReferences[*].kind metadata.ownerReferences[*].name metadata.ownerReferences[*].controller
package idioms.workload_of_owner

deployment := concat("-", array.slice(parts, 0, count(parts) - 1)) if {
	some owner in data.kubernetes.pods[input.namespace][input.pod].metadata.ownerReferences
	owner.controller
	owner.kind == "ReplicaSet"
	parts := split(owner.name, "-")
}
