{{/* The Secret with the injector's certificate. What cert-manager leaves behind must not be in Helm's way. */}}
{{- define "weir.injectorSecret" -}}
{{- $kind := ternary "certificate" "tls" .Values.injector.certificates.certManager.enabled -}}
{{- .Values.injector.certificates.existingSecret | default (printf "%s-injector-%s" (include "weir.fullname" .) $kind) -}}
{{- end }}

{{/*
The injector's certificate by Helm, as YAML: the Secret's `annotations` and `data`, and the `bundle` that the API server is to trust. Takes
(list ROOT SECRET): what the Secret is now, as `lookup` finds it, is kept until two thirds of its time are over. No one keeps the key of its
authority, so a new certificate has a new one; until the next upgrade the old one is trusted beside it, since pods take up a changed Secret later.
*/}}
{{- define "weir.injectorCertificate" -}}
{{- $root := index . 0 -}}
{{- $found := index . 1 | default dict -}}
{{- $data := $found.data | default dict -}}
{{- $renew := dig "metadata" "annotations" "weir.dev/renew-after" "" $found -}}
{{- $bundle := list (get $data "ca.crt" | b64dec) -}}
{{- if or (lt $renew (now | date "2006-01-02")) (not (and (get $data "tls.crt") (get $data "tls.key") (get $data "ca.crt"))) -}}
{{- $days := int $root.Values.injector.certificates.validDays -}}
{{- $renew = now | dateModify (printf "+%dh" (mul $days 16)) | date "2006-01-02" -}}
{{- $service := printf "%s-injector" (include "weir.fullname" $root) -}}
{{- $names := list (printf "%s.%s.svc" $service $root.Release.Namespace) (printf "%s.%s" $service $root.Release.Namespace) -}}
{{- $authority := genCA (printf "%s CA" $service) $days -}}
{{- $made := genSignedCert $service nil $names $days $authority -}}
{{- $data = dict "tls.crt" (b64enc $made.Cert) "tls.key" (b64enc $made.Key) "ca.crt" (b64enc $authority.Cert) -}}
{{- $bundle = prepend $bundle $authority.Cert -}}
{{- end -}}
annotations: {weir.dev/renew-after: {{ $renew | quote }}}
data:
  {{- range $key := list "ca.crt" "tls.crt" "tls.key" }}
  {{ $key }}: {{ get $data $key }}
  {{- end }}
bundle: {{ join "" $bundle | b64enc }}
{{- end }}
