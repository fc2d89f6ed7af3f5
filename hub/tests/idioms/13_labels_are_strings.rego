# Idiom: `is_string` for every label
# Reads: metadata.labels[*]
package idioms.labels_are_strings

default well_formed := false

well_formed if {
	every value in data.kubernetes.pods[input.namespace][input.pod].metadata.labels {
		is_string(value)
	}
}
