# Idiom: `type_name` of a label
# Reads: metadata.labels.team
package idioms.kind_of_label

deny contains msg if {
	kind := type_name(data.kubernetes.pods[input.namespace][input.pod].metadata.labels.team)
	kind != "string"
	msg := sprintf("label team is of type %v", [kind])
}
