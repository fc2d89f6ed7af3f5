# Idiom: an identity against patterns, by `glob.match`
# Reads: spec.serviceAccountName
package idioms.glob_of_account

grants := {
	"read": ["shop/*/**"],
	"write": ["shop/team-000/c*"],
	"reader": ["shop/team-001/**"],
}

default allow := false

allow if {
	account := data.kubernetes.pods[input.namespace][input.pod].spec.serviceAccountName
	some pattern in grants[input.role]
	glob.match(pattern, ["/"], concat("/", ["shop", input.namespace, account]))
}
