# Idiom: a label whose key the input names
# Reads: metadata.labels[*]
package idioms.label_by_key

value := object.get(data.kubernetes.pods[input.namespace][input.pod].metadata, ["labels", input.key], "none")
