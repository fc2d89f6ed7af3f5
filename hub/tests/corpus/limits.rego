# Memory and CPU of containers, brought to one unit.
package corpus.limits

violation contains msg if {
	container := containers[_]
	millis(container.resources.limits.cpu) > 400
	msg := sprintf("container <%v> may take %v", [container.name, container.resources.limits.cpu])
}

violation contains msg if {
	container := containers[_]
	not container.resources.requests.memory
	msg := sprintf("container <%v> asks for no memory", [container.name])
}

violation contains msg if {
	container := containers[_]
	bytes(container.resources.limits.memory) > (256 * 1024) * 1024
	msg := sprintf("container <%v> may hold %v", [container.name, container.resources.limits.memory])
}

containers contains container if container := data.kubernetes.pods[input.namespace][input.pod].spec.containers[_]

containers contains container if container := data.kubernetes.pods[input.namespace][input.pod].spec.initContainers[_]

millis(text) := number if {
	is_string(text)
	endswith(text, "m")
	number := to_number(replace(text, "m", ""))
} else := to_number(text) * 1000

bytes(text) := to_number(trim_suffix(text, "Mi")) * 1048576 if endswith(text, "Mi")

bytes(text) := to_number(trim_suffix(text, "Gi")) * 1073741824 if endswith(text, "Gi")
