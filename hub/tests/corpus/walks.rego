# Takes a part of each pod whole: names of secrets, wherever they stand in its volumes.
package corpus.walks

secrets contains value if {
	walk(data.kubernetes.pods[input.namespace][input.pod].spec.volumes, [path, value])
	path[count(path) - 1] == "secretName"
}

secrets contains value if {
	some container in data.kubernetes.pods[input.namespace][input.pod].spec.containers
	value := container.env[_].valueFrom.secretKeyRef.name
}

copies if {
	some other, pod in data.kubernetes.pods[input.namespace]
	other != input.pod
	pod.spec.tolerations == data.kubernetes.pods[input.namespace][input.pod].spec.tolerations
}
