# Idiom: containers of several kinds
# Reads: spec.containers[*].image spec.initContainers[*].image spec.ephemeralContainers[*].image
package idioms.kinds_of_containers

kinds := ["containers", "initContainers", "ephemeralContainers"]

images := [container.image |
	some kind in kinds
	some container in data.kubernetes.pods[input.namespace][input.pod].spec[kind]
]

deny contains image if {
	some image in images
	not startswith(image, "registry.example.com/")
}
