# Everything that is known of a namespace, for an audit.
package corpus.report

by_node[node] contains name if {
	some name, pod in data.kubernetes.pods[input.namespace]
	node := pod.spec.nodeName
}

not_ready := [name |
	some name, pod in data.kubernetes.pods[input.namespace]
	some condition in pod.status.conditions
	condition.type == "Ready"
	condition.status != "True"
]

restarts := sum([status.restartCount |
	some pod in data.kubernetes.pods[input.namespace]
	some status in pod.status.containerStatuses
])

mounted := {path: count(names) |
	some container in data.kubernetes.pods[input.namespace][input.pod].spec.containers
	path := container.volumeMounts[_].mountPath
	names := {c.name |
		some c in data.kubernetes.pods[input.namespace][input.pod].spec.containers
		c.volumeMounts[_].mountPath == path
	}
}

summary := object.union(
	json.filter(data.kubernetes.pods[input.namespace][input.pod], ["metadata/name", "status/phase"]),
	{"address": object.get(data.kubernetes.pods[input.namespace][input.pod], ["status", "podIP"], "none")},
)
