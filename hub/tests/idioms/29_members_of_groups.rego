# Idiom: a partial object of sets
# Reads: metadata.labels.app
package idioms.members_of_groups

members[app] contains name if {
	some name, pod in data.kubernetes.pods[input.namespace]
	app := pod.metadata.labels.app
}

peers := members[input.account] - {input.pod}
