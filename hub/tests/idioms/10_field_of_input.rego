# Idiom: a field that the input names, one of a few
# Reads: spec.nodeName spec.schedulerName spec.serviceAccountName
package idioms.field_of_input

shown := value if {
	input.field in {"nodeName", "schedulerName", "serviceAccountName"}
	value := data.kubernetes.pods[input.namespace][input.pod].spec[input.field]
}
