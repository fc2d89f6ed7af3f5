# Idiom: required labels in a set
# Reads: metadata.labels.app metadata.labels.team metadata.labels.tier
package idioms.labels_of_set

required := {"app", "team", "tier"}

missing contains label if {
	some label in required
	not data.kubernetes.pods[input.namespace][input.pod].metadata.labels[label]
}
