# Roles go by service accounts, and roles contain roles.
package corpus.roles

grants := {"orders": ["clerk"], "catalog": ["reader"], "cart": ["clerk", "reader"], "gateway": ["admin"]}

contains_role := {"admin": {"clerk", "reader"}, "clerk": {"reader"}, "reader": set()}

account := data.kubernetes.pods[input.namespace][input.pod].spec.serviceAccountName

roles := graph.reachable(contains_role, grants[account])

default allow := false

allow if {
	input.role in roles
	same_team
}

same_team if data.kubernetes.pods[input.namespace][input.pod].metadata.labels.team == input.namespace

reasons contains "role" if not input.role in roles

reasons contains "team" if not same_team
