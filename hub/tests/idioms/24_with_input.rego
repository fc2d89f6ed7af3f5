# Idiom: a rule for the caller and the target, by `with input`
# Reads: metadata.labels.tier
package idioms.with_input

default allow := false

allow if {
	front with input as input.from
	not front with input as input.to
}

front if data.kubernetes.pods[input.namespace][input.name].metadata.labels.tier == "front"
