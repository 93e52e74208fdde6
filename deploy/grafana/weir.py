#!/usr/bin/env python3
"""Writes weir.json, the Grafana dashboard, from the rows below: `make manifests`. Grafana 10 or newer; the data source, the
namespace, the job and the instances are variables. `make chart` checks that the file is fresh and that weir exports what is asked for.
"""

import json
import sys
from pathlib import Path

# Every query is narrowed to what the variables say.
ON = 'namespace=~"$namespace",job=~"$job",instance=~"$instance"'
RATE = "$__rate_interval"


def rate(metric: str, labels: str = "") -> str:
    return f"rate({metric}{{{ON}{',' + labels if labels else ''}}}[{RATE}])"


def now(metric: str, labels: str = "") -> str:
    return f"{metric}{{{ON}{',' + labels if labels else ''}}}"


def by(labels: str, inner: str) -> str:
    return f"sum by ({labels}) ({inner})"


def quantile(q: float, labels: str, histogram: str) -> str:
    return f"histogram_quantile({q}, {by(labels + ', le' if labels else 'le', rate(histogram + '_bucket'))})"


def share(part: str, whole: str) -> str:
    return f"({part}) / ({whole})"


REQUESTS, ERRORS = rate("weir_requests_total"), rate("weir_requests_total", 'class="5xx"')
REFUSED = rate("weir_rejections_total", 'reason!~"client_left|upstream_aborted|cut_off"')


def of_containers(expression: str) -> str:
    """Of what the kubelet tells, that of the pods whose weir is chosen: other people's containers have such names, too."""
    return f"{expression} and on (namespace, pod) {now('weir_build_info')}"


def used(metric: str) -> str:
    return f'sum by (namespace, pod) (rate({metric}{{namespace=~"$namespace",container=~"weir|proxy|worker|injector"}}[{RATE}]))'


# Each row: (title, [panel…]); a panel: (title, kind, unit, width, what it says, [(expression, legend)…]). 24 columns a line.
ROWS = [
    ("Overview", [
        ("Requests a second", "stat", "reqps", 4, "Of all instances that are chosen.", [(f"sum({REQUESTS})", "")]),
        ("Errors", "stat", "percentunit", 4, "5xx, weir's own refusals with 503 included.", [(share(f"sum({ERRORS})", f"sum({REQUESTS})"), "")]),
        ("p99", "stat", "s", 4, "From a request's head to the end of its response.", [(quantile(0.99, "", "weir_request_duration_seconds"), "")]),
        ("Refused by weir", "stat", "reqps", 4, "Limits, breakers, sessions, no route and the rest; not what broke off.", [(f"sum({REFUSED})", "")]),
        ("Connections open", "stat", "short", 4, "", [(f"sum({now('weir_connections_open')})", "")]),
        ("Processes", "stat", "short", 4, "That are scraped: proxies and workers; and those of them that are ready.", [
            (f"count({now('weir_ready')})", "all"), (f"sum({now('weir_ready')})", "ready")]),
        ("Requests by class of status", "timeseries", "reqps", 12, "", [(by("class", REQUESTS), "{{class}}")]),
        ("Requests by route", "timeseries", "reqps", 12, "", [(f"topk(10, {by('route', REQUESTS)})", "{{route}}")]),
        ("Time of requests", "timeseries", "s", 12, "The upstream's time included.", [
            (quantile(q, "", "weir_request_duration_seconds"), name) for q, name in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))]),
        ("p99 by route", "timeseries", "s", 12, "", [(f"topk(10, {quantile(0.99, 'route', 'weir_request_duration_seconds')})", "{{route}}")]),
        ("Refused, or broken off", "timeseries", "reqps", 12, "By the label that Proxy-Status and the audit have too. Broken off: client_left, upstream_aborted, cut_off.", [(by("reason", rate("weir_rejections_total")), "{{reason}}")]),
        ("gRPC by status", "timeseries", "reqps", 12, "", [(by("status", rate("weir_grpc_responses_total")) + " > 0", "{{status}}")]),
    ]),
    ("Processes and lanes", [
        ("Requests by instance", "timeseries", "reqps", 8, "An uneven spread is the balancer's in front.", [(by("instance", REQUESTS), "{{instance}}")]),
        ("Connections open by instance", "timeseries", "short", 8, "", [(by("instance", now("weir_connections_open")), "{{instance}}")]),
        ("Connections accepted and refused", "timeseries", "cps", 8, "Refused: over limits.max_connections of a listener, or max_connections_per_client.", [
            (f"sum({rate('weir_connections_total')})", "accepted"), (by("reason", rate("weir_connections_refused_total")), "refused, {{reason}}")]),
        ("CPU of lanes", "timeseries", "percentunit", 8, "Of the one core that each can use.", [(rate("weir_lane_cpu_seconds_total"), "{{instance}} {{lane}}")]),
        ("Time that lanes are late", "timeseries", "s", 8, "Kept where runtime.shed.loop_delay is set.", [(quantile(0.99, "instance", "weir_lane_delay_seconds"), "{{instance}} p99")]),
        ("Versions", "timeseries", "short", 8, "Instances by version.", [(by("version", now("weir_build_info")), "{{version}}")]),
        ("Resident memory of processes", "timeseries", "bytes", 8, "As each tells it of itself.", [(now("process_resident_memory_bytes"), "{{instance}}")]),
        ("Of what memory may be", "timeseries", "percentunit", 8, "Share of what the control group allows, where it bounds it: at all of it the kernel ends the process.", [
            (share(now("process_resident_memory_bytes"), now("weir_memory_limit_bytes") + " > 0"), "{{instance}}")]),
        ("Of what descriptors may be open", "timeseries", "percentunit", 8, "A request under way takes two.", [
            (share(now("process_open_fds"), now("process_max_fds")), "{{instance}}")]),
        ("CPU", "timeseries", "short", 8, "Cores, as the kubelet counts them. A lane is a thread: it has one at most.", [
            (of_containers(used("container_cpu_usage_seconds_total")), "{{pod}}")]),
        ("CPU held back", "timeseries", "percentunit", 8, "Share of periods in which the container had used up its limit: a cause of slow requests.", [
            (of_containers(f"{used('container_cpu_cfs_throttled_periods_total')} / {used('container_cpu_cfs_periods_total')}"), "{{pod}}")]),
        ("Memory", "timeseries", "bytes", 8, "", [
            (of_containers('sum by (namespace, pod) (container_memory_working_set_bytes{namespace=~"$namespace",container=~"weir|proxy|worker|injector"})'), "{{pod}}")]),
        ("Tasks begun again, and panics", "timeseries", "short", 8, "", [
            (f"sum by (task) (increase({now('weir_task_restarts_total')}[{RATE}])) > 0", "{{task}}"), (f"sum(increase({now('weir_panics_total')}[{RATE}]))", "panics")]),
        ("Reloads of the configuration", "timeseries", "short", 8, "", [(f"sum by (result) (increase({now('weir_config_reloads_total')}[{RATE}]))", "{{result}}")]),
        ("Access log, log and spans", "timeseries", "cps", 8, "", [
            (by("result", rate("weir_access_log_lines_total")), "lines {{result}}"),
            (by("result", rate("weir_log_lines_total")), "log {{result}}"), (by("result", rate("weir_trace_spans_total")), "spans {{result}}")]),
    ]),
    ("TLS", [
        ("Handshakes", "timeseries", "cps", 8, "", [(by("version, session", rate("weir_tls_handshakes_total")), "{{version}} {{session}}")]),
        ("Handshakes that failed", "timeseries", "cps", 8, "", [(by("reason", rate("weir_tls_handshake_failures_total")) + " > 0", "{{reason}}")]),
        ("Certificates end in", "timeseries", "s", 8, "", [(f"min by (certificate) ({now('weir_tls_certificate_not_after_timestamp_seconds')}) - time()", "{{certificate}}")]),
    ]),
    ("Upstreams", [
        ("Endpoints", "timeseries", "short", 8, "Mean over instances.", [(f"avg by (upstream, state) ({now('weir_upstream_endpoints')})", "{{upstream}} {{state}}")]),
        ("Requests under way", "timeseries", "short", 8, "Those that wait for their turn too; and the bound that is learnt, where it is.", [
            (by("upstream", now("weir_upstream_requests_in_flight")), "{{upstream}}"), (by("upstream", now("weir_upstream_concurrency_limit")) + " > 0", "{{upstream}}, bound")]),
        ("Refused for concurrency", "timeseries", "reqps", 8, "", [(by("upstream, cap", rate("weir_upstream_overloads_total")), "{{upstream}} {{cap}}")]),
        ("Retries", "timeseries", "cps", 8, "", [(by("upstream, result", rate("weir_upstream_retries_total")) + " > 0", "{{upstream}} {{result}}")]),
        ("Checks that failed, and ejections", "timeseries", "cps", 8, "", [
            (by("upstream", rate("weir_upstream_health_checks_total", 'result="failed"')), "{{upstream}} checks"), (by("upstream", rate("weir_upstream_ejections_total")), "{{upstream}} ejections")]),
        ("Names that are not found", "timeseries", "cps", 8, "And where so few endpoints are up that all are used.", [
            (by("upstream", rate("weir_upstream_dns_lookups_total", 'result="failed"')), "{{upstream}}"), (f"max by (upstream) ({now('weir_upstream_panic')})", "{{upstream}}, all are used")]),
    ]),
    ("Limits", [
        ("Decisions", "timeseries", "reqps", 12, "", [(by("limit, decision", rate("weir_limit_decisions_total", 'decision=~"admitted|refused"')), "{{limit}} {{decision}}")]),
        ("Share refused", "timeseries", "percentunit", 12, "", [(share(by("limit", rate("weir_limit_decisions_total", 'decision="refused"')), by("limit", rate("weir_limit_decisions_total", 'decision=~"admitted|refused"'))), "{{limit}}")]),
        ("Would be refused in shadow mode", "timeseries", "reqps", 8, "What `mode: enforce` would refuse: look here before you enforce a limit.", [(by("limit", rate("weir_limit_decisions_total", 'decision="shadow_refused"')), "{{limit}}")]),
        ("Near the limit, and without a key", "timeseries", "reqps", 8, "", [(by("limit, decision", rate("weir_limit_decisions_total", 'decision=~"near_limit|missing_key"')), "{{limit}} {{decision}}")]),
        ("Not shared", "timeseries", "short", 8, "Instances that keep a shared limit by themselves, and requests decided so.", [
            (by("limit", now("weir_limit_alone")), "{{limit}} instances"), (by("limit", rate("weir_limit_decisions_total", 'decision="redis_lost"')), "{{limit}} requests a second")]),
        ("Keys let go of", "timeseries", "cps", 8, "At rate_limit_defaults.max_keys the least used key makes room, and what it had used is forgotten.", [
            (by("instance", rate("weir_limit_keys_evicted_total")), "{{instance}}")]),
    ]),
    ("Circuit breakers", [
        ("State", "timeseries", "short", 12, "Instances in each state other than closed.", [(by("upstream, state", now("weir_breaker_state", 'state!="closed"')) + " > 0", "{{upstream}} {{state}}")]),
        ("Decisions", "timeseries", "reqps", 12, "", [(by("upstream, decision", rate("weir_breaker_decisions_total")), "{{upstream}} {{decision}}")]),
        ("Shared", "timeseries", "percentunit", 12, "Share of instances that go by the state in Redis; none where the breaker is local.", [(f"avg by (upstream) ({now('weir_breaker_shared')})", "{{upstream}}")]),
    ]),
    ("Sessions", [
        ("Requests, by what was found", "timeseries", "reqps", 8, "", [(by("sessions, outcome", rate("weir_session_checks_total")), "{{sessions}} {{outcome}}")]),
        ("Begun and ended", "timeseries", "cps", 8, "", [(by("sessions, event", rate("weir_session_events_total")), "{{sessions}} {{event}}")]),
        ("Live", "timeseries", "short", 8, "In Redis, as the last sweep counted them.", [
            (f"max by (sessions) ({now('weir_sessions_live')})", "{{sessions}} sessions"), (f"max by (sessions) ({now('weir_session_users')})", "{{sessions}} users")]),
        ("Where answers came from", "timeseries", "reqps", 8, "Unanswered: the request got 503. Grace: Redis did not answer, and what was known holds.", [(by("sessions, outcome", rate("weir_session_lookups_total")), "{{sessions}} {{outcome}}")]),
        ("Share that asked Redis", "timeseries", "percentunit", 8, "", [(share(by("sessions", rate("weir_session_lookups_total", 'outcome="asked"')), by("sessions", rate("weir_session_lookups_total"))), "{{sessions}}")]),
        ("Held in memory, and swept in Redis", "timeseries", "short", 8, "", [
            (by("sessions", now("weir_sessions_held")), "{{sessions}} held"), (f"sum by (sessions) (increase({now('weir_sessions_swept_total')}[{RATE}]))", "{{sessions}} swept")]),
    ]),
    ("Audit", [
        ("Lag", "timeseries", "s", 8, "Age of the oldest event in Redis that is not stored.", [(f"max({now('weir_ingest_lag_seconds')})", "lag")]),
        ("On their way", "timeseries", "short", 8, "Events of proxies that are not known to be stored; batches in Redis; dead letters.", [
            (f"sum({now('weir_audit_underway')})", "events under way"), (f"sum({now('weir_audit_queued')})", "events queued"),
            (f"max({now('weir_ingest_waiting')})", "batches in Redis"), (f"max({now('weir_ingest_dead_letters')})", "dead letters")]),
        ("Events", "timeseries", "cps", 8, "Written by proxies, stored by workers; dropped ones are lost.", [
            (by("result", rate("weir_audit_events_total")), "{{result}}"), (f"sum({rate('weir_ingest_events_total')})", "stored")]),
        ("Spool", "timeseries", "percentunit", 8, "Share of audit.spool.max.", [
            (share(by("instance", now("weir_audit_spool_bytes")), by("instance", now("weir_audit_spool_max_bytes")) + " > 0"), "{{instance}}")]),
        ("Oldest in the spool", "timeseries", "s", 8, "", [(f"max by (instance) ({now('weir_audit_spool_oldest_seconds')}) > 0", "{{instance}}")]),
        ("Trouble", "timeseries", "short", 8, "", [
            (f"sum({now('weir_audit_refuses')})", "instances that refuse requests"), (f"sum(increase({now('weir_audit_resent_batches_total')}[{RATE}]))", "batches sent again"),
            (f"sum({now('weir_audit_spool_corrupt_total')})", "damage in spools"), (f"sum({now('weir_audit_spool_batches')})", "batches in spools")]),
    ]),
    ("Redis", [
        ("Calls", "timeseries", "cps", 8, "By client: main, and rate_limit and sessions where they have servers of their own.", [(by("client, result", rate("weir_redis_calls_total")), "{{client}} {{result}}")]),
        ("Share not answered", "timeseries", "percentunit", 8, "", [(share(by("client", rate("weir_redis_calls_total", 'result!="answered"')), by("client", rate("weir_redis_calls_total"))), "{{client}}")]),
        ("Time of calls", "timeseries", "s", 8, "", [(quantile(q, "client", "weir_redis_call_duration_seconds"), "{{client}} " + name) for q, name in ((0.5, "p50"), (0.99, "p99"))]),
    ]),
    ("Postgres", [
        ("Connections", "timeseries", "short", 8, "In use, and callers that wait for one.", [
            (by("pool", now("weir_postgres_connections", 'state="in_use"')), "{{pool}} in use"), (by("pool", now("weir_postgres_connections_max")), "{{pool}} at most"),
            (by("pool", now("weir_postgres_waiting")) + " > 0", "{{pool}} waiting")]),
        ("Transactions of the worker", "timeseries", "cps", 8, "Those that failed are tried again.", [(by("result", rate("weir_ingest_transactions_total")), "{{result}}")]),
        ("Events of a transaction", "timeseries", "short", 8, "Small ones cost Postgres more an event.", [(share(f"sum({rate('weir_ingest_events_total')})", f"sum({rate('weir_ingest_transactions_total')})"), "events")]),
        ("Batches", "timeseries", "cps", 8, "Known: stored already. Buried: a dead letter.", [
            (by("result", rate("weir_ingest_batches_total")), "{{result}}"), (f"sum({rate('weir_ingest_claimed_total')})", "taken over")]),
        ("Days removed by retention", "timeseries", "short", 8, "In Postgres, and files of SQLite.", [
            (f"sum(increase({now('weir_ingest_days_removed_total')}[1d]))", "Postgres"), (f"sum(increase({now('weir_audit_files_removed_total')}[1d]))", "SQLite")]),
    ]),
]

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
HEIGHT = {"stat": 4, "timeseries": 8}


def panel(number: int, spec: tuple, x: int, y: int) -> dict:
    title, kind, unit, width, says, queries = spec
    made = {
        "id": number, "type": kind, "title": title, "description": says, "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": width, "h": HEIGHT[kind]},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [{"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expr, "legendFormat": legend or "__auto"}
                    for index, (expr, legend) in enumerate(queries)],
    }
    if kind == "timeseries":
        made["fieldConfig"]["defaults"]["custom"] = {"fillOpacity": 5, "lineWidth": 1, "showPoints": "never"}
        made["options"] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    else:
        made["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
    if title == "Certificates end in":
        del made["fieldConfig"]["defaults"]["min"]
    return made


def panels() -> list[dict]:
    made, y = [], 0
    for title, specs in ROWS:
        made.append({"id": len(made) + 1, "type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        x, y, height = 0, y + 1, 0
        for spec in specs:
            if x + spec[3] > 24:
                x, y, height = 0, y + height, 0
            made.append(panel(len(made) + 1, spec, x, y))
            x, height = x + spec[3], max(height, HEIGHT[spec[1]])
        y += height
    return made


def variable(name: str, label: str, query: str) -> dict:
    return {"name": name, "label": label, "type": "query", "datasource": SOURCE, "query": {"query": query, "refId": name}, "definition": query,
            "refresh": 2, "sort": 1, "multi": True, "includeAll": True, "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}}


def dashboard() -> dict:
    return {
        "uid": "weir", "title": "weir", "tags": ["weir"], "schemaVersion": 38, "version": 1, "editable": True, "timezone": "browser",
        "refresh": "30s", "time": {"from": "now-1h", "to": "now"}, "graphTooltip": 1, "links": [], "annotations": {"list": []},
        "templating": {"list": [
            {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1, "current": {}},
            variable("namespace", "Namespace", "label_values(weir_panics_total, namespace)"),
            variable("job", "Job", 'label_values(weir_panics_total{namespace=~"$namespace"}, job)'),
            variable("instance", "Instance", 'label_values(weir_panics_total{namespace=~"$namespace",job=~"$job"}, instance)'),
        ]},
        "panels": panels(),
    }


if __name__ == "__main__":
    text = json.dumps(dashboard(), indent=1) + "\n"
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("weir.json")
    target.write_text(text)
