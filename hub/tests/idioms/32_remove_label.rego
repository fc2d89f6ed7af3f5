# Idiom: two pods with equal labels but one, by `object.remove`
# Reads: metadata.labels…
package idioms.remove_label

default is_replica := false

is_replica if {
	labels(input.from) == labels(input.to)
	input.from != input.to
}

labels(ref) := object.remove(data.kubernetes.pods[ref.namespace][ref.name].metadata.labels, ["pod-template-hash"])
