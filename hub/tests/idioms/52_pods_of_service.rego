# Idiom: pods that a service selects
# Reads: metadata.labels[*] status.podIP services:spec.selector…
package idioms.pods_of_service

addresses contains pod.status.podIP if {
	selector := data.kubernetes.services[input.namespace][input.account].spec.selector
	some pod in data.kubernetes.pods[input.namespace]
	every key, value in selector { pod.metadata.labels[key] == value }
}
