# Idiom: expected values in an object, by the name of the field
# Reads: spec.schedulerName spec.serviceAccountName
package idioms.fields_of_object

expected := {"schedulerName": "default-scheduler", "serviceAccountName": "cart"}

differs contains field if {
	some field, value in expected
	data.kubernetes.pods[input.namespace][input.pod].spec[field] != value
}
