# Idiom: other thresholds, by `with data`
# Reads: spec.containers[*].name spec.containers[*].resources.limits.cpu
package idioms.with_data

large contains name if some name in above_limit with data.limits as {"millis": 500}

small contains name if {
	input.role == "reader"
	some name in above_limit with data.limits as {"millis": 100}
}

above_limit contains container.name if {
	some container in data.kubernetes.pods[input.namespace][input.pod].spec.containers
	millis(container.resources.limits.cpu) > data.limits.millis
}

millis(text) := to_number(trim_suffix(text, "m")) if endswith(text, "m")

millis(text) := to_number(text) * 1000 if not endswith(text, "m")
