# Idiom: a map from address to name of pod
# Reads: status.phase status.podIP
package idioms.pod_by_address

by_address := {pod.status.podIP: name |
	some name, pod in data.kubernetes.pods["team-000"]
	pod.status.phase == "Running"
}

caller := by_address[input.source]
