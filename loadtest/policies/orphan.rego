# Pods without a controller are asked about by hand.
package shop.orphan

default deny := false

deny if not controlled

controlled if {
	some owner in data.kubernetes.pods[input.namespace][input.pod].metadata.ownerReferences
	owner.controller == true
}
