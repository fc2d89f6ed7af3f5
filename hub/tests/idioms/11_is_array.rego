# Idiom: `is_array` decides if a field is used
# Reads: spec.initContainers
package idioms.is_array

default is_initialised := false

is_initialised if is_array(data.kubernetes.pods[input.namespace][input.pod].spec.initContainers)
