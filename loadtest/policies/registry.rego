# How many pods run images of a registry.
package shop.registry

running := count([1 |
	some namespace
	some pod in data.kubernetes.pods[namespace]
	some container in pod.spec.containers
	startswith(container.image, input.registry)
])
