#!/usr/bin/env python3
"""Measures weir's other protocols beside its peers': HTTP/2 without TLS, TLS, handshakes, and bodies of a gibibyte.

`make bench-protocols` calls it and keeps what it says as PROTOCOLS.md. Programs, /proc and the plain configurations are
bench.py's and peers.py's; this owns what differs by protocol. As there, CPU of the proxy's process is the figure to steer by.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import bench
import peers
from bench import Figures, Process

GIB = 1 << 30


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


def nginx_bodies(port: int, _: int, directory: Path) -> str:
    """An upstream that gives a gibibyte of zeros and takes what it is sent."""
    with (directory / "zeros").open("wb") as file:
        file.truncate(GIB)
    return peers.nginx(directory, f"""sendfile on; client_max_body_size 0;
  server {{
    listen 127.0.0.1:{port};
    location = /zeros {{ root {directory}; }}
    location = /sink {{ proxy_pass http://127.0.0.1:{port}/taken; proxy_request_buffering off; proxy_http_version 1.1; }}
    location / {{ return 200 "{peers.BODY}"; }}
  }}""")


# Loads: each gives one round's figures of one peer.


def by_h2load(process: Process, seconds: int) -> Figures:
    before = process.cpu()
    command = ["h2load", "-t1", "-c16", "-m8", "-D", str(seconds), f"http://127.0.0.1:{process.port}/"]
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

    zeros = f"http://127.0.0.1:{process.port}/zeros"
    before = process.rss()
    down = transferred(zeros)
    up = transferred("-T", str(process.zeros), f"http://127.0.0.1:{process.port}/sink")
    return {"down": down, "up": up, "grown": (process.rss() - before) / 1024}


@dataclass(frozen=True)
class Scenario:
    what: str
    peers: dict[str, tuple[str, peers.Config]]
    load: Callable[[Process, int], Figures]
    columns: list[bench.Column]
    bar: tuple[str, str, float]  # against whom, by which figure, and the bound of weir's ratio to it: below 1 at most, else at least


CPU = [bench.Column("cpu", "CPU µs a request", ratio=True), bench.Column("rate", "requests/s", 0), bench.Column("rss", "RSS MiB")]
SCENARIOS = {
    "h2c": Scenario(
        "HTTP/2 without TLS to the proxy, 16 connections with 8 requests each at a time; HTTP/1.1 to the upstream.",
        {"weir": ("weir", weir_plain), "nginx": ("nginx", nginx_h2c), "HAProxy": ("haproxy", haproxy_h2c), "Envoy": ("envoy", peers.envoy_plain)},
        by_h2load, CPU, ("Envoy", "cpu", 0.8)),
    "tls": Scenario(
        "TLS 1.3 to the proxy, keep-alive, HTTP/1.1; a certificate by ECDSA P-256.",
        {"weir": ("weir", weir_tls), "nginx": ("nginx", nginx_tls), "HAProxy": ("haproxy", haproxy_tls), "Envoy": ("envoy", envoy_tls)},
        by_wrk, CPU, ("Envoy", "cpu", 0.8)),
    "handshakes": Scenario(
        "Full TLS 1.3 handshakes, one connection after the other, each closed without a request.",
        {"weir": ("weir", weir_tls), "nginx": ("nginx", nginx_tls), "HAProxy": ("haproxy", haproxy_tls), "Envoy": ("envoy", envoy_tls)},
        by_handshakes,
        [bench.Column("cpu", "CPU µs a handshake"), bench.Column("rate", "handshakes in a second of CPU", 0, True), bench.Column("rss", "RSS MiB")],
        ("Envoy", "rate", 1.0)),
    "bodies": Scenario(
        "A body of 1 GiB down, then one up, by HTTP/1.1.",
        {"weir": ("weir", weir_plain), "HAProxy": ("haproxy", peers.haproxy_plain)},
        by_bodies,
        [bench.Column("down", "down, MB in a second of CPU", 0, True), bench.Column("up", "up, MB in a second of CPU", 0, True),
         bench.Column("grown", "RSS grown, MiB", 2)],
        ("HAProxy", "down", 0.9)),
}


def run(scenario: Scenario, options: argparse.Namespace, paths: dict[str, str], directory: Path) -> list[str]:
    rounds: list[Figures] = [{} for _ in range(options.rounds)]
    with ExitStack() as stack:
        bodies = scenario.load is by_bodies
        config = nginx_bodies if bodies else peers.nginx_upstream
        upstream = stack.enter_context(Process(paths["nginx"], "nginx", config, 0, directory / "upstream"))
        running = {}
        for name, (program, config) in scenario.peers.items():
            process = Process(paths[program], program, config, upstream.port, directory / name)
            process.zeros = directory / "upstream" / "zeros"
            running[name] = stack.enter_context(process)
            scenario.load(running[name], 1)  # to warm up
        for number, figures in enumerate(rounds):
            shift = number % len(running)  # nobody always goes first
            for name in [*running][shift:] + [*running][:shift]:
                figures[name] = scenario.load(running[name], options.seconds)
                shown = "  ".join(f"{key} {value:.2f}" for key, value in figures[name].items())
                print(f"  round {number + 1}  {name:10} {shown}", file=sys.stderr, flush=True)
    peer, key, bound = scenario.bar
    ratio = statistics.median(figures["weir"][key] / figures[peer][key] for figures in rounds)
    at_most = key == "cpu"
    met = ratio <= bound if at_most else ratio >= bound
    said = f"Bar: at {'most' if at_most else 'least'} {bound:g} × {peer}'s; {ratio:.2f} ×, {'met' if met else '**missed**'}."
    return [scenario.what, "", *bench.table(scenario.columns, [*scenario.peers], rounds), said, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure weir's other protocols beside nginx, HAProxy and Envoy.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--weir", type=Path, default=bench.ROOT / "target/release/weir", help="another build of weir")
    options = parser.parse_args()
    paths = {name: bench.program(name, options.weir) for name in ["weir", "nginx", "haproxy", "envoy", "wrk", "h2load", "openssl", "curl"]}
    os.environ["WEIR_LOG"] = "warn"
    said = ["# Protocols", "", "`make bench-protocols` wrote this; how to read it stands in RESULTS.md.", "", *bench.versions(paths), ""]
    for name in options.only or SCENARIOS:
        print(f"## {name}", flush=True)
        with tempfile.TemporaryDirectory(prefix="weir-bench-") as directory:
            text = run(SCENARIOS[name], options, paths, Path(directory))
        print("\n" + "\n".join(text), flush=True)
        said += [f"## {name}", "", *text]
    if not options.only and options.weir == parser.get_default("weir"):
        (bench.ROOT / "benches" / "PROTOCOLS.md").write_text("\n".join(said).rstrip() + "\n")


if __name__ == "__main__":
    main()
