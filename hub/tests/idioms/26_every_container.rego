# Idiom: `every` container from one registry
# Reads: spec.containers[*].image spec.containers[*].imagePullPolicy
package idioms.every_container

default allow := false

allow if {
	every container in data.kubernetes.pods[input.namespace][input.pod].spec.containers {
		startswith(container.image, input.registry)
		container.imagePullPolicy in {"Always", "IfNotPresent"}
	}
}
