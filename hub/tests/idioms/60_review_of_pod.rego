# Idiom: an admission review against the pods that are there
# Reads: metadata.labels.app spec.containers[*].image
package idioms.review_of_pod

deny contains msg if {
	some name, pod in data.kubernetes.pods[input.namespace]
	pod.metadata.labels.app == input.account
	some container in pod.spec.containers
	trim_prefix(container.image, "registry.example.com/") == sprintf("shop/%s:2.14.%d", [input.account, input.index])
	msg := sprintf("%s runs this image already", [name])
}
