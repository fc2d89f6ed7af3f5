# Pods of one service account trust each other.
package shop.same_account

default allow := false

allow if account(input.from) == account(input.to)

account(ref) := object.get(data.kubernetes.pods[ref.namespace][ref.name].spec, "serviceAccountName", "default")
