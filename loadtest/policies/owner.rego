# Which workload a pod belongs to.
package shop.owner

workload := {"kind": owner.kind, "name": owner.name} if {
	some owner in data.kubernetes.pods[input.namespace][input.pod].metadata.ownerReferences
	owner.controller
}
