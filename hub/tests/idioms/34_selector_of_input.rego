# Idiom: a label selector of the input, by `object.subset`
# Reads: metadata.labels[*]
package idioms.selector_of_input

selected contains name if {
	some name, pod in data.kubernetes.pods[input.namespace]
	object.subset(pod.metadata.labels, input.selector)
}
