# Idiom: the pod with the address of the request
# Reads: status.phase status.podIP metadata.labels.tier
# Asked: /idioms/caller_by_address/allow
package idioms.caller_by_address

default allow := false

allow if caller.metadata.labels.tier == "back"

caller := pod if {
	some pod in data.kubernetes.pods[_]
	pod.status.phase == "Running"
	pod.status.podIP == input.source
}
