# What containers may do to their node.
package corpus.security

import data.kubernetes.pods

default privileged := false

privileged if {
	some container in pods[input.namespace][input.pod].spec.containers
	has(container.securityContext, "privileged")
	container.securityContext.privileged != false
}

escalates contains container.name if {
	container := pods[input.namespace][input.pod].spec.containers[_]
	object.get(object.get(container, "securityContext", {}), "allowPrivilegeEscalation", true)
}

writable contains volume.name if {
	pod := pods[input.namespace][input.pod]
	volume := pod.spec.volumes[_]
	kinds := {kind | volume[kind]; kind != "name"}
	count(kinds & {"hostPath", "emptyDir"}) > 0
}

drops_all if {
	every container in pods[input.namespace][input.pod].spec.containers {
		"ALL" in container.securityContext.capabilities.drop
	}
}

has(object, field) if _ := object[field]
