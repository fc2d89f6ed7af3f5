# Idiom: a helper rule for the pod, and one decision asked for
# Reads: spec.serviceAccountName metadata.labels.tier
# Asked: /idioms/helper_pod/allow
package idioms.helper_pod

default allow := false

allow if {
	pod.spec.serviceAccountName == input.account
	pod.metadata.labels.tier == "front"
}

pod := data.kubernetes.pods[input.namespace][input.pod]
