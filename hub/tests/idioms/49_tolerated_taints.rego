# Idiom: every taint of the node is tolerated
# Reads: spec.nodeName spec.tolerations[*].key spec.tolerations[*].effect nodes:spec.taints[*].key nodes:spec.taints[*].effect
package idioms.tolerated_taints

untolerated contains taint.key if {
	pod := data.kubernetes.pods[input.namespace][input.pod]
	some taint in data.kubernetes.nodes[pod.spec.nodeName].spec.taints
	not tolerates(pod, taint)
}

tolerates(pod, taint) if {
	some toleration in pod.spec.tolerations
	toleration.key == taint.key
	toleration.effect == taint.effect
}
