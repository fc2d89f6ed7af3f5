# A pod is spoken to at its own address only.
package shop.address

default allow := false

allow if {
	address := data.kubernetes.pods[input.namespace][input.pod].status.podIP
	address != ""
	address == input.destination
}
