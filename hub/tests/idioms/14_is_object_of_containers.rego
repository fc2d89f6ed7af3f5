# Idiom: `is_object` before a field is asked for
# Reads: spec.containers[*].name spec.containers[*].securityContext.privileged
package idioms.is_object_of_containers

privileged contains container.name if {
	some container in data.kubernetes.pods[input.namespace][input.pod].spec.containers
	is_object(container.securityContext)
	container.securityContext.privileged == true
}
