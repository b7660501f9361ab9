{{- define "bascule.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "bascule.labels" -}}
app.kubernetes.io/name: bascule
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "bascule.selector" -}}
app.kubernetes.io/name: bascule
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "bascule.operatorAddress" -}}
{{- .Values.operator.address | default (printf "bascule-operator.%s.svc:7409" .Release.Namespace) -}}
{{- end }}
