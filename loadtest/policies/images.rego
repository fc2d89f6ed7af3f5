# Images come from our registry, with a tag that is not latest.
package shop.images

deny contains image if {
	some image in images
	not startswith(image, "registry.example.com/")
}

deny contains image if {
	some image in images
	endswith(image, ":latest")
}

images := [container.image |
	some container in data.kubernetes.pods[input.namespace][input.pod].spec.containers
]
