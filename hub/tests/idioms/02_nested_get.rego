# Idiom: `object.get` in `object.get`, each with a default
# Reads: spec.serviceAccountName
package idioms.nested_get

pod(ref) := object.get(object.get(data.kubernetes.pods, ref.namespace, {}), ref.name, {})

account(ref) := object.get(object.get(pod(ref), "spec", {}), "serviceAccountName", "default")

same_account if account(input.from) == account(input.to)
