#!/usr/bin/env python3
"""Measures weir beside nginx, HAProxy and Envoy, in one run on one machine.

Owns: the peers' configurations, the scenarios, the load, the reading of /proc, and benches/RESULTS.md. Builds and installs
nothing; `make bench` does. Machines are noisy, so the peers take turns over several rounds, and what counts are the
ratios: each is the median of the rounds' own ratios. CPU a request (utime + stime of the proxy's processes over the
requests done) is the figure to steer by; requests/s and latencies also hold what the load and the upstream take.

To add a scenario, add an entry to SCENARIOS: peers as a name, a program and a function that writes its configuration.
A configuration that this weir's `weir check` refuses is skipped, and the results say so.
"""

import argparse
import http.client
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "RESULTS.md"
BODY = "x" * 1024
CONNECTIONS = 64  # of the load generator
HELD = 5000  # idle connections
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin"


# Configurations: each a function of the port to listen on, the upstream's port and a directory for files.

Config = Callable[[int, int, Path], str]


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
admin: {{address: "127.0.0.1:{admin_port(port)}"}}
"""


def admin_port(port: int) -> int:
    """Another free port, the same one whenever it is asked for."""
    if port not in ADMIN_PORTS:
        ADMIN_PORTS[port] = free_port()
    return ADMIN_PORTS[port]


ADMIN_PORTS: dict[int, int] = {}


def log_in(weir: str, process: "Process") -> str:
    """Starts a session; the header that carries it."""
    command = [weir, "session", "create", "ann", "--claim", "role=customer", "--address", f"127.0.0.1:{admin_port(process.port)}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "Cookie: sid=" + json.loads(said)["token"]


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
    return nginx(directory, f'server {{ listen 127.0.0.1:{port}; location / {{ return 200 "{BODY}"; }} }}')


def nginx_proxy(port: int, upstream: int, directory: Path, zone: str = "", limit: str = "") -> str:
    return nginx(directory, f"""{zone}
  upstream app {{ server 127.0.0.1:{upstream}; keepalive {CONNECTIONS}; keepalive_requests 100000000; }}
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


# Programs and processes.


def program(name: str, weir: Path) -> str:
    if name == "weir":
        found = str(weir) if weir.exists() else None
    elif name == "envoy":
        found = next((str(p) for p in ROOT.glob("target/bench-venv/lib/*/site-packages/envoy/_bin/envoy")), None)
    else:
        found = shutil.which(name, path=PATH)
    return found or sys.exit(f"{name} is not there; `make bench` builds and installs what a run needs")


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "weir": lambda config: ["run", "-c", str(config)],
    "nginx": lambda config: ["-p", str(config.parent), "-e", str(config.parent / "error.log"), "-c", str(config)],
    "haproxy": lambda config: ["-db", "-f", str(config)],
    "envoy": lambda config: ["-c", str(config), "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "error"],
}
SUFFIX = {"weir": ".yaml", "envoy": ".yaml", "nginx": ".conf", "haproxy": ".cfg"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on: state, parent, … (the name before them may hold anything)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(stat(int(entry.name))[1])
            except (FileNotFoundError, ProcessLookupError):
                pass  # it has ended since
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found


class Process:
    """A program as a child of this process, on a port of its own, ended when the `with` block is left."""

    def __init__(self, path: str, name: str, config: Config, upstream: int, directory: Path):
        self.name, self.port = name, free_port()
        self.headers: list[str] = []
        directory.mkdir()
        file = directory / f"config{SUFFIX[name]}"
        file.write_text(config(self.port, upstream, directory))
        self.said = directory / "said"
        with self.said.open("wb") as said:
            self.child = subprocess.Popen([path, *COMMANDS[name](file)], stdout=said, stderr=said)

    def __enter__(self) -> "Process":
        try:
            self.await_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def await_ready(self) -> None:
        deadline = time.monotonic() + 15
        while self.child.poll() is None and time.monotonic() < deadline:
            try:
                return socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"{self.name} did not start:\n{self.said.read_text(errors='replace')}")

    def end(self) -> None:
        if self.child.poll() is not None:
            return
        ours = tree(self.child.pid)
        self.child.terminate()
        try:
            self.child.wait(5)
        except subprocess.TimeoutExpired:
            for pid in ours:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.child.wait()

    def cpu(self) -> float:
        """Seconds of CPU, user and system, so far."""
        return sum(int(ticks) for pid in tree(self.child.pid) for ticks in stat(pid)[11:13]) / TICKS

    def rss(self) -> float:
        """Resident KiB. Pages that a master and its worker share count twice."""
        pids = tree(self.child.pid)
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * PAGE / 1024

    def probe(self, status: int) -> None:
        """Checks that the last of some requests is answered as the scenario wants, on a connection that stays open."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        for _ in range(5):
            client.request("GET", "/", headers=dict(header.split(": ", 1) for header in self.headers))
            answer = client.getresponse()
            body = answer.read()
        client.close()
        wrong = answer.status != status or answer.will_close or (status == 200 and body != BODY.encode())
        if wrong:
            raise RuntimeError(f"{self.name} answered {answer.status}, {len(body)} bytes, closing: {answer.will_close}")


# Measurements: each gives one round's figures of one peer, by key.

Figures = dict[str, float]


def milliseconds(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text).groups()
    return float(number) * {"us": 0.001, "ms": 1, "s": 1000, "m": 60000}[unit]


def load(process: Process, seconds: float, wrk: str, status: int) -> Figures:
    target = f"http://127.0.0.1:{process.port}/"
    before = process.cpu()
    headers = [argument for header in process.headers for argument in ("-H", header)]
    command = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{seconds:.0f}s", "--latency", *headers, target]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cpu = process.cpu() - before
    requests = int(re.search(r"(\d+) requests in", said)[1])
    refused = int((re.search(r"Non-2xx or 3xx responses: (\d+)", said) or [0, 0])[1])
    other = refused if status == 200 else requests - refused
    if other > requests / 100 or "Socket errors" in said:
        raise RuntimeError(f"{process.name}: {other} of {requests} requests were not answered {status}:\n{said}")
    return {
        "cpu": cpu / requests * 1e6,
        "rate": float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1]),
        "p50": milliseconds(re.search(r"^ +50% +(\S+)", said, re.M)[1]),
        "p99": milliseconds(re.search(r"^ +99% +(\S+)", said, re.M)[1]),
        "rss": process.rss() / 1024,
    }


def ask(connection: socket.socket) -> None:
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    got = b""
    while BODY.encode() not in got:
        more = connection.recv(65536)
        if not more:
            raise RuntimeError("a connection was closed in place of an answer")
        got += more


def hold(process: Process) -> Figures:
    """Memory of idle keep-alive connections, each of which has done one request."""
    fresh = process.rss()
    held = []
    try:
        with socket.create_connection(("127.0.0.1", process.port), 5) as first:
            for _ in range(100):  # what a first request allocates is no connection's cost
                ask(first)
        base = process.rss()
        for _ in range(HELD):
            held.append(socket.create_connection(("127.0.0.1", process.port), 5))
            ask(held[-1])
        time.sleep(1)
        full = process.rss()
        for connection in held:
            connection.setblocking(False)
            try:
                raise RuntimeError(f"{process.name} closed an idle connection: {connection.recv(1)!r}")
            except BlockingIOError:
                pass  # open, and nothing to read
    finally:
        for connection in held:
            connection.close()
    return {"fresh": fresh / 1024, "connection": (full - base) / HELD}


# Scenarios.


@dataclass(frozen=True)
class Peer:
    program: str
    config: Config
    log_in: Callable[[str, "Process"], str] | None = None


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    digits: int = 1
    ratio: bool = False  # whether weir's ratio to each peer is worth a column


@dataclass(frozen=True)
class Scenario:
    what: str
    peers: dict[str, Peer]  # the one named "weir" is held against the others
    status: int = 200
    idle: bool = False

    @property
    def columns(self) -> list[Column]:
        if self.idle:
            return [Column("fresh", "RSS before any load, MiB", ratio=True), Column("connection", "KiB a connection", 2, True)]
        return [Column("cpu", "CPU µs a request", ratio=True), Column("rate", "requests/s", 0, True), Column("p50", "p50 ms", 2),
                Column("p99", "p99 ms", 2, True), Column("rss", "RSS MiB")]


PLAIN = {
    "weir": Peer("weir", weir_plain),
    "nginx": Peer("nginx", nginx_proxy),
    "HAProxy": Peer("haproxy", haproxy_plain),
    "Envoy": Peer("envoy", envoy_plain),
}
REFUSAL = {
    "weir": Peer("weir", weir_refusal),
    "nginx": Peer("nginx", nginx_refusal),
    "HAProxy": Peer("haproxy", haproxy_refusal),
    "Envoy": Peer("envoy", envoy_refusal),
}
POLICIES = {
    "weir": Peer("weir", weir_policies, log_in),
    "weir, plain": Peer("weir", weir_plain),
    "Envoy, plain": Peer("envoy", envoy_plain),
}
SCENARIOS = {
    "plain": Scenario("A plain proxy: GET, a 1 KiB body, keep-alive on both sides.", PLAIN),
    "refusal": Scenario(
        "Nearly every request is refused with 429: one a second is allowed by client address (Envoy: in all).", REFUSAL, 429),
    "policies": Scenario("weir with two limits, a session, a breaker and the audit to SQLite on the path, beside weir and Envoy with nothing.", POLICIES),
    "idle": Scenario(
        f"{HELD} keep-alive connections held idle, each having done one request. nginx allocates a part of each ahead,"
        " by `worker_connections`, which is in its RSS before any load.", PLAIN, idle=True),
}


def mistake(weir: str, config: Config, directory: Path) -> str | None:
    """The first thing that `weir check` has against a configuration."""
    file = directory / "check.yaml"
    file.write_text(config(1, 2, directory))
    checked = subprocess.run([weir, "check", "-c", str(file)], capture_output=True, text=True)
    lines = checked.stderr.strip().splitlines()
    return None if checked.returncode == 0 else lines[min(1, len(lines) - 1)].strip()


def run(scenario: Scenario, options: argparse.Namespace, paths: dict[str, str], directory: Path) -> list[str]:
    """Runs a scenario and gives its text for the results."""
    said, peers = [scenario.what, ""], dict(scenario.peers)
    for name, peer in scenario.peers.items():
        if peer.program == "weir" and (why := mistake(paths["weir"], peer.config, directory)):
            del peers[name]
            said += [f"**{name} is skipped:** this weir does not take the configuration yet (`{why}`).", ""]
    if "weir" not in peers and all(peer.program == "weir" for peer in peers.values()):
        return said
    rounds: list[dict[str, Figures]] = [{} for _ in range(options.rounds)]
    with ExitStack() as stack:
        upstream = stack.enter_context(Process(paths["nginx"], "nginx", nginx_upstream, 0, directory / "upstream")).port

        def start(name: str, peer: Peer, place: str) -> Process:
            return Process(paths[peer.program], peer.program, peer.config, upstream, directory / f"{name}-{place}")

        running = {}
        if not scenario.idle:
            for name, peer in peers.items():
                running[name] = stack.enter_context(start(name, peer, "load"))
                if peer.log_in:
                    running[name].headers = [peer.log_in(paths[peer.program], running[name])]
                running[name].probe(scenario.status)
                load(running[name], 1, paths["wrk"], scenario.status)  # to warm up
        for number, figures in enumerate(rounds):
            shift = number % len(peers)  # nobody always goes first
            for name in [*peers][shift:] + [*peers][:shift]:
                if scenario.idle:
                    with start(name, peers[name], str(number)) as process:
                        figures[name] = hold(process)
                else:
                    figures[name] = load(running[name], options.seconds, paths["wrk"], scenario.status)
                shown = "  ".join(f"{key} {value:.2f}" for key, value in figures[name].items())
                print(f"  round {number + 1}  {name:12} {shown}", file=sys.stderr, flush=True)
    return said + table(scenario.columns, [*peers], rounds)


def table(columns: list[Column], names: list[str], rounds: list[dict[str, Figures]]) -> list[str]:
    """Medians, the least CPU in brackets, and the medians of the rounds' ratios of weir to each peer."""
    ratios = [column for column in columns if column.ratio and "weir" in names]
    titles = ["", *(c.title for c in columns), *(f"weir ÷ it: {c.title.split(',')[0]}" for c in ratios)]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for name in names:
        cells = [name]
        for column in columns:
            values = [figures[name][column.key] for figures in rounds]
            least = f" ({min(values):.{column.digits}f})" if column.key == "cpu" else ""
            cells.append(f"{statistics.median(values):.{column.digits}f}{least}")
        for column in ratios:
            each = [figures["weir"][column.key] / figures[name][column.key] for figures in rounds if figures[name][column.key]]
            cells.append("–" if name == "weir" or not each else f"{statistics.median(each):.2f} ×")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def versions(paths: dict[str, str]) -> list[str]:
    def first(pattern: str, *command: str) -> str:
        ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        found = re.search(pattern, ran.stdout + ran.stderr)
        return found[1] if found else "unknown"

    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    weir, commit = first(r"weir (\S+)", paths["weir"], "--version"), first(r"(\w+)", "git", "rev-parse", "--short", "HEAD")
    return [
        f"- weir {weir} at `{commit}`, " + first(r"(rustc \S+)", "rustc", "-V"),
        "- nginx " + first(r"nginx/(\S+)", paths["nginx"], "-v") + ", also as the upstream",
        "- HAProxy " + first(r"version (\S+)", paths["haproxy"], "-v"),
        "- Envoy " + first(r"/(\d+\.\d+\.\d+[^/]*)/", paths["envoy"], "--version"),
        "- wrk " + first(r"wrk (?:debian/)?(\S+)", paths["wrk"], "-v") + f", `-t1 -c{CONNECTIONS}`",
        f"- Python {platform.python_version()}, Linux {platform.release()}, {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores",
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure weir beside nginx, HAProxy and Envoy.")
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("BENCH_ROUNDS", 5)), help="or BENCH_ROUNDS [%(default)s]")
    parser.add_argument("--seconds", type=int, default=int(os.environ.get("BENCH_SECONDS", 3)), help="or BENCH_SECONDS [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 1 s")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--weir", type=Path, default=ROOT / "target/release/weir", help="another build of weir")
    options = parser.parse_args()
    # Only a whole run of this tree's weir replaces the results that are kept.
    options.keep = not (options.quick or options.only or options.weir != parser.get_default("weir"))
    if options.quick:
        options.rounds, options.seconds = 2, 1
    return options


def main() -> None:
    options = arguments()
    paths = {name: program(name, options.weir) for name in ("weir", "nginx", "haproxy", "envoy", "wrk")}
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4 * HELD:  # HAProxy asks for two a connection
        sys.exit(f"at least {4 * HELD} open files are needed; the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * HELD, hard))
    os.environ["WEIR_LOG"] = "warn"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the children are ended too
    command = f"python3 benches/bench.py --rounds {options.rounds} --seconds {options.seconds}"
    said = ["# Results", "", f"`make bench` wrote this, by `{command}`: medians of the rounds, the least CPU in brackets; a ratio is",
            "the median of the rounds' own ratios. One worker each, all on loopback, peers in turn. Compare ratios, not figures, between",
            "machines.", "", *versions(paths), ""]
    print("\n".join(said))
    for name in options.only or SCENARIOS:
        print(f"## {name}", flush=True)
        with tempfile.TemporaryDirectory(prefix="weir-bench-") as directory:
            text = run(SCENARIOS[name], options, paths, Path(directory))
        print("\n" + "\n".join(text), flush=True)
        said += [f"## {name}", "", *text]
    if options.keep:
        RESULTS.write_text("\n".join(said).rstrip() + "\n")


if __name__ == "__main__":
    main()
