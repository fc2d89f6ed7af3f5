# Labels that every pod of a namespace needs, each with a shape.
package corpus.required_labels

wanted := [{"key": "app", "allowed": "^[a-z]+$"}, {"key": "team", "allowed": "^team-[0-9]+$"}, {"key": "owner"}]

violation contains {"msg": msg, "details": {"missing": missing}} if {
	provided := {label | pod.metadata.labels[label]}
	required := {label | label := wanted[_].key}
	missing := required - provided
	count(missing) > 0
	msg := sprintf("labels are missing: %v", [missing])
}

violation contains {"msg": msg} if {
	value := pod.metadata.labels[key]
	expected := wanted[_]
	expected.key == key
	expected.allowed
	not regex.match(expected.allowed, value)
	msg := sprintf("label <%v: %v> has not the shape %v", [key, value, expected.allowed])
}

pod := data.kubernetes.pods[input.namespace][input.pod]
