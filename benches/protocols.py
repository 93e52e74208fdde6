#!/usr/bin/env python3
"""Measures weir's other protocols beside its peers': HTTP/2 without TLS, TLS, handshakes, bodies of a gibibyte; and connections at rest.

`make bench-protocols` calls it and keeps what it says as PROTOCOLS.md. Programs, /proc and the plain configurations are
bench.py's and peers.py's; this owns what differs by protocol. As there, CPU of the proxy's process is the figure to steer by.
"""

import argparse
import os
import re
import resource
import socket
import ssl
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import bench
import peers
from bench import Figures, Process

GIB = 1 << 30
HELD = 10_000  # idle connections


# What each is told.


def certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate by ECDSA P-256 and its key, made once for all: the cost of a handshake depends on its kind."""
    shared = directory.parent
    cert, key = shared / "cert.pem", shared / "key.pem"
    if not cert.exists():
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", key, "-out", cert],
            check=True, capture_output=True)
        (shared / "both.pem").write_text(cert.read_text() + key.read_text())
    return cert, key


def weir(port: int, upstream: int, listener: str = "") -> str:
    return f"""\
version: 1
listeners: [{{name: inbound, address: "127.0.0.1:{port}", limits: {{max_body: 2GiB}}{listener}}}]
upstreams: {{app: {{endpoints: ["http://127.0.0.1:{upstream}"]}}}}
routes: [{{upstream: app}}]
runtime: {{lanes: 1}}
admin: {{address: "127.0.0.1:0"}}
"""


def weir_plain(port: int, upstream: int, _: Path) -> str:
    return weir(port, upstream)


def weir_tls(port: int, upstream: int, directory: Path) -> str:
    cert, key = certificate(directory)
    return weir(port, upstream, f', tls: {{certificates: [{{cert: "{cert}", key: "{key}"}}]}}')


def nginx_tls(port: int, upstream: int, directory: Path) -> str:
    cert, key = certificate(directory)
    plain = peers.nginx_proxy(port, upstream, directory)
    return plain.replace(f"listen 127.0.0.1:{port};", f"listen 127.0.0.1:{port} ssl; ssl_certificate {cert}; ssl_certificate_key {key}; ssl_protocols TLSv1.3;")


def nginx_h2c(port: int, upstream: int, directory: Path) -> str:
    plain = peers.nginx_proxy(port, upstream, directory)
    return plain.replace(f"listen 127.0.0.1:{port};", f"listen 127.0.0.1:{port} http2;")


def haproxy_tls(port: int, upstream: int, directory: Path) -> str:
    certificate(directory)
    plain = peers.haproxy_plain(port, upstream, directory)
    return plain.replace(f"bind 127.0.0.1:{port}", f"bind 127.0.0.1:{port} ssl crt {directory.parent}/both.pem ssl-min-ver TLSv1.3")


def haproxy_h2c(port: int, upstream: int, directory: Path) -> str:
    plain = peers.haproxy_plain(port, upstream, directory)
    return plain.replace(f"bind 127.0.0.1:{port}", f"bind 127.0.0.1:{port} proto h2")


def envoy_tls(port: int, upstream: int, directory: Path) -> str:
    cert, key = certificate(directory)
    transport = f"""\
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}
            tls_certificates: [{{certificate_chain: {{filename: "{cert}"}}, private_key: {{filename: "{key}"}}}}]
      filters:
"""
    return peers.envoy_plain(port, upstream, directory).replace("    - filters:\n", transport)


class Bodies(BaseHTTPRequestHandler):
    """An upstream that gives a gibibyte of zeros and takes what it is sent."""

    protocol_version = "HTTP/1.1"
    zeros: Path

    def do_GET(self) -> None:
        self.answer(GIB)
        with self.zeros.open("rb") as file:
            self.connection.sendfile(file)

    def do_PUT(self) -> None:
        left, buffer = int(self.headers["Content-Length"]), memoryview(bytearray(1 << 20))
        while left:
            left -= self.rfile.readinto(buffer[:left])
        self.answer(0)

    def answer(self, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def bodies_upstream(directory: Path) -> Iterator[int]:
    Bodies.zeros = directory / "zeros"
    with Bodies.zeros.open("wb") as file:
        file.truncate(GIB)
    with ThreadingHTTPServer(("127.0.0.1", 0), Bodies) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


# Loads: each gives one round's figures of one peer.


def by_h2load(process: Process, seconds: int) -> Figures:
    before = process.cpu()
    command = ["h2load", "-t1", "-c16", "-m8", "-D", str(seconds), f"http://127.0.0.1:{process.port}/"]
    with bench.kept_connections(process, 16 * 8):
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cpu = process.cpu() - before
    done = int(re.search(r"(\d+) succeeded", said)[1])
    failed = int(re.search(r"(\d+) failed", said)[1])
    if failed > done / 100:
        raise RuntimeError(f"{process.name}: {failed} requests failed:\n{said}")
    return {"cpu": cpu / done * 1e6, "rate": done / seconds, "rss": process.rss() / 1024}


def by_wrk(process: Process, seconds: int) -> Figures:
    before = process.cpu()
    command = ["wrk", "-t1", f"-c{peers.CONNECTIONS}", f"-d{seconds}s", f"https://127.0.0.1:{process.port}/"]
    with bench.kept_connections(process, peers.CONNECTIONS):
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cpu = process.cpu() - before
    if "Socket errors" in said or "Non-2xx" in said:
        raise RuntimeError(f"{process.name} failed:\n{said}")
    done = int(re.search(r"(\d+) requests in", said)[1])
    return {"cpu": cpu / done * 1e6, "rate": done / seconds, "rss": process.rss() / 1024}


def by_handshakes(process: Process, seconds: int) -> Figures:
    before = process.cpu()
    command = ["openssl", "s_time", "-new", "-tls1_3", "-time", str(seconds), "-connect", f"127.0.0.1:{process.port}"]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    cpu = process.cpu() - before
    done = int(re.findall(r"(\d+) connections in", said)[-1])
    return {"cpu": cpu / done * 1e6, "rate": done / cpu, "rss": process.rss() / 1024}


def by_bodies(process: Process, _: int) -> Figures:
    def transferred(*what: str) -> float:
        before = process.cpu()
        command = ["curl", "-sS", "--fail", "-o", "/dev/null", "-H", "Expect:", *what]
        subprocess.run(command, check=True, timeout=120)
        return GIB / (process.cpu() - before) / 1e6

    url = f"http://127.0.0.1:{process.port}/"
    before = process.rss()
    down = transferred(url)
    up = transferred("-T", str(Bodies.zeros), url)
    return {"down": down, "up": up, "grown": (process.rss() - before) / 1024}


# A preface, settings that change nothing, and GET / as stream 1 (RFC 9113 sections 3.4, 4.1; RFC 7541 appendix A).
GET_BY_HTTP2 = (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
                + bytes([0, 0, 14, 1, 5, 0, 0, 0, 1]) + b"\x82\x86\x84\x41\x09localhost")


def ask_http2(connection: socket.socket) -> None:
    bench.ask(connection, GET_BY_HTTP2)
    connection.sendall(bytes([0, 0, 0, 4, 1, 0, 0, 0, 0]))  # the proxy's settings are heard
    connection.settimeout(0.001)
    with suppress(TimeoutError):
        connection.recv(1024)  # that ours are
    connection.settimeout(5)


def connect_tls(process: Process) -> socket.socket:
    return TLS.wrap_socket(bench.connect(process), server_hostname="localhost")


TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
TLS.check_hostname, TLS.verify_mode = False, ssl.CERT_NONE


@dataclass(frozen=True)
class Held:
    """A kind of connection that is held idle, and what one may cost in KiB."""

    config: peers.Config
    connect: Callable[[Process], socket.socket]
    ask: Callable[[socket.socket], None]
    bar: float


IDLE = {
    "HTTP/1.1": Held(weir_plain, bench.connect, bench.ask, 12),
    "HTTP/2": Held(weir_plain, bench.connect, ask_http2, 40),
    "TLS 1.3, HTTP/1.1": Held(weir_tls, connect_tls, bench.ask, 40),
}


def run_idle(paths: dict[str, str], directory: Path) -> list[str]:
    said = [f"{HELD} connections held idle, each having done one request.", "",
            "|  | KiB a connection | RSS before any, MiB | at most, KiB |  |", "|---|---:|---:|---:|---|"]
    with Process(paths["nginx"], "nginx", peers.nginx_upstream, 0, directory / "upstream") as upstream:
        for number, (name, kind) in enumerate(IDLE.items()):
            with Process(paths["weir"], "weir", kind.config, upstream.port, directory / f"weir-{number}") as process:
                figures = bench.hold(process, kind.connect, kind.ask, HELD)
            met = "met" if figures["connection"] <= kind.bar else "**missed**"
            said.append(f"| {name} | {figures['connection']:.1f} | {figures['fresh']:.1f} | {kind.bar:g} | {met} |")
    return [*said, ""]


@dataclass(frozen=True)
class Scenario:
    what: str
    peers: dict[str, tuple[str, peers.Config]]
    load: Callable[[Process, int], Figures]
    columns: list[bench.Column]
    bar: tuple[str, list[str], float]  # against whom, by which figures, and the bound of weir's ratios to them: of "cpu" at most, else at least


CPU = [bench.Column("cpu", "CPU µs a request", ratio=True), bench.Column("rate", "requests/s", 0), bench.Column("rss", "RSS MiB")]
SCENARIOS = {
    "h2c": Scenario(
        "HTTP/2 without TLS to the proxy, 16 connections with 8 requests each at a time; HTTP/1.1 to the upstream.",
        {"weir": ("weir", weir_plain), "nginx": ("nginx", nginx_h2c), "HAProxy": ("haproxy", haproxy_h2c), "Envoy": ("envoy", peers.envoy_plain)},
        by_h2load, CPU, ("Envoy", ["cpu"], 0.8)),
    "tls": Scenario(
        "TLS 1.3 to the proxy, keep-alive, HTTP/1.1; a certificate by ECDSA P-256.",
        {"weir": ("weir", weir_tls), "nginx": ("nginx", nginx_tls), "HAProxy": ("haproxy", haproxy_tls), "Envoy": ("envoy", envoy_tls)},
        by_wrk, CPU, ("Envoy", ["cpu"], 0.8)),
    "handshakes": Scenario(
        "Full TLS 1.3 handshakes, one connection after the other, each closed without a request. nginx and HAProxy by Debian's OpenSSL 3.0, Envoy by"
        " BoringSSL, weir by AWS-LC: that is most of the difference.",
        {"weir": ("weir", weir_tls), "nginx": ("nginx", nginx_tls), "HAProxy": ("haproxy", haproxy_tls), "Envoy": ("envoy", envoy_tls)},
        by_handshakes,
        [bench.Column("cpu", "CPU µs a handshake"), bench.Column("rate", "handshakes in a second of CPU", 0, True), bench.Column("rss", "RSS MiB")],
        ("Envoy", ["rate"], 1.0)),
    "bodies": Scenario(
        "A body of 1 GiB down, then one up, by HTTP/1.1.",
        {"weir": ("weir", weir_plain), "HAProxy": ("haproxy", peers.haproxy_plain)},
        by_bodies,
        [bench.Column("down", "down, MB in a second of CPU", 0, True), bench.Column("up", "up, MB in a second of CPU", 0, True),
         bench.Column("grown", "RSS grown, MiB", 2)],
        ("HAProxy", ["down", "up"], 0.9)),
}


def run(scenario: Scenario, options: argparse.Namespace, paths: dict[str, str], directory: Path) -> list[str]:
    rounds: list[Figures] = [{} for _ in range(options.rounds)]
    with ExitStack() as stack:
        if scenario.load is by_bodies:
            upstream = stack.enter_context(bodies_upstream(directory))
        else:
            upstream = stack.enter_context(Process(paths["nginx"], "nginx", peers.nginx_upstream, 0, directory / "upstream")).port
        running = {}
        for name, (program, config) in scenario.peers.items():
            running[name] = stack.enter_context(Process(paths[program], program, config, upstream, directory / name))
            scenario.load(running[name], 1)  # to warm up
        for number, figures in enumerate(rounds):
            for name in bench.in_turn(running, number):
                figures[name] = scenario.load(running[name], options.seconds)
                bench.show(number, name, figures[name])
    peer, keys, bound = scenario.bar
    ratios = [statistics.median(figures["weir"][key] / figures[peer][key] for figures in rounds) for key in keys]
    at_most = keys == ["cpu"]
    met = max(ratios) <= bound if at_most else min(ratios) >= bound
    shown = " and ".join(f"{ratio:.2f} ×" for ratio in ratios)
    said = f"Bar: at {'most' if at_most else 'least'} {bound:g} × {peer}'s; {shown}, {'met' if met else '**missed**'}."
    return [scenario.what, "", *bench.table(scenario.columns, [*scenario.peers], rounds), said, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure weir's other protocols beside nginx, HAProxy and Envoy.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 1 s, which replace no page")
    names = [*SCENARIOS, "idle"]
    parser.add_argument("--only", nargs="+", choices=names, metavar="SCENARIO", help=", ".join(names))
    parser.add_argument("--weir", type=Path, default=bench.ROOT / "target/release/weir", help="another build of weir")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 2, 1
    paths = {name: bench.program(name, options.weir) for name in ["weir", "nginx", "haproxy", "envoy", "wrk", "h2load", "openssl", "curl"]}
    resource.setrlimit(resource.RLIMIT_NOFILE, (HELD + 1000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    os.environ["WEIR_LOG"] = "warn"
    said = ["# Protocols", "", 
            f"`make bench-protocols` wrote this, by `python3 benches/protocols.py --rounds {options.rounds} --seconds {options.seconds}`; how to read it stands in RESULTS.md.", "", *bench.versions(paths), ""]
    for name in options.only or names:
        print(f"## {name}", flush=True)
        with tempfile.TemporaryDirectory(prefix="weir-bench-") as directory:
            place = Path(directory)
            text = run_idle(paths, place) if name == "idle" else run(SCENARIOS[name], options, paths, place)
        print("\n" + "\n".join(text), flush=True)
        said += [f"## {name}", "", *text]
    if not (options.quick or options.only) and options.weir == parser.get_default("weir"):
        (bench.ROOT / "benches" / "PROTOCOLS.md").write_text("\n".join(said).rstrip() + "\n")


if __name__ == "__main__":
    main()
