# Idiom: the zone of the pod, by its node
# Reads: spec.nodeName nodes:metadata.labels["topology.kubernetes.io/zone"]
package idioms.zone_of_node

default same_zone := false

same_zone if zone(input.from) == zone(input.to)

zone(ref) := node.metadata.labels["topology.kubernetes.io/zone"] if {
	node := data.kubernetes.nodes[data.kubernetes.pods[ref.namespace][ref.name].spec.nodeName]
}
