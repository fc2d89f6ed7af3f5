# Idiom: a rule for namespaces with a label
# Reads: spec.containers[*].securityContext.privileged namespaces:metadata.labels["pod-security.kubernetes.io/enforce"]
package idioms.label_of_namespace

deny contains sprintf("%s is privileged", [name]) if {
	namespace := data.kubernetes.namespaces[input.namespace]
	namespace.metadata.labels["pod-security.kubernetes.io/enforce"] == "restricted"
	some name, pod in data.kubernetes.pods[input.namespace]
	name >= input.pod
	pod.spec.containers[_].securityContext.privileged
}
