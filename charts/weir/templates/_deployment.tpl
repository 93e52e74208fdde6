{{/* Refuses strategies that the API server refuses. Takes (list ROOT COMPONENT). */}}
{{- define "weir.strategy" -}}
{{- $component := index . 1 -}}
{{- $strategy := (index (index . 0).Values $component).strategy -}}
{{- $rolling := $strategy.rollingUpdate | default dict -}}
{{- if and (eq (toString $strategy.type) "Recreate") $rolling -}}
{{- fail (printf "%s.strategy: Recreate rolls nothing, and rollingUpdate is there, as the chart has it: add rollingUpdate: null" $component) -}}
{{- end -}}
{{- $none := list "0" "0%" -}}
{{- if and (has (toString $rolling.maxSurge) $none) (has (toString $rolling.maxUnavailable) $none) -}}
{{- fail (printf "%s.strategy.rollingUpdate: with neither more pods nor fewer no rollout gets on: set maxSurge or maxUnavailable to 1 or more" $component) -}}
{{- end -}}
{{- toYaml $strategy -}}
{{- end }}

{{/* What /var/lib/weir is: a volume of one kind. Takes (list ROOT COMPONENT). */}}
{{- define "weir.dataVolume" -}}
{{- $component := index . 1 -}}
{{- $volume := (index (index . 0).Values $component).dataVolume -}}
{{- $kinds := list -}}
{{- range $kind, $source := $volume -}}
{{- if not (kindIs "invalid" $source) -}}
{{- $kinds = append $kinds $kind -}}
{{- end -}}
{{- end -}}
{{- if gt (len $kinds) 1 -}}
{{- fail (printf "%s.dataVolume: a volume is of one kind, and this one is %s: set all but one to null, such as emptyDir, which is the chart's own" $component (join " and " $kinds)) -}}
{{- end -}}
{{- if eq $component "proxy" -}}
{{- include "weir.spoolFits" (index . 0) -}}
{{- end -}}
{{- toYaml $volume -}}
{{- end }}

{{/* Refuses a spool that may outgrow its emptyDir: past sizeLimit the kubelet evicts the pod, and the spool goes with it. */}}
{{- define "weir.spoolFits" -}}
{{- $config := deepCopy .Values.config -}}
{{- include "weir.prune" $config -}}
{{- $path := dig "audit" "spool" "path" "/var/lib/weir/spool" $config | toString -}}
{{- $volume := .Values.proxy.dataVolume.emptyDir | default dict -}}
{{- if and (hasKey $config "audit") (hasKey $config "postgres") $volume.sizeLimit (hasPrefix "/var/lib/weir" $path) (not .Values.existingConfigMap) -}}
{{- $max := tpl (dig "audit" "spool" "max" "256MiB" $config | toString) . -}}
{{- $spool := include "weir.bytes" $max -}}
{{- $limit := include "weir.bytes" $volume.sizeLimit -}}
{{- if and $spool $limit (ge (int64 $spool) (int64 $limit)) -}}
{{- fail (printf "config.audit.spool.max: the spool's %s are no less than the %s of proxy.dataVolume.emptyDir.sizeLimit, past which the kubelet evicts the pod, and its spool with it: raise sizeLimit" $max (toString $volume.sizeLimit)) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* How many pods there are to be. Takes (list VALUES DEPLOYMENT): with autoscaling as many as the Deployment, as `lookup` finds it, has now.
Left out where the release had a number before, Helm would take it out of the Deployment, which the API server then makes 1. */}}
{{- define "weir.replicas" -}}
{{- $values := index . 0 -}}
{{- if not (dig "autoscaling" "enabled" false $values) -}}
{{- $values.replicaCount -}}
{{- else -}}
{{- dig "spec" "replicas" "" (index . 1) -}}
{{- end -}}
{{- end }}

{{/* The Deployment of a component that reads weir.yaml: proxy or worker. Takes (list ROOT COMPONENT GRACE), in seconds. */}}
{{- define "weir.deployment" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $values := index $root.Values $component -}}
{{- $name := printf "%s-%s" (include "weir.fullname" $root) $component -}}
{{- $selector := include "weir.selector" (list $root $component) -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "weir.meta" (list $root $component $name) | nindent 2 }}
spec:
  {{- with include "weir.replicas" (list $values (lookup "apps/v1" "Deployment" $root.Release.Namespace $name)) }}
  replicas: {{ . }}
  {{- end }}
  revisionHistoryLimit: 5
  minReadySeconds: {{ $values.minReadySeconds }}
  strategy:
    {{- include "weir.strategy" (list $root $component) | nindent 4 }}
  selector:
    matchLabels:
      {{- $selector | nindent 6 }}
  template:
    metadata:
      annotations:
        {{- if not (hasKey $values.podAnnotations "kubectl.kubernetes.io/default-container") }}
        kubectl.kubernetes.io/default-container: {{ $component }}
        {{- end }}
        {{- /* A worker takes no change while it runs. Of a configuration that is not the chart's, only its owner knows. */}}
        {{- $given := $values.podAnnotations }}
        {{- if and (or (eq $component "worker") (eq $root.Values.configReload "rollout")) (not (and $root.Values.existingConfigMap (hasKey $given "checksum/config"))) }}
        {{- $given = omit $given "checksum/config" }}
        checksum/config: {{ include "weir.config" $root | sha256sum }}
        {{- end }}
        {{- with $given }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      labels:
        {{- include "weir.labels" (list $root $component $values.podLabels (printf "%s.podLabels" $component)) | nindent 8 }}
    spec:
      serviceAccountName: {{ include "weir.serviceAccount" (list $root $component) | toYaml }}
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: {{ $values.terminationGracePeriodSeconds | default (index . 2) }}
      {{- with $root.Values.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      securityContext:
        {{- toYaml $root.Values.podSecurityContext | nindent 8 }}
      {{- include "weir.scheduling" (list $root $component) | trim | nindent 6 }}
      containers:
        - name: {{ $component }}
          image: {{ include "weir.image" $root | quote }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          args: [{{ $component }}, -c, /etc/weir/config/weir.yaml]
          {{- with $values.extraEnv }}
          env:
            {{- toYaml . | nindent 12 }}
          {{- end }}
          {{- with $values.extraEnvFrom }}
          envFrom:
            {{- toYaml . | nindent 12 }}
          {{- end }}
          ports:
            {{- if eq $component "proxy" }}
            {{- range include "weir.listeners" $root | fromJsonArray }}
            - {name: {{ .name | quote }}, containerPort: {{ .port }}, protocol: TCP}
            {{- end }}
            {{- end }}
            {{- if $root.Values.secrets.adminToken.existingSecret }}
            - {name: admin, containerPort: {{ $root.Values.ports.admin }}, protocol: TCP}
            {{- end }}
            - {name: metrics, containerPort: {{ $root.Values.ports.metrics }}, protocol: TCP}
          {{- /* A worker is ready once it reaches Redis and Postgres; begun again for lack of them it would only begin to wait anew. */}}
          startupProbe:
            {{- include "weir.probe" (list $root $component "startup" (ternary "live" "ready" (eq $component "worker"))) | trim | nindent 12 }}
          readinessProbe:
            {{- include "weir.probe" (list $root $component "readiness" "ready") | trim | nindent 12 }}
          livenessProbe:
            {{- include "weir.probe" (list $root $component "liveness" "live") | trim | nindent 12 }}
          {{- with $values.resources }}
          resources:
            {{- toYaml . | nindent 12 }}
          {{- end }}
          securityContext:
            {{- toYaml $root.Values.securityContext | nindent 12 }}
          volumeMounts:
            {{- include "weir.mounts" $root | trim | nindent 12 }}
            - {name: data, mountPath: /var/lib/weir}
            {{- with $values.extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
      volumes:
        {{- include "weir.volumes" $root | nindent 8 }}
        - name: data
          {{- include "weir.dataVolume" (list $root $component) | nindent 10 }}
        {{- with $values.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
{{- end }}

{{/* Where the pods of a component may run. Takes (list ROOT COMPONENT). */}}
{{- define "weir.scheduling" -}}
{{- $values := index (index . 0).Values (index . 1) -}}
{{- $selector := include "weir.selector" . -}}
{{- with $values.priorityClassName }}
priorityClassName: {{ toYaml . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $values.affinity }}
affinity:
  {{- toYaml $values.affinity | nindent 2 }}
{{- else if eq $values.podAntiAffinity "hard" }}
affinity:
  podAntiAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- $selector | nindent 12 }}
{{- else if eq $values.podAntiAffinity "soft" }}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- $selector | nindent 14 }}
{{- end }}
{{- with $values.zoneSpread }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: topology.kubernetes.io/zone
    whenUnsatisfiable: {{ . }}
    {{- /* The nodes of a zone that has failed, which take no pod, do not keep the others from it. */}}
    nodeTaintsPolicy: Honor
    {{- /* Each rollout is spread by itself, not against the pods that it replaces. */}}
    matchLabelKeys: [pod-template-hash]
    labelSelector:
      matchLabels:
        {{- $selector | nindent 8 }}
{{- end }}
{{- end }}

{{/* The PodDisruptionBudget of a component. Takes (list ROOT COMPONENT PODS), the most that there may be: of a single pod it would block every drain of a node. */}}
{{- define "weir.podDisruptionBudget" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $budget := (index $root.Values $component).podDisruptionBudget -}}
{{- if and $budget.enabled (gt (int (index . 2)) 1) -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "weir.meta" (list $root $component (printf "%s-%s" (include "weir.fullname" $root) $component)) | nindent 2 }}
spec:
  {{- if kindIs "invalid" $budget.minAvailable }}
  maxUnavailable: {{ $budget.maxUnavailable }}
  {{- else }}
  minAvailable: {{ $budget.minAvailable }}
  {{- end }}
  {{- /* Pods that are not ready serve no one: a node may be drained of them. */}}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "weir.selector" (list $root $component) | nindent 6 }}
{{- end -}}
{{- end }}

{{/* Takes (list ROOT COMPONENT). */}}
{{- define "weir.serviceAccountObject" -}}
{{- $root := index . 0 -}}
{{- $account := (index $root.Values (index . 1)).serviceAccount -}}
{{- if $account.create -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "weir.meta" (list $root (index . 1) (include "weir.serviceAccount" .)) | nindent 2 }}
  {{- with $account.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end -}}
{{- end }}

{{/* The headless Service of a component's metrics. */}}
{{- define "weir.metricsService" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
apiVersion: v1
kind: Service
metadata:
  {{- include "weir.meta" (list $root $component (printf "%s-%s-metrics" (include "weir.fullname" $root) $component)) | nindent 2 }}
    weir.dev/metrics: "true"
spec:
  clusterIP: None
  ports:
    - {name: metrics, port: {{ $root.Values.ports.metrics }}, targetPort: metrics, protocol: TCP}
  selector:
    {{- include "weir.selector" (list $root $component) | nindent 4 }}
{{- end }}
