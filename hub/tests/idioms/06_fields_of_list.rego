# Idiom: names of fields in a list
# Reads: spec.nodeName spec.schedulerName spec.serviceAccountName
package idioms.fields_of_list

fields := ["nodeName", "schedulerName", "serviceAccountName"]

facts[field] := value if {
	some field in fields
	value := data.kubernetes.pods[input.namespace][input.pod].spec[field]
}
