# Idiom: resources without requests, by `json.remove`
# Reads: spec.containers[*].name spec.containers[*].resources.limits…
package idioms.remove_paths

limits[container.name] := json.remove(container.resources, ["requests"]) if {
	some container in data.kubernetes.pods[input.namespace][input.pod].spec.containers
}
