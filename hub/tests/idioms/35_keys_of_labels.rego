# Idiom: missing keys, by `object.keys` and a difference of sets
# Reads: metadata.labels[*]
# Asked: /idioms/keys_of_labels/violation
package idioms.keys_of_labels

missing := {"app", "team", "tier", "app.kubernetes.io/version"} - object.keys(labels)

labels := object.get(data.kubernetes.pods, [input.namespace, input.pod, "metadata", "labels"], {})

# METADATA
# entrypoint: true
violation contains sprintf("label %s is missing", [key]) if some key in missing
