# Idiom: the port of the pod behind the port of a service
# Reads: spec.containers[*].ports[*].name spec.containers[*].ports[*].containerPort services:spec.ports[*].port services:spec.ports[*].targetPort
package idioms.port_of_service

target := resolve(port.targetPort) if {
	some port in data.kubernetes.services[input.to.namespace][input.account].spec.ports
	port.port == input.port
}

resolve(port) := port if is_number(port)

resolve(port) := found[0] if {
	is_string(port)
	found := [p.containerPort |
		some container in data.kubernetes.pods[input.to.namespace][input.to.name].spec.containers
		some p in container.ports
		p.name == port
	]
}
