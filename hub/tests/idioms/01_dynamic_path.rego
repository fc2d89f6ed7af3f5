# Idiom: `object.get` with a path that the input begins
# Reads: status.podIP
package idioms.dynamic_path

default allow := false

allow if {
	address := object.get(data.kubernetes.pods, [input.to.namespace, input.to.name, "status", "podIP"], "none")
	address == input.source
}
