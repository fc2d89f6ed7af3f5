# Idiom: the value of an environment variable
# Reads: spec.containers[*].env[*].name spec.containers[*].env[*].value
package idioms.value_of_variable

setting := variable.value if {
	some variable in data.kubernetes.pods[input.namespace][input.pod].spec.containers[0].env
	variable.name == sprintf("%s_SETTING_%d", [upper(input.account), input.index])
}
