# Idiom: a report of three fields, by `json.filter`
# Reads: metadata.name spec.nodeName status.podIP
package idioms.filter_of_paths

report := json.filter(
	data.kubernetes.pods[input.namespace][input.pod],
	["metadata/name", "spec/nodeName", "status/podIP"],
)
