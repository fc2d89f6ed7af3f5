# Idiom: a small object about each pod
# Reads: spec.nodeName status.podIP status.phase
package idioms.summary

pods := {name: summary(pod) | some name, pod in data.kubernetes.pods[input.namespace]}

own := object.get(pods, input.to.name, {})

summary(pod) := {
	"node": pod.spec.nodeName,
	"address": pod.status.podIP,
	"runs": pod.status.phase == "Running",
}
