# Idiom: the age of the pod
# Reads: metadata.creationTimestamp status.phase
package idioms.age_of_pod

age := time.parse_rfc3339_ns(input.now) - time.parse_rfc3339_ns(created)

created := data.kubernetes.pods[input.namespace][input.pod].metadata.creationTimestamp

stuck if {
	data.kubernetes.pods[input.namespace][input.pod].status.phase == "Pending"
	age > 3600000000000
}
