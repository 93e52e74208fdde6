#!/usr/bin/env python3
"""Measures weir beside nginx, HAProxy and Envoy, in one run on one machine.

Owns: the scenarios, the load, the reading of /proc, and the pages of results. Builds and installs nothing; `make bench` and
`make bench-shared` do. What each program is told stands in peers.py. Machines are noisy, so the peers take turns over several rounds, and what counts are the
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
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import peers
from peers import BODY, CONNECTIONS, HELD, Config, free_port

ROOT = Path(__file__).resolve().parent.parent
# What Envoy with its rate limit service costs beside Envoy alone, in CPU a request of all processes: Envoy 1.40 with Limitador on
# a Redis server, its limits exact, took 232 µs where Envoy alone took 79 in the same run, once. There is no package of Limitador's
# server, so each run scales its own Envoy.
WITH_SERVICE = 232 / 79
TICKS = os.sysconf("SC_CLK_TCK")
PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin"


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
    "redis-server": lambda config: [str(config)],
    "envoy": lambda config: ["-c", str(config), "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "error"],
}
SUFFIX = {"weir": ".yaml", "envoy": ".yaml", "nginx": ".conf", "haproxy": ".cfg", "redis-server": ".conf"}


def log_in(weir: str, process: "Process") -> str:
    """Starts a session; the header that carries it."""
    command = [weir, "session", "create", "ann", "--claim", "role=customer", "--address", f"127.0.0.1:{peers.beside(process.port, 'admin')}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return "Cookie: sid=" + json.loads(said)["token"]


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

    def __init__(self, path: str, name: str, config: Config, upstream: int, directory: Path, port: int | None = None):
        self.name, self.port, self.upstream = name, port or free_port(), upstream
        self.redis: Process | None = None  # that it shares its limits through
        self.audited = False
        self.headers: list[str] = []
        self.script: Path | None = None  # wrk's, of what it asks
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

    def metrics(self) -> str:
        """What a weir tells of itself."""
        with urllib.request.urlopen(f"http://127.0.0.1:{peers.beside(self.port, 'admin')}/metrics", timeout=5) as answer:
            return answer.read().decode()

    def redis_calls(self) -> int:
        """How often a weir has asked Redis so far, signs of life among them."""
        return sum(int(count) for count in re.findall(r"^weir_redis_calls_total\{.*\} (\d+)", self.metrics(), re.M))

    def until_stored(self) -> None:
        """Waits until no event of a weir's is on its way, and sees that none was dropped."""
        deadline, least = time.monotonic() + 60, time.monotonic() + 0.3  # a batch may still be packed
        while time.monotonic() < deadline:
            said = self.metrics()
            on_their_way = re.findall(r"^weir_audit_(?:queued|underway) (\d+)", said, re.M)
            if on_their_way and not any(map(int, on_their_way)) and time.monotonic() > least:
                dropped = int(re.search(r'^weir_audit_events_total\{result="dropped"\} (\d+)', said, re.M)[1])
                if dropped:
                    raise RuntimeError(f"{self.name} has dropped {dropped} events")
                return
            time.sleep(0.05)
        raise RuntimeError(f"{self.name} has events on their way after a minute:\n{self.said.read_text(errors='replace')}")

    def await_redis(self) -> None:
        """Waits until the limit is asked of Redis, not of what a weir alone does without."""
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            self.probe(200)
            if 'weir_limit_alone{limit="far"} 0' in self.metrics():
                return
            time.sleep(0.2)
        raise RuntimeError(f"{self.name} does not find its Redis:\n{self.said.read_text(errors='replace')}")

    def rss(self) -> float:
        """Resident KiB; what a master and its worker share counts once."""
        shared = private = 0
        for pid in tree(self.child.pid):
            sizes = dict(re.findall(r"^(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M))
            own = int(sizes["Private_Clean"]) + int(sizes["Private_Dirty"])
            private, shared = private + own, max(shared, int(sizes["Rss"]) - own)
        return private + shared

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


@contextmanager
def kept_connections(process: Process, at_once: int) -> Iterator[None]:
    """Sees that the proxy keeps its connections to the upstream: one that opens them anew would be measured by its configuration."""
    def accepted() -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{process.upstream}{peers.STATUS}", timeout=5) as answer:
            return int(answer.read().split()[7])

    before = accepted()
    yield
    opened = accepted() - before
    if opened > 2 * at_once:
        raise RuntimeError(f"{process.name} opened {opened} connections to the upstream for {at_once} requests at a time")


def load(process: Process, seconds: float, wrk: str, status: int, connections: int = CONNECTIONS) -> Figures:
    with kept_connections(process, connections):
        return unchecked_load(process, seconds, wrk, status, connections)


def unchecked_load(process: Process, seconds: float, wrk: str, status: int, connections: int) -> Figures:
    target = f"http://127.0.0.1:{process.port}/"
    before, redis_before = process.cpu(), process.redis.cpu() if process.redis else 0.0
    headers = [argument for header in process.headers for argument in ("-H", header)]
    script = ["-s", str(process.script)] if process.script else []
    command = [wrk, "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--latency", *script, *headers, target]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if process.audited:
        process.until_stored()
    cpu, redis_cpu = process.cpu() - before, process.redis.cpu() - redis_before if process.redis else 0.0
    requests = int(re.search(r"(\d+) requests in", said)[1])
    refused = int((re.search(r"Non-2xx or 3xx responses: (\d+)", said) or [0, 0])[1])
    other = refused if status == 200 else requests - refused
    if other > requests / 100 or "Socket errors" in said:
        raise RuntimeError(f"{process.name}: {other} of {requests} requests were not answered {status}:\n{said}")
    return {
        "cpu": cpu / requests * 1e6,
        "all": (cpu + redis_cpu) / requests * 1e6,
        "requests": requests,
        "rate": float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1]),
        "p50": milliseconds(re.search(r"^ +50% +(\S+)", said, re.M)[1]),
        "p99": milliseconds(re.search(r"^ +99% +(\S+)", said, re.M)[1]),
        "rss": process.rss() / 1024,
    }


def load_shared(process: Process, seconds: float, wrk: str) -> Figures:
    """Load as ever, then by one connection, whose requests wait for nothing but their own calls."""
    before = process.redis_calls() if process.redis else 0
    figures = load(process, seconds, wrk, 200)
    calls = process.redis_calls() - before if process.redis else 0
    alone = load(process, seconds, wrk, 200, connections=1)
    return {**figures, "calls": calls / figures["requests"] * 100, "one": alone["p50"] * 1000}


def ask(connection: socket.socket, request: bytes = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") -> None:
    connection.sendall(request)
    got = b""
    while BODY.encode() not in got:
        more = connection.recv(65536)
        if not more:
            raise RuntimeError("a connection was closed in place of an answer")
        got += more


def connect(process: Process) -> socket.socket:
    return socket.create_connection(("127.0.0.1", process.port), 5)


def hold(process: Process, connect: Callable[[Process], socket.socket] = connect, ask: Callable[[socket.socket], None] = ask,
         count: int = HELD) -> Figures:
    """Memory of idle keep-alive connections, each of which has done one request."""
    fresh = process.rss()
    held = []
    try:
        for _ in range(100):  # what a first request allocates is no connection's cost
            with connect(process) as first:
                ask(first)
        base = process.rss()
        for _ in range(count):
            held.append(connect(process))
            ask(held[-1])
        time.sleep(1)
        full = process.rss()
        for connection in held:
            connection.setblocking(False)
            try:
                raise RuntimeError(f"{process.name} closed an idle connection: {connection.recv(1)!r}")
            except (BlockingIOError, ssl.SSLWantReadError):
                pass  # open, and nothing to read
    finally:
        for connection in held:
            connection.close()
    return {"fresh": fresh / 1024, "connection": (full - base) / count}


# Scenarios.


@dataclass(frozen=True)
class Peer:
    program: str
    config: Config
    log_in: Callable[[str, "Process"], str] | None = None
    redis: bool = False  # whether it shares its limits through a Redis server of its own
    audited: bool = False
    script: str | None = None  # for wrk


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
    shared: bool = False
    bars: Callable[[list[dict[str, Figures]]], list[str]] | None = None  # what is held against what it may cost

    @property
    def columns(self) -> list[Column]:
        if self.shared:
            return [Column("cpu", "CPU µs a request", ratio=True), Column("all", "with its Redis, CPU µs", ratio=True),
                    Column("calls", "Redis calls per 100", 3), Column("rate", "requests/s", 0), Column("p50", "p50 ms", 2),
                    Column("p99", "p99 ms", 2), Column("one", "p50 µs, one connection", 0)]
        if self.idle:
            return [Column("fresh", "RSS before any load, MiB", ratio=True), Column("connection", "KiB a connection", 2, True)]
        return [Column("cpu", "CPU µs a request", ratio=True), Column("rate", "requests/s", 0, True), Column("p50", "p50 ms", 2),
                Column("p99", "p99 ms", 2, True), Column("rss", "RSS MiB")]


PLAIN = {
    "weir": Peer("weir", peers.weir_plain),
    "nginx": Peer("nginx", peers.nginx_proxy),
    "HAProxy": Peer("haproxy", peers.haproxy_plain),
    "Envoy": Peer("envoy", peers.envoy_plain),
}
REFUSAL = {
    "weir": Peer("weir", peers.weir_refusal),
    "nginx": Peer("nginx", peers.nginx_refusal),
    "HAProxy": Peer("haproxy", peers.haproxy_refusal),
    "Envoy": Peer("envoy", peers.envoy_refusal),
}
POLICIES = {
    "weir": Peer("weir", peers.weir_policies, log_in, audited=True),
    "weir, plain": Peer("weir", peers.weir_plain),
    "Envoy, plain": Peer("envoy", peers.envoy_plain),
}
SHARED = {
    "weir": Peer("weir", peers.weir_lease, redis=True),
    "weir, strict": Peer("weir", peers.weir_strict, redis=True),
    "weir, strict, 10,000 keys": Peer("weir", peers.weir_strict_many, redis=True, script=peers.MANY_CLIENTS),
    "weir, in memory": Peer("weir", peers.weir_in_memory),
    "Envoy, plain": Peer("envoy", peers.envoy_plain),
}


def cpu_bar(peer: str, most: float) -> Callable[[list[dict[str, Figures]]], list[str]]:
    def bar(rounds: list[dict[str, Figures]]) -> list[str]:
        ratio = statistics.median(figures["weir"]["cpu"] / figures[peer]["cpu"] for figures in rounds)
        met = "met" if ratio <= most else "**missed**"
        return [f"Aim: at most {most:g} × the CPU of {peer}; {ratio:.2f} ×, {met}.", ""]

    return bar


def shared_bars(rounds: list[dict[str, Figures]]) -> list[str]:
    def median(figure: Callable[[dict[str, Figures]], float]) -> float:
        return statistics.median(figure(figures) for figures in rounds)

    def service(figures: dict[str, Figures]) -> float:
        return figures["Envoy, plain"]["cpu"] * WITH_SERVICE

    def added(name: str) -> float:
        return median(lambda figures: figures[name]["one"] - figures["weir, in memory"]["one"])

    bars = [
        ("CPU of a request, lease ÷ in memory", median(lambda f: f["weir"]["cpu"] / f["weir, in memory"]["cpu"]), 1.1, ""),
        ("calls of Redis per 100 requests, lease", median(lambda f: f["weir"]["calls"]), 1, ""),
        ("weir + Redis ÷ Envoy + its service (estimated), lease", median(lambda f: f["weir"]["all"] / service(f)), 0.25, ""),
        ("weir + Redis ÷ Envoy + its service (estimated), strict", median(lambda f: f["weir, strict"]["all"] / service(f)), 0.25, ""),
        ("the same (estimated), 10,000 keys", median(lambda f: f["weir, strict, 10,000 keys"]["all"] / service(f)), 0.25, ""),
        ("added p50 at one connection, lease", added("weir"), 10, " µs"),
        ("added p50 at one connection, strict", added("weir, strict"), 150, " µs"),
    ]
    scaled = (f"Envoy with its rate limit service is an estimate, {median(service):.0f} µs of CPU a request: Envoy, plain × 232 ÷ 79. So many µs took"
              " Envoy 1.40 with Limitador, its limits exact on a Redis server, and Envoy alone, measured once on another machine; Limitador's server is not to"
              " be had here. Its `redis_cached`, as inexact as leases are, would cost less.")
    lines = [scaled, "", "| by the rounds' own ratios and differences | median | at most |  |", "|---|---:|---:|---|"]
    for what, value, most, unit in bars:
        lines.append(f"| {what} | {value:.3g}{unit} | {most:g}{unit} | {'met' if value <= most else '**missed**'} |")
    return [*lines, ""]


SCENARIOS = {
    "plain": Scenario("A plain proxy: GET, a 1 KiB body, keep-alive on both sides.", PLAIN, bars=cpu_bar("Envoy", 0.4)),
    "refusal": Scenario(
        "Nearly every request is refused with 429: one a second is allowed by client address (Envoy: in all).", REFUSAL, 429),
    "policies": Scenario("weir with two limits, a session, a breaker and the audit to SQLite on the path, beside weir and Envoy with nothing.", POLICIES,
                         bars=cpu_bar("Envoy, plain", 0.5)),
    "idle": Scenario(
        f"{HELD} keep-alive connections held idle, each having done one request. nginx allocates a part of each ahead,"
        " by `worker_connections`, which is in its RSS before any load.", PLAIN, idle=True),
    "shared": Scenario(
        "weir with one limit by client address that refuses no one, shared through Redis by leases, or asked of it for each request"
        " (strict), or kept in memory; each with a Redis server of its own. Envoy has no limit. All load has one address, a hot key, unless it names 10,000 clients in turn.",
        SHARED, shared=True, bars=shared_bars),
}
# Each page's scenarios, by what `make` calls it.
PAGES = {
    "RESULTS.md": ("bench", ["plain", "refusal", "policies", "idle"]),
    "SHARED.md": ("bench-shared", ["shared"]),
}


def mistake(weir: str, config: Config, directory: Path) -> str | None:
    """The first thing that `weir check` has against a configuration."""
    file = directory / "check.yaml"
    file.write_text(config(1, 2, directory))
    checked = subprocess.run([weir, "check", "-c", str(file)], capture_output=True, text=True)
    lines = checked.stderr.strip().splitlines()
    return None if checked.returncode == 0 else lines[min(1, len(lines) - 1)].strip()


def in_turn(names: Iterable[str], number: int) -> list[str]:
    """The names in the order of this round: nobody always goes first."""
    names = [*names]
    shift = number % len(names)
    return names[shift:] + names[:shift]


def show(number: int, name: str, figures: Figures) -> None:
    shown = "  ".join(f"{key} {value:.2f}" for key, value in figures.items())
    print(f"  round {number + 1}  {name:34} {shown}", file=sys.stderr, flush=True)


def run(scenario: Scenario, options: argparse.Namespace, paths: dict[str, str], directory: Path) -> list[str]:
    """Runs a scenario and gives its text for the results."""
    said, chosen = [scenario.what, ""], dict(scenario.peers)
    for name, peer in scenario.peers.items():
        if peer.program == "weir" and (why := mistake(paths["weir"], peer.config, directory)):
            del chosen[name]
            said += [f"**{name} is skipped:** this weir does not take the configuration yet (`{why}`).", ""]
    if "weir" not in chosen and all(peer.program == "weir" for peer in chosen.values()):
        return said
    rounds: list[dict[str, Figures]] = [{} for _ in range(options.rounds)]
    with ExitStack() as stack:
        upstream = stack.enter_context(Process(paths["nginx"], "nginx", peers.nginx_upstream, 0, directory / "upstream")).port

        def start(name: str, peer: Peer, place: str) -> Process:
            port, redis = free_port(), None
            if peer.redis:
                beside = peers.beside(port, "redis")
                process = Process(paths["redis-server"], "redis-server", peers.redis, 0, directory / f"{name}-redis", beside)
                redis = stack.enter_context(process)
            process = Process(paths[peer.program], peer.program, peer.config, upstream, directory / f"{name}-{place}", port)
            process.redis, process.audited = redis, peer.audited
            if peer.script:
                process.script = directory / f"{name}.lua"
                process.script.write_text(peer.script)
            return process

        running = {}
        if not scenario.idle:
            for name, peer in chosen.items():
                running[name] = stack.enter_context(start(name, peer, "load"))
                if peer.log_in:
                    running[name].headers = [peer.log_in(paths[peer.program], running[name])]
                if peer.redis:
                    running[name].await_redis()
                running[name].probe(scenario.status)
                load(running[name], 1, paths["wrk"], scenario.status)  # to warm up
        for number, figures in enumerate(rounds):
            for name in in_turn(chosen, number):
                if scenario.idle:
                    with start(name, chosen[name], str(number)) as process:
                        figures[name] = hold(process)
                elif scenario.shared:
                    figures[name] = load_shared(running[name], options.seconds, paths["wrk"])
                else:
                    figures[name] = load(running[name], options.seconds, paths["wrk"], scenario.status)
                show(number, name, figures[name])
    said += table(scenario.columns, [*chosen], rounds)
    return said + (scenario.bars(rounds) if scenario.bars and len(chosen) == len(scenario.peers) else [])


def table(columns: list[Column], names: list[str], rounds: list[dict[str, Figures]]) -> list[str]:
    """Medians, the least CPU in brackets, and the medians of the rounds' ratios of weir to each peer."""
    ratios = [column for column in columns if column.ratio and "weir" in names]
    titles = ["", *(c.title for c in columns), *(f"weir ÷ it: {c.title.split(',')[0]}" for c in ratios)]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for name in names:
        cells = [name]
        for column in columns:
            values = [figures[name][column.key] for figures in rounds]
            least = f" ({min(values):.{column.digits}f})" if column.key in ("cpu", "lane") else ""
            cells.append(f"{statistics.median(values):.{column.digits}f}{least}")
        for column in ratios:
            each = [figures["weir"][column.key] / figures[name][column.key] for figures in rounds if figures[name][column.key]]
            cells.append("–" if name == "weir" or not each else f"{statistics.median(each):.2f} ×")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def versions(paths: dict[str, str], connections: int = CONNECTIONS) -> list[str]:
    def first(pattern: str, *command: str) -> str:
        ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        found = re.search(pattern, ran.stdout + ran.stderr)
        return found[1] if found else "unknown"

    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    weir, commit = first(r"weir (\S+)", paths["weir"], "--version"), first(r"(\w+)", "git", "rev-parse", "--short", "HEAD")
    since = ["git", "status", "--porcelain", "-uno", "--", ".", ":!benches/*.md"]
    changed = ", changed since" if subprocess.run(since, capture_output=True, text=True, cwd=ROOT).stdout else ""
    return [
        f"- weir {weir} at `{commit}`{changed}, " + first(r"(rustc \S+)", "rustc", "-V"),
        "- nginx " + first(r"nginx/(\S+)", paths["nginx"], "-v") + ", also as the upstream",
        *(["- HAProxy " + first(r"version (\S+)", paths["haproxy"], "-v")] if "haproxy" in paths else []),
        *(["- Envoy " + first(r"/(\d+\.\d+\.\d+[^/]*)/", paths["envoy"], "--version")] if "envoy" in paths else []),
        *(["- Redis " + first(r"v=(\S+)", paths["redis-server"], "--version")] if "redis-server" in paths else []),
        "- wrk " + first(r"wrk (?:debian/)?(\S+)", paths["wrk"], "-v") + f", `-t1 -c{connections}`",
        f"- Python {platform.python_version()}, Linux {platform.release()}, {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores",
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure weir beside nginx, HAProxy and Envoy.")
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("BENCH_ROUNDS", 5)), help="or BENCH_ROUNDS [%(default)s]")
    parser.add_argument("--seconds", type=int, default=int(os.environ.get("BENCH_SECONDS", 3)), help="or BENCH_SECONDS [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 1 s")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--page", choices=PAGES, default="RESULTS.md", help="which results to make [%(default)s]")
    parser.add_argument("--weir", type=Path, default=ROOT / "target/release/weir", help="another build of weir")
    options = parser.parse_args()
    # Only a whole run of this tree's weir replaces the results that are kept.
    options.keep = not (options.quick or options.only or options.weir != parser.get_default("weir"))
    if options.quick:
        options.rounds, options.seconds = 2, 1
    return options


def main() -> None:
    options = arguments()
    target, scenarios = PAGES[options.page]
    programs = ["weir", "nginx", "haproxy", "envoy", "wrk"] + (["redis-server"] if "shared" in (options.only or scenarios) else [])
    paths = {name: program(name, options.weir) for name in programs}
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4 * HELD:  # HAProxy asks for two a connection
        sys.exit(f"at least {4 * HELD} open files are needed; the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * HELD, hard))
    os.environ["WEIR_LOG"] = "warn"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the children are ended too
    page = [] if options.page == "RESULTS.md" else ["--page", options.page]
    command = " ".join(["python3 benches/bench.py", *page, f"--rounds {options.rounds} --seconds {options.seconds}"])
    said = ["# Results", "", f"`make {target}` wrote this, by `{command}`:",
            "medians of the rounds, the least CPU in brackets; a ratio is the median of the rounds' own ratios. One worker each, all on",
            "loopback, peers in turn. Compare ratios, not figures, between machines.", "", *versions(paths), ""]
    print("\n".join(said))
    for name in options.only or scenarios:
        print(f"## {name}", flush=True)
        with tempfile.TemporaryDirectory(prefix="weir-bench-") as directory:
            text = run(SCENARIOS[name], options, paths, Path(directory))
        print("\n" + "\n".join(text), flush=True)
        said += [f"## {name}", "", *text]
    if options.keep:
        (ROOT / "benches" / options.page).write_text("\n".join(said).rstrip() + "\n")


if __name__ == "__main__":
    main()
