# Idiom: iteration by index, two levels deep
# Reads: spec.containers[*].name spec.containers[*].ports[*].containerPort
package idioms.index_of_container

import data.kubernetes.pods

behind_proxy if {
	some i, j
	pods[input.namespace][input.pod].spec.containers[i].name == "proxy"
	pods[input.namespace][input.pod].spec.containers[i].ports[j].containerPort == input.port
}
