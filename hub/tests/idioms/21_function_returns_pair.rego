# Idiom: a function that returns a pair, taken apart
# Reads: metadata.labels.app metadata.labels["app.kubernetes.io/version"]
package idioms.function_returns_pair

target := {"app": app, "version": version} if {
	[app, version] := release(data.kubernetes.pods[input.namespace][input.pod])
}

release(pod) := [pod.metadata.labels.app, pod.metadata.labels["app.kubernetes.io/version"]]
