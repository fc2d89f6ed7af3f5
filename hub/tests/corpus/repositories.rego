# Where images may come from.
package corpus.repositories

allowed := ["registry.example.com/shop/", "registry.example.com/base/"]

violation contains image if {
	image := data.kubernetes.pods[input.namespace][input.pod].spec.containers[_].image
	satisfied := [good | prefix := allowed[_]; good := startswith(image, prefix)]
	not true in satisfied
}

digests := {name: digest |
	some status in data.kubernetes.pods[input.namespace][input.pod].status.containerStatuses
	name := status.name
	[_, digest] := split(status.imageID, "@")
}
