# Only the front tier may call the back tier.
package shop.tier

default allow := false

allow if {
	tier(input.from) == "front"
	tier(input.to) == "back"
}

tier(ref) := data.kubernetes.pods[ref.namespace][ref.name].metadata.labels.tier
