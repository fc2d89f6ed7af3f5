# Pods are asked about by name: they must say which application and team they belong to.
package shop.labels

deny contains "no app label" if not labels.app

deny contains "no team label" if not labels.team

labels := data.kubernetes.pods[input.namespace][input.pod].metadata.labels
