"""What weir and its peers are told: a configuration for each program and scenario.

Each is a function of the port to listen on, the upstream's port and a directory for files. What stands beside a program
on a port of its own, as its admin port or its Redis, has the port that `beside` gives.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path

BODY = "x" * 1024
STATUS = "/status"  # of the upstream: how many connections it has accepted
CONNECTIONS = 64  # of the load generator
HELD = 5000  # idle connections

Config = Callable[[int, int, Path], str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def beside(port: int, what: str) -> int:
    """Another free port, the same one whenever it is asked for."""
    if (port, what) not in BESIDE:
        BESIDE[port, what] = free_port()
    return BESIDE[port, what]


BESIDE: dict[tuple[int, str], int] = {}


def weir_plain(port: int, upstream: int, _: Path) -> str:
    return f"""\
listen: 127.0.0.1:{port}
upstream: http://127.0.0.1:{upstream}
runtime: {{lanes: 1}}
admin: {{address: "127.0.0.1:0"}}
"""


def weir_refusal(port: int, upstream: int, _: Path) -> str:
    return f"""\
version: 1
listeners: [{{name: inbound, address: "127.0.0.1:{port}"}}]
upstreams:
  app: {{endpoints: ["http://127.0.0.1:{upstream}"]}}
rate_limits:
  flood: {{limit: 1/s, by: client.ip}}
routes: [{{upstream: app, rate_limits: [flood]}}]
runtime: {{lanes: 1}}
admin: {{address: "127.0.0.1:0"}}
"""


def weir_policies(port: int, upstream: int, directory: Path) -> str:
    """Every policy on the path, none of which refuses: limits by address and by user, a session, a breaker and the audit."""
    return f"""\
version: 1
listeners: [{{name: inbound, address: "127.0.0.1:{port}"}}]
upstreams:
  app: {{endpoints: ["http://127.0.0.1:{upstream}"], circuit_breaker: standard}}
circuit_breakers:
  standard: {{window: {{type: time, size: 10s}}, minimum_calls: 20, failure_rate: 50%}}
rate_limits:
  per_client: {{limit: 1000000/s, by: client.ip}}
  per_user: {{limit: 1000000/s, by: session.user}}
sessions:
  web: {{}}
routes: [{{upstream: app, session: {{use: web}}, rate_limits: [per_client, per_user]}}]
audit: {{sqlite: {{path: "{directory}/audit.db"}}}}
runtime: {{lanes: 1}}
admin: {{address: "127.0.0.1:{beside(port, "admin")}"}}
"""


def weir_in_memory(port: int, upstream: int, _: Path) -> str:
    """A limit that refuses no one, kept by this process alone."""
    return f"""\
version: 1
listeners: [{{name: inbound, address: "127.0.0.1:{port}"}}]
upstreams:
  app: {{endpoints: ["http://127.0.0.1:{upstream}"]}}
rate_limits:
  far: {{limit: 1000000/s, by: client.ip}}
routes: [{{upstream: app, rate_limits: [far]}}]
runtime: {{lanes: 1}}
admin: {{address: "127.0.0.1:{beside(port, "admin")}"}}
"""


def weir_lease(port: int, upstream: int, directory: Path) -> str:
    """The same limit, kept in Redis for all processes."""
    return weir_in_memory(port, upstream, directory) + f'redis: {{urls: "redis://127.0.0.1:{beside(port, "redis")}"}}\n'


def weir_strict(port: int, upstream: int, directory: Path) -> str:
    """The same limit, each request asked of Redis."""
    return weir_lease(port, upstream, directory).replace("by: client.ip", "by: client.ip, accuracy: strict")


def weir_strict_many(port: int, upstream: int, directory: Path) -> str:
    """As `weir_strict`, by a field that names another client each time."""
    return weir_strict(port, upstream, directory).replace("client.ip", "header:x-client")


# Lua for wrk: each request is of another of 10,000 clients, in turn.
MANY_CLIENTS = """\
local client = 0
request = function()
  client = (client + 1) % 10000
  return wrk.format("GET", "/", { ["X-Client"] = "client-" .. client })
end
"""


def redis(port: int, _: int, directory: Path) -> str:
    return f"port {port}\nbind 127.0.0.1\ndir \"{directory}\"\nsave \"\"\nappendonly no\n"


def nginx(directory: Path, http: str) -> str:
    user = "user root root;" if os.geteuid() == 0 else ""  # a worker of another user could not write to the directory
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)
    # Refusals are logged as errors; no other peer logs them.
    return f"""\
{user}
daemon off;
worker_processes 1;
pid {directory}/pid;
error_log {directory}/error.log crit;
events {{ worker_connections {HELD + 1000}; }}
http {{
  access_log off;
  keepalive_requests 100000000;
  {temporary}
  {http}
}}
"""


def nginx_upstream(port: int, _: int, directory: Path) -> str:
    return nginx(directory, f'server {{ listen 127.0.0.1:{port}; location / {{ return 200 "{BODY}"; }} location = {STATUS} {{ stub_status; }} }}')


def nginx_proxy(port: int, upstream: int, directory: Path, zone: str = "", limit: str = "") -> str:
    return nginx(directory, f"""{zone}
  upstream app {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ {limit} proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; }}
  }}""")


def nginx_refusal(port: int, upstream: int, directory: Path) -> str:
    zone = "limit_req_zone $binary_remote_addr zone=flood:1m rate=1r/s;"
    return nginx_proxy(port, upstream, directory, zone, "limit_req zone=flood; limit_req_status 429;")


def haproxy_plain(port: int, upstream: int, _: Path, limit: str = "") -> str:
    return f"""\
global
  nbthread 1
  maxconn {HELD + 1000}
defaults
  mode http
  timeout connect 1s
  timeout client 60s
  timeout server 15s
  option forwardfor
  http-reuse always
frontend inbound
  bind 127.0.0.1:{port}
{limit}  default_backend app
backend app
  server app 127.0.0.1:{upstream}
"""


def haproxy_refusal(port: int, upstream: int, directory: Path) -> str:
    limit = """\
  stick-table type ip size 100k expire 10s store http_req_rate(1s)
  http-request track-sc0 src
  http-request deny status 429 if { sc_http_req_rate(0) gt 1 }
"""
    return haproxy_plain(port, upstream, directory, limit)


def envoy_plain(port: int, upstream: int, _: Path, limit: str = "") -> str:
    return f"""\
static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: inbound
          route_config:
            virtual_hosts: [{{name: all, domains: ["*"], routes: [{{match: {{prefix: "/"}}, route: {{cluster: app}}}}]}}]
          http_filters:
{limit}          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: app
    connect_timeout: 1s
    load_assignment:
      cluster_name: app
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {upstream}}}}}}}
"""


def envoy_refusal(port: int, upstream: int, directory: Path) -> str:
    limit = """\
          - name: envoy.filters.http.local_ratelimit
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit
              stat_prefix: flood
              token_bucket: {max_tokens: 1, tokens_per_fill: 1, fill_interval: 1s}
              filter_enabled: {default_value: {numerator: 100}}
              filter_enforced: {default_value: {numerator: 100}}
"""
    return envoy_plain(port, upstream, directory, limit)
