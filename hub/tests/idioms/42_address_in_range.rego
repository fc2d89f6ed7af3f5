# Idiom: addresses in a range
# Reads: status.podIP status.podIPs[*].ip
package idioms.address_in_range

default allow := false

allow if net.cidr_contains(input.cidr, data.kubernetes.pods[input.namespace][input.pod].status.podIP)

all_in_range if {
	every address in data.kubernetes.pods[input.namespace][input.pod].status.podIPs {
		net.cidr_contains(input.cidr, address.ip)
	}
}
