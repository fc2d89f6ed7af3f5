# Idiom: a class by an `else` chain
# Reads: spec.priority spec.containers[*].securityContext.privileged metadata.labels.tier
package idioms.else_chain

class := of(data.kubernetes.pods[input.namespace][input.pod])

of(pod) := "critical" if {
	pod.spec.priority > 1000
} else := "privileged" if {
	some container in pod.spec.containers
	container.securityContext.privileged
} else := pod.metadata.labels.tier if {
	pod.metadata.labels.tier
} else := "other"
