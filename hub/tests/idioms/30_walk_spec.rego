# Idiom: `walk` on the whole spec, for every image
# Reads: spec.containers[*].image spec.initContainers[*].image
package idioms.walk_spec

outside contains image if {
	walk(data.kubernetes.pods[input.namespace][input.pod].spec, [path, image])
	path[count(path) - 1] == "image"
	not startswith(image, "registry.example.com/")
}
