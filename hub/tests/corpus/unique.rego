# No two pods of a namespace have one address, nor two workloads one version label.
package corpus.unique

clash contains [name, other] if {
	some name, pod in data.kubernetes.pods[input.namespace]
	some other, held in data.kubernetes.pods[input.namespace]
	name < other
	pod.status.podIP == held.status.podIP
}

versions[workload] contains version if {
	some pod in data.kubernetes.pods[input.namespace]
	workload := owner(pod)
	version := pod.metadata.labels["app.kubernetes.io/version"]
}

owner(pod) := name if {
	name := [ref.name | some ref in pod.metadata.ownerReferences; ref.controller][0]
} else := "nobody"
