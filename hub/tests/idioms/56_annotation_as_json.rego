# Idiom: JSON in an annotation
# Reads: metadata.annotations["sidecar.istio.io/status"] metadata.labels.app
package idioms.annotation_as_json

is_meshed if {
	pod := data.kubernetes.pods[input.namespace][input.pod]
	injected := json.unmarshal(pod.metadata.annotations["sidecar.istio.io/status"])
	"istio-proxy" in injected.containers
	pod.metadata.labels.app == input.account
}
