# Idiom: largest and smallest of numbers, sorted
# Reads: status.containerStatuses[*].restartCount status.startTime
package idioms.most_restarts

import data.kubernetes.pods

counts := [status.restartCount | some status in pods[input.namespace][input.pod].status.containerStatuses]

worst := max(counts)

settled if {
	worst == min(counts)
	started := sort([time.parse_rfc3339_ns(pod.status.startTime) | some pod in pods[input.namespace]])
	time.parse_rfc3339_ns(input.now) - started[0] > time.parse_duration_ns("1h")
}
