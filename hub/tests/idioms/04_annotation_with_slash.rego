# Idiom: an annotation with a slash in its name, as a number
# Reads: metadata.annotations["prometheus.io/port"]
package idioms.annotation_with_slash

default is_scraped := false

is_scraped if {
	annotations := object.get(data.kubernetes.pods[input.namespace][input.pod].metadata, "annotations", {})
	port := to_number(object.get(annotations, "prometheus.io/port", "0"))
	port == input.port + 1010
}
