# Idiom: images by a regular expression
# Reads: spec.containers[*].image spec.initContainers[*].image
package idioms.pattern_of_image

pattern := `^registry\.example\.com/[a-z]+/[a-z-]+:\d+\.\d+\.\d+$`

violation contains image if {
	some image in images
	not regex.match(pattern, image)
}

images contains data.kubernetes.pods[input.namespace][input.pod].spec.containers[_].image

images contains data.kubernetes.pods[input.namespace][input.pod].spec.initContainers[_].image
