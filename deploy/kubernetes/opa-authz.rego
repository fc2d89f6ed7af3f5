# The agent's rights at an OPA with --authentication=token --authorization=basic. OPA loads this file at start:
# opa run --server ... opa-authz.rego
package system.authz

default allow := false

# The agent's token (--opa-auth-token-file) is AGENT_TOKEN in OPA's environment.
allow if {
	input.identity == opa.runtime().env.AGENT_TOKEN
	some [method, start] in agent_requests
	input.method == method
	array.slice(input.path, 0, count(start)) == start
}

# Method and path prefix.
agent_requests := [
	["PATCH", ["v1", "data"]],
	["PUT", ["v1", "data"]],
	["GET", ["v1", "data", "system", "opahub"]],
	["POST", ["v1", "query"]],
	["POST", ["v1", "compile"]],
	["GET", ["v1", "policies"]],
	["PUT", ["v1", "policies"]],
	["DELETE", ["v1", "policies"]],
]

# Decisions for applications.
allow if {
	input.method == "POST"
	array.slice(input.path, 0, 2) == ["v1", "data"]
	input.path[2] != "system"
}

# Probes.
allow if {
	input.method == "GET"
	input.path[0] == "health"
}
