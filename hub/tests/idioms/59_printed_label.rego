# Idiom: `print` while a policy is written
# Reads: metadata.labels.team spec.nodeName
package idioms.printed_label

allow if {
	pod := data.kubernetes.pods[input.namespace][input.pod]
	print("pod", input.pod, "is on", pod.spec.nodeName)
	pod.metadata.labels.team == "team-001"
}
