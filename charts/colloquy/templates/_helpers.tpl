{{- define "colloquy.name" -}}
{{ .Release.Name | trunc 40 | trimSuffix "-" }}-operator
{{- end }}

{{- define "colloquy.selector" -}}
app.kubernetes.io/name: colloquy-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "colloquy.labels" -}}
{{ include "colloquy.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* What the operator may do to models and to what they own. No Secret, no exec, no role. */ -}}
{{- define "colloquy.rules" -}}
- apiGroups: [colloquy.dev]
  resources: [conversationmodels]
  verbs: [get, list, watch, patch] # patch: the finalizer.
- apiGroups: [colloquy.dev]
  resources: [conversationmodels/status]
  verbs: [patch]
- apiGroups: [colloquy.dev]
  resources: [conversationmodels/finalizers]
  verbs: [update] # Owner references that block the owner's deletion ask for it.
- apiGroups: [""]
  resources: [pods, services, persistentvolumeclaims]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch, list] # list: what the kubelet says of a pod that does not start.
{{- end }}
