# Idiom: containers and init containers in one list, by `array.concat`
# Reads: spec.containers[*].image spec.initContainers[*].image
package idioms.all_containers

import data.kubernetes.pods

latest contains container.image if {
	spec := pods[input.namespace][input.pod].spec
	some container in array.concat(spec.containers, object.get(spec, "initContainers", []))
	endswith(container.image, ":latest")
}
