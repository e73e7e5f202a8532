{{/* Name of all objects: a DNS-1035 label of at most 36 characters. */}}
{{- define "metier.fullname" -}}
{{- $release := ternary .Release.Name (printf "%s-metier" .Release.Name) (contains "metier" .Release.Name) -}}
{{- $name := .Values.fullnameOverride | default $release | lower | replace "." "-" -}}
{{- regexReplaceAll "-+$" (regexReplaceAll "^([^a-z])" $name "m${1}" | trunc 36) "" -}}
{{- end -}}

{{/* Labels that select; they must not change from version to version. Context: {root, component}. */}}
{{- define "metier.selector" -}}
app.kubernetes.io/name: metier
app.kubernetes.io/instance: {{ include "metier.fullname" .root }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "metier.labels" -}}
{{ include "metier.selector" . }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "metier.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "metier.fullname" .) -}}
{{- end -}}

{{- define "metier.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "metier.config" -}}
{{- .Values.config | default (.Files.Get "files/metier.yaml") -}}
{{- end -}}

{{/* A setting of the configuration that the chart sizes something by. Context: {root, path}. */}}
{{- define "metier.setting" -}}
{{- $value := fromYaml (include "metier.config" .root) -}}
{{- with $value.Error }}{{ fail (printf "config: not a YAML mapping: %s" .) }}{{ end -}}
{{- range $key := splitList "." .path -}}
{{- if not (and (kindIs "map" $value) (hasKey $value $key)) -}}
{{- fail (printf "config: say %s; the chart needs it to size its pods" $.path) -}}
{{- end -}}
{{- $value = index $value $key -}}
{{- end -}}
{{- $value -}}
{{- end -}}

{{/* What every container may do: Pod Security "restricted". */}}
{{- define "metier.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Limits = requests: Ray reads limits, and a pod that may be squeezed is a replica that misses its health check. */}}
{{- define "metier.resources" -}}
{{- $gpus := int (default 0 .gpus) -}}
{{- range $kind := list "requests" "limits" }}
{{ $kind }}:
  cpu: {{ $.cpu | quote }}
  memory: {{ $.memory | quote }}
  {{- if $gpus }}
  nvidia.com/gpu: {{ $gpus }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Environment of Ray containers: secrets by reference only. */}}
{{- define "metier.env" -}}
{{- with .Values.milvus }}
{{- if .secretName }}
- name: METIER_MILVUS_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .secretName }}
      key: {{ .tokenKey }}
{{- end }}
{{- end }}
{{- with .Values.objectStore }}
{{- if .secretName }}
{{- range .keys }}
- name: {{ . }}
  valueFrom:
    secretKeyRef:
      name: {{ $.Values.objectStore.secretName }}
      key: {{ . }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/*
Spec of a Ray pod. Probes are left to KubeRay.
Context: {root, container, head, cpu, memory, gpus, serving, nodeSelector, tolerations}.
*/}}
{{- define "metier.rayPodSpec" -}}
{{- $env := include "metier.env" .root | trim -}}
serviceAccountName: {{ include "metier.serviceAccount" .root }}
# A Service called milvus or metier would otherwise put variables of its own into the environment.
enableServiceLinks: false
automountServiceAccountToken: {{ and .head .serving .root.Values.serving.autoscaling.enabled | default false }}
securityContext:
  fsGroup: 10001
  runAsGroup: 10001
  runAsNonRoot: true
  runAsUser: 10001
  seccompProfile:
    type: RuntimeDefault
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if and .serving (not .head) }}
terminationGracePeriodSeconds: {{ add .root.Values.serving.drainSeconds 30 }}
{{- end }}
containers:
  - name: {{ .container }}
    image: {{ include "metier.image" .root }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    {{- if or .head .serving }}
    ports:
      {{- if .head }}
      - {name: gcs-server, containerPort: 6379}
      - {name: dashboard, containerPort: 8265}
      {{- end }}
      {{- if .serving }}
      - {name: serve, containerPort: 8000}
      {{- end }}
      - {name: metrics, containerPort: 8080}
    {{- end }}
    {{- with $env }}
    env:
      {{- . | nindent 6 }}
    {{- end }}
    {{- if not .head }}
    lifecycle:
      preStop:
        exec:
          command: [/bin/sh, -c, {{ if .serving }}{{ printf "sleep %d; ray stop" (int .root.Values.serving.drainSeconds) | quote }}{{ else }}ray stop{{ end }}]
    {{- end }}
    resources:
      {{- include "metier.resources" . | trim | nindent 6 }}
    securityContext:
      {{- include "metier.containerSecurity" . | nindent 6 }}
    volumeMounts:
      - {name: config, mountPath: /etc/metier, readOnly: true}
      - {name: cache, mountPath: /var/cache/metier}
      {{- if .root.Values.data.claimName }}
      - {name: data, mountPath: /data, readOnly: true}
      {{- end }}
volumes:
  - name: config
    configMap:
      name: {{ include "metier.fullname" .root }}-config
  - name: cache
    emptyDir:
      sizeLimit: {{ .root.Values.modelCache.sizeLimit }}
  {{- with .root.Values.data.claimName }}
  - name: data
    persistentVolumeClaim:
      claimName: {{ . }}
      readOnly: true
  {{- end }}
{{- end -}}

{{/* Ray's own token in front of dashboard, GCS and jobs. */}}
{{- define "metier.auth" -}}
mode: token
{{- with .Values.auth.secretName }}
secretName: {{ . }}
{{- end }}
{{- end -}}
