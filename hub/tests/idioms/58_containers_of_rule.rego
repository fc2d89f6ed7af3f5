# Idiom: a set of containers that other rules go through
# Reads: spec.containers[*].name spec.containers[*].securityContext.privileged spec.initContainers[*].name spec.initContainers[*].securityContext.privileged
# Asked: /idioms/containers_of_rule/violation
package idioms.containers_of_rule

# METADATA
# entrypoint: true
violation contains {"msg": msg} if {
	some container in input_containers
	container.securityContext.privileged
	msg := sprintf("container %s is privileged", [container.name])
}

input_containers contains container if {
	some container in data.kubernetes.pods[input.namespace][input.pod].spec.containers
}

input_containers contains container if {
	some container in data.kubernetes.pods[input.namespace][input.pod].spec.initContainers
}
