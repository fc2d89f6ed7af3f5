# Idiom: a helper rule for the pod, and a rule annotated as entrypoint
# Reads: spec.nodeName status.phase
# Asked: /idioms/annotated_rule/allow
package idioms.annotated_rule

import data.kubernetes.pods

pod := pods[input.namespace][input.pod]

# METADATA
# title: Pods that run may call others on their node.
# entrypoint: true
default allow := false

allow if {
	pod.status.phase == "Running"
	other.status.phase == "Running"
	pod.spec.nodeName == other.spec.nodeName
}

other := pods[input.to.namespace][input.to.name]
