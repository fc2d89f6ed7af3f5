# Idiom: the image of the first container, by an index in a path
# Reads: spec.containers[*].image
package idioms.path_with_index

first_image := object.get(data.kubernetes.pods, [input.namespace, input.pod, "spec", "containers", 0, "image"], "none")
