# Idiom: `object.filter` on labels
# Reads: metadata.labels.app metadata.labels.team
package idioms.filter_labels

default allow := false

allow if {
	labels := object.filter(data.kubernetes.pods[input.namespace][input.pod].metadata.labels, ["app", "team"])
	labels == {"app": input.account, "team": input.namespace}
}
