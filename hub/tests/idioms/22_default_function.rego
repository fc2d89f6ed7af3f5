# Idiom: a function with a default
# Reads: metadata.labels.app spec.securityContext.runAsNonRoot
package idioms.default_function

import data.kubernetes.pods

default is_safe(_) := false

is_safe(pod) if {
	pod.spec.securityContext.runAsNonRoot
	pod.metadata.labels.app != "Odd"
}

safe := {name | some name, pod in pods[input.namespace]; is_safe(pod); name < input.pod}
