# Who calls: the pod that has the request's source address.
package shop.caller

pod := pods[0] if {
	pods := [found |
		some namespace, name
		found := {
			"namespace": namespace,
			"name": name,
			"app": data.kubernetes.pods[namespace][name].metadata.labels.app,
		}
		data.kubernetes.pods[namespace][name].status.podIP == input.source
	]
	count(pods) > 0
}
