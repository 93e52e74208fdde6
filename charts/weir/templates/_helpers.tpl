{{/* Names and labels. A component is proxy, worker, injector, echo or test. What is put in as a name goes through toYaml or quote: 123 and on are names. */}}
{{- define "weir.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{/* Short enough for the longest suffix, "-prometheus-adapter", within 63 characters. */}}
{{- define "weir.fullname" -}}
{{- $name := include "weir.name" . -}}
{{- $full := .Values.fullnameOverride -}}
{{- if not $full -}}
{{- $full = ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- end -}}
{{- $full = $full | trunc 43 | trimSuffix "-" -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" $full) -}}
{{- fail (printf "fullnameOverride: %q, of which the names of Services are made, is none: set it to letters in lower case, digits and -, with a letter in front and no - at the end" $full) -}}
{{- end -}}
{{- $full -}}
{{- end }}

{{/* What pods are selected by: never changes for a release. Takes (list ROOT COMPONENT). */}}
{{- define "weir.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "weir.name" $root | toYaml }}
app.kubernetes.io/instance: {{ toYaml $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Takes (list ROOT COMPONENT), or (list ROOT COMPONENT LABELS WHERE) for labels of the values that go before commonLabels. */}}
{{- define "weir.labels" -}}
{{- $root := index . 0 -}}
{{- $labels := deepCopy $root.Values.commonLabels -}}
{{- include "weir.refuseOwnLabels" (list $labels "commonLabels") -}}
{{- if gt (len .) 2 -}}
{{- include "weir.refuseOwnLabels" (rest . | rest) -}}
{{- $labels = merge (deepCopy (index . 2)) $labels -}}
{{- end -}}
{{ include "weir.selector" . }}
app.kubernetes.io/version: {{ $root.Values.image.tag | default $root.Chart.AppVersion | trunc 63 | trimAll "-_." | quote }}
app.kubernetes.io/part-of: weir
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 }}
{{- with $labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* A label that is there twice is the last one's, and Services, monitors and alerts go by the chart's. Takes (list LABELS WHERE). */}}
{{- define "weir.refuseOwnLabels" -}}
{{- range $label := list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" "app.kubernetes.io/version" "app.kubernetes.io/part-of" "app.kubernetes.io/managed-by" "helm.sh/chart" "weir.dev/metrics" -}}
{{- if hasKey (index $ 0) $label -}}
{{- fail (printf "%s: %s is the chart's own, by which pods, metrics and alerts are found: leave it out" (index $ 1) $label) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Name, namespace and labels. Takes (list ROOT COMPONENT NAME), or (list ROOT COMPONENT NAME LABELS WHERE), as weir.labels does. */}}
{{- define "weir.meta" -}}
{{- $root := index . 0 -}}
name: {{ index . 2 | toYaml }}
namespace: {{ toYaml $root.Release.Namespace }}
labels:
  {{- include "weir.labels" (concat (list $root (index . 1)) (slice . 3)) | nindent 2 }}
{{- end }}

{{- define "weir.image" -}}
{{- include "weir.imageOf" (list . .Values.image) -}}
{{- end }}

{{/* Takes (list ROOT IMAGE), an object as `image` of the values is. */}}
{{- define "weir.imageOf" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- with $image.registry | default $root.Values.image.registry }}{{ . }}/{{ end }}{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default $root.Values.image.tag | default $root.Chart.AppVersion }}{{ end }}
{{- end }}

{{/* Takes (list ROOT COMPONENT). */}}
{{- define "weir.serviceAccount" -}}
{{- $root := index . 0 -}}
{{- $account := (index $root.Values (index . 1)).serviceAccount -}}
{{- if $account.create -}}
{{- $account.name | default (printf "%s-%s" (include "weir.fullname" $root) (index . 1)) -}}
{{- else -}}
{{- $account.name | default "default" -}}
{{- end -}}
{{- end }}

{{/* Whole seconds of a duration as weir writes it, rounded up. */}}
{{- define "weir.seconds" -}}
{{- $number := regexFind "^[0-9]+" . | int64 -}}
{{- $unit := regexFind "[a-z]+$" . -}}
{{- $in := dict "s" 1 "m" 60 "h" 3600 -}}
{{- if eq $unit "ms" -}}
{{- div (add $number 999) 1000 -}}
{{- else if hasKey $in $unit -}}
{{- mul $number (get $in $unit) -}}
{{- else -}}
{{- fail (printf "config.shutdown: %q is no duration such as 25s" .) -}}
{{- end -}}
{{- end }}

{{/* Of a duration as Prometheus writes it: 15s, 1m30s. */}}
{{- define "weir.milliseconds" -}}
{{- $sum := 0 -}}
{{- $in := dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000 -}}
{{- range regexFindAll "[0-9]+(ms|s|m|h)" . -1 -}}
{{- $sum = add $sum (mul (regexFind "^[0-9]+" . | int64) (get $in (regexFind "[a-z]+$" .))) -}}
{{- end -}}
{{- $sum -}}
{{- end }}

{{/* Bytes of a size as Kubernetes or weir write it (1Gi, 256MiB, 1500); nothing for what is neither. */}}
{{- define "weir.bytes" -}}
{{- $text := ternary (toString .) (int64 . | toString) (kindIs "string" .) -}}
{{- $number := regexFind "^[0-9]+([.][0-9]+)?" $text -}}
{{- $unit := trimPrefix $number $text | trim | trimSuffix "B" -}}
{{- $in := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- if and $number (hasKey $in $unit) -}}
{{- mulf (float64 $number) (get $in $unit) | int64 -}}
{{- end -}}
{{- end }}

{{/* A quantity as it was written: Go would print 268435456 as 2.68435456e+08. */}}
{{- define "weir.quantity" -}}
{{- ternary (toString .) (toJson .) (kindIs "string" .) -}}
{{- end }}

{{/* The listeners that have a port, as a JSON list of {name, port}. */}}
{{- define "weir.listeners" -}}
{{- $found := list -}}
{{- $taken := list "metrics" -}}
{{- if .Values.secrets.adminToken.existingSecret -}}
{{- $taken = append $taken "admin" -}}
{{- end -}}
{{- range $index, $listener := .Values.config.listeners -}}
{{- $address := tpl (toString $listener.address) $ -}}
{{- if not (hasPrefix "unix:" $address) -}}
{{- $name := $listener.name | default (printf "listener-%d" $index) -}}
{{- if has $name $taken -}}
{{- fail (printf "config.listeners[%d].name: another port of the pod has the name %q already, and the listener's port is to have its name: choose another" $index $name) -}}
{{- end -}}
{{- $taken = append $taken $name -}}
{{- $port := regexFind ":[0-9]+$" $address | trimPrefix ":" | int -}}
{{- if or (lt $port 1) (gt $port 65535) -}}
{{- fail (printf "config.listeners[%d].address: %q does not end with a port, which the pod is to open: write it as \"[::]:8080\"" $index $address) -}}
{{- end -}}
{{- $found = append $found (dict "name" $name "port" $port) -}}
{{- end -}}
{{- end -}}
{{- toJson $found -}}
{{- end }}

{{/* Lanes where the file says nothing of them. With a CPU limit weir finds out itself; without, it would take the node's cores, so it is the request, rounded up. */}}
{{- define "weir.lanes" -}}
{{- if not (dig "limits" "cpu" "" .Values.proxy.resources) -}}
{{- $request := dig "requests" "cpu" "1" .Values.proxy.resources | toString -}}
{{- if hasSuffix "m" $request -}}
{{- div (add (trimSuffix "m" $request | int) 999) 1000 | max 1 -}}
{{- else -}}
{{- ceil (float64 $request) | int | max 1 -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Takes out of a map, here and within, what is null: so Helm's users take out a key that another values file has. */}}
{{- define "weir.prune" -}}
{{- range $key, $value := . -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $ $key -}}
{{- else if kindIs "map" $value -}}
{{- include "weir.prune" $value -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* weir's file: `config`, with what the chart says itself over it. */}}
{{- define "weir.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- include "weir.prune" $config -}}
{{- if or $config.listen $config.upstream $config.rate_limit -}}
{{- fail "config: the short form (listen, upstream, rate_limit) is not for the chart: use listeners, upstreams and rate_limits" -}}
{{- end -}}
{{- if not $config.upstreams -}}
{{- $_ := set $config "upstreams" (dict "app" (dict "endpoints" (list .Values.defaultUpstream))) -}}
{{- end -}}
{{- $lanes := include "weir.lanes" . -}}
{{- if and $lanes (not (dig "runtime" "lanes" "" $config)) -}}
{{- $_ := set $config "runtime" (merge (dict "lanes" (int $lanes)) ($config.runtime | default dict)) -}}
{{- end -}}
{{- $secrets := .Values.secrets -}}
{{- if not .Values.existingConfigMap -}}
{{- if and $secrets.redisPassword.existingSecret (not (dig "redis" "urls" "" $config)) -}}
{{- fail "secrets.redisPassword: there is no Redis to give it to: add config.redis.urls, or leave the Secret out" -}}
{{- end -}}
{{- if and $secrets.auditKey.existingSecret (not (hasKey $config "audit")) -}}
{{- fail "secrets.auditKey: there is no audit that it is for: add config.audit, which may be {}, or leave the Secret out" -}}
{{- end -}}
{{- if and $secrets.databaseUrl.existingSecret (not (hasKey $config "postgres")) -}}
{{- fail "secrets.databaseUrl: there is no Postgres that it is for: add config.postgres, which may be {}, or leave the Secret out" -}}
{{- end -}}
{{- end -}}
{{- $over := dict "admin" (dict "address" (printf "127.0.0.1:%v" .Values.ports.admin)) "metrics" (dict "address" (printf "[::]:%v" .Values.ports.metrics)) -}}
{{- if $secrets.adminToken.existingSecret -}}
{{- $_ := set $over "admin" (dict "address" (printf "[::]:%v" .Values.ports.admin) "token" "${file:/etc/weir/secrets/admin-token}") -}}
{{- end -}}
{{- if $secrets.redisPassword.existingSecret -}}
{{- $_ := set $over "redis" (dict "password" "${file:/etc/weir/secrets/redis-password}") -}}
{{- end -}}
{{- if hasKey $config "postgres" -}}
{{- $postgres := dict -}}
{{- if not (hasKey ($config.postgres | default dict) "migrate") -}}
{{- $_ := set $postgres "migrate" .Values.worker.migrate -}}
{{- end -}}
{{- if $secrets.databaseUrl.existingSecret -}}
{{- $_ := set $postgres "write" "${file:/etc/weir/secrets/database-url}" -}}
{{- end -}}
{{- $_ := set $over "postgres" $postgres -}}
{{- end -}}
{{- if $secrets.auditKey.existingSecret -}}
{{- $_ := set $over "audit" (dict "integrity" (dict "key" "${file:/etc/weir/secrets/audit-key}")) -}}
{{- end -}}
{{- tpl (toYaml (mergeOverwrite $config $over)) . -}}
{{- end }}

{{- define "weir.configMapName" -}}
{{- .Values.existingConfigMap | default (include "weir.fullname" .) -}}
{{- end }}

{{/* One probe. Takes (list ROOT COMPONENT NAME PATH). */}}
{{- define "weir.probe" -}}
{{- $root := index . 0 -}}
{{- $path := index . 3 -}}
{{- if $root.Values.secrets.adminToken.existingSecret }}
httpGet:
  path: /{{ $path }}
  port: admin
timeoutSeconds: 5
{{- else }}
exec:
  command: [weir, healthcheck, --address, "127.0.0.1:{{ $root.Values.ports.admin }}", --{{ $path }}]
timeoutSeconds: 6
{{- end }}
{{- with index (index $root.Values (index . 1)).probes (index . 2) }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The files of a pod: weir.yaml, and what `secrets` and `tls` name. */}}
{{- define "weir.mounts" -}}
{{- /* The kubelet does not refresh a subPath: pods that run keep their file while new ones try the next. */}}
{{- if and (eq .Values.configReload "rollout") (not .Values.existingConfigMap) }}
- {name: config, mountPath: /etc/weir/config/weir.yaml, subPath: weir.yaml, readOnly: true}
{{- else }}
- {name: config, mountPath: /etc/weir/config, readOnly: true}
{{- end }}
{{- if include "weir.hasSecrets" . }}
- {name: secrets, mountPath: /etc/weir/secrets, readOnly: true}
{{- end }}
{{- if .Values.tls.existingSecret }}
- {name: tls, mountPath: /etc/weir/tls, readOnly: true}
{{- end }}
{{- end }}

{{- define "weir.hasSecrets" -}}
{{- range .Values.secrets }}{{ .existingSecret }}{{ end -}}
{{- end }}

{{- define "weir.volumes" -}}
- name: config
  configMap: {name: {{ include "weir.configMapName" . | quote }}}
{{- if include "weir.hasSecrets" . }}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      {{- range $name, $path := dict "adminToken" "admin-token" "auditKey" "audit-key" "databaseUrl" "database-url" "redisPassword" "redis-password" }}
      {{- with get $.Values.secrets $name }}
      {{- if .existingSecret }}
      - secret: {name: {{ .existingSecret | quote }}, items: [{key: {{ .key | quote }}, path: {{ $path }}}]}
      {{- end }}
      {{- end }}
      {{- end }}
{{- end }}
{{- with .Values.tls.existingSecret }}
- name: tls
  secret: {secretName: {{ . | quote }}, defaultMode: 0440}
{{- end }}
{{- end }}
