# Idiom: two pods with a label in common, by an intersection of sets
# Reads: metadata.labels.app metadata.labels.team metadata.labels.tier
package idioms.common_labels

labels(ref) := {sprintf("%v=%v", [key, value]) |
	some key in ["app", "team", "tier"]
	value := data.kubernetes.pods[ref.namespace][ref.name].metadata.labels[key]
}

common := labels(input.from) & labels(input.to)

default allow := false

allow if count(common) > 1
