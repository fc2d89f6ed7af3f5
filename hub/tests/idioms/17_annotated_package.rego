# Idiom: a package annotated as entrypoint
# Reads: spec.containers[*].name spec.containers[*].resources.limits.cpu

# METADATA
# title: Shares of CPU.
# scope: package
# entrypoint: true
package idioms.annotated_package

limits := {container.name: container.resources.limits.cpu |
	some container in containers(input.namespace, input.pod)
}

containers(namespace, name) := data.kubernetes.pods[namespace][name].spec.containers
