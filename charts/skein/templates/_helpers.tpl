{{/* Name of the operator's objects. */}}
{{- define "skein.name" -}}
{{ printf "%s-operator" .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* What selects the operator's pods. */}}
{{- define "skein.selector" -}}
app.kubernetes.io/name: skein-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Labels of every object. */}}
{{- define "skein.labels" -}}
{{ include "skein.selector" . }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: skein
{{- if .Chart.AppVersion }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Reference of an image: a list of the root and the image's values. */}}
{{- define "skein.image" -}}
{{- $root := index . 0 }}
{{- $image := index . 1 }}
{{- $name := printf "%s/%s" (trimSuffix "/" $root.Values.images.registry) $image.repository }}
{{- if $image.digest }}
{{- printf "%s@%s" $name $image.digest }}
{{- else }}
{{- printf "%s:%s" $name (default $root.Chart.AppVersion $image.tag) }}
{{- end }}
{{- end }}

{{/* What the operator may do in every namespace it looks after. */}}
{{- define "skein.rules" -}}
- apiGroups: [skein.dev]
  resources: [modeldeployments]
  verbs: [get, list, watch]
- apiGroups: [skein.dev]
  resources: [modeldeployments/status]
  verbs: [get, patch]
# Owner references that block deletion need this where the admission plugin asks for it.
- apiGroups: [skein.dev]
  resources: [modeldeployments/finalizers]
  verbs: [update]
- apiGroups: [apps]
  resources: [statefulsets, deployments, controllerrevisions]
  verbs: [get, list, watch, create, patch, delete]
# Pods of nodes that cannot be reached are deleted by force, so that others take their place. For a model on a claim or a node a pod is
# made that reads its headers, its log is read, and it is deleted.
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [pods/log, persistentvolumeclaims]
  verbs: [get]
- apiGroups: [""]
  resources: [nodes]
  verbs: [get]
{{- if or .Values.sources.hostPaths .Values.sources.nodeCache }}
# Whether a namespace lets host paths through is what its label says.
- apiGroups: [""]
  resources: [namespaces]
  verbs: [get]
{{- end }}
- apiGroups: [""]
  resources: [configmaps, services, serviceaccounts]
  verbs: [get, list, watch, create, patch, delete]
# Secrets (tokens, certificates) are made and read by name; none is listed, and none is deleted: they go with what they belong to.
- apiGroups: [""]
  resources: [secrets]
  verbs: [get, create, patch]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end }}
