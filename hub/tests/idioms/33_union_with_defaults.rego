# Idiom: labels over defaults, by `object.union`
# Reads: metadata.labels.team metadata.labels.tier
# Asked: /idioms/union_with_defaults/tier
package idioms.union_with_defaults

defaults := {"tier": "none", "team": "nobody"}

labels := object.union(defaults, data.kubernetes.pods[input.namespace][input.pod].metadata.labels)

# METADATA
# entrypoint: true
tier := sprintf("%v of %v", [labels.tier, labels.team])
