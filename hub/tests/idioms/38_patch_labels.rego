# Idiom: labels with one added, by `json.patch`
# Reads: metadata.labels…
package idioms.patch_labels

labels := json.patch(
	data.kubernetes.pods[input.namespace][input.pod].metadata.labels,
	[{"op": "add", "path": "/caller", "value": input.account}],
)
