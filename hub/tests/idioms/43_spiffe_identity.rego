# Idiom: pods behind a SPIFFE identity
# Reads: spec.serviceAccountName status.phase
package idioms.spiffe_identity

identity := {"namespace": parts[1], "account": parts[3]} if {
	parts := split(trim_prefix(input.spiffe, "spiffe://cluster.local/"), "/")
	parts[0] == "ns"
	parts[2] == "sa"
}

running := [name |
	some name, pod in data.kubernetes.pods[identity.namespace]
	pod.spec.serviceAccountName == identity.account
	pod.status.phase == "Running"
]

allow if count(running) > 1
