# What a pod may do goes by its service account.
package shop.account

default allow := false

allow if {
	account := data.kubernetes.pods[input.namespace][input.pod].spec.serviceAccountName
	some role in roles[account]
	role == input.role
}

roles := {"orders": ["read", "write"], "catalog": ["read"]}
