# Rights of the agent at an OPA that runs with --authentication=token --authorization=basic. OPA loads this file itself
# (opa run --server ... opa-authz.rego), since the rights must be there before the agent is.
package system.authz

default allow := false

# The agent. Its token is the environment variable AGENT_TOKEN of OPA's container and the file of the agent's
# --opa-auth-token-file.
allow if {
	input.identity == opa.runtime().env.AGENT_TOKEN
	some [method, start] in agent_requests
	input.method == method
	array.slice(input.path, 0, count(start)) == start
}

# Method of a request, and how its path starts.
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

# Applications ask for decisions.
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
