"""A weir proxy, a worker and an injector beside a real Redis and Postgres, and what they export at /metrics once a few things have happened.

The file that they read has a bit of everything, so that a metric is there if weir has it. `exported` is the only way in.
"""

import ctypes
import errno
import functools
import os
import platform
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

# Name of a sample to its labels, and to each the values that were seen.
Exported = dict[str, dict[str, set[str]]]

CONFIG = """\
version: 1
listeners:
  - {{name: inbound, address: "127.0.0.1:{listener}"}}
  - {{name: secure, address: "127.0.0.1:{secure}", tls: {{certificates: [{{cert: {directory}/tls.crt, key: {directory}/tls.key}}]}}}}
redis: {{urls: "redis://127.0.0.1:{redis}"}}
postgres: {{write: "postgres://postgres@127.0.0.1:{postgres}/postgres?sslmode=disable"}}
upstreams:
  app: {{endpoints: ["http://127.0.0.1:{echo}"], circuit_breaker: standard, concurrency: {{max: 100}}, health: {{path: /, interval: 1s}}, trust_session_headers: true,
        retries: {{attempts: 1}}, outlier_detection: {{}}}}
circuit_breakers: {{standard: {{}}}}
rate_limits: {{few: {{limit: 2/1d, by: client.ip}}}}
sessions: {{web: {{token: [{{cookie: sid}}]}}}}
routes:
  - {{match: {{path: /few}}, upstream: app, rate_limits: [few]}}
  - {{upstream: app, session: {{use: web, require: false}}}}
audit: {{spool: {{path: "{directory}/spool"}}}}
telemetry: {{access_log: {{format: json}}}}
worker: {{session_sweep: 1s}}
runtime: {{lanes: 1}}
admin: {{address: "127.0.0.1:{admin}"}}
"""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def eventually(what: str, holds: Callable[[], object]) -> object:
    deadline, error = time.monotonic() + 60, None
    while time.monotonic() < deadline:
        try:
            if found := holds():
                return found
        except (OSError, subprocess.CalledProcessError) as raised:
            error = raised
        time.sleep(0.05)
    raise RuntimeError(f"not within a minute: {what} ({error})")


def told(directory: Path) -> str:
    """What the children of a folder have said last."""
    return "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in sorted(directory.glob("*.log")))


def get(url: str) -> tuple[int, str]:
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(url, timeout=5, context=unchecked) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


# seccomp(2): a call's number is at the start of its struct seccomp_data, and its first argument, here a socket's family, at 16.
LOAD, IS_EQUAL, ANSWER, FAIL, GO_ON = 0x20, 0x15, 0x06, 0x0005_0000, 0x7FFF_0000
NO_NEW_PRIVILEGES, SECCOMP, BY_FILTER = 38, 22, 2


class Step(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("if_true", ctypes.c_uint8), ("if_false", ctypes.c_uint8), ("value", ctypes.c_uint32)]


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("steps", ctypes.POINTER(Step))]


def without_ipv6() -> None:
    """Has the kernel make no socket of IPv6 for this process, as one without IPv6 does (EAFNOSUPPORT)."""
    call = {"x86_64": 41, "aarch64": 198}[platform.machine()]
    steps = (Step * 6)(Step(LOAD, 0, 0, 0), Step(IS_EQUAL, 0, 3, call), Step(LOAD, 0, 0, 16), Step(IS_EQUAL, 0, 1, socket.AF_INET6),
                       Step(ANSWER, 0, 0, FAIL | errno.EAFNOSUPPORT), Step(ANSWER, 0, 0, GO_ON))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(NO_NEW_PRIVILEGES, *map(ctypes.c_ulong, (1, 0, 0, 0))) or libc.prctl(SECCOMP, ctypes.c_ulong(BY_FILTER), ctypes.byref(Program(len(steps), steps))):
        raise OSError(ctypes.get_errno(), "prctl")


def start(stack: ExitStack, said: Path, command: list[str | Path], before: Callable[[], None] | None = None) -> subprocess.Popen:
    """A child that is ended with the stack; what it says goes to a file. `before` runs in it before the command does."""
    child = subprocess.Popen(command, stdout=said.open("w"), stderr=subprocess.STDOUT, preexec_fn=before)

    def end() -> None:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()

    stack.callback(end)
    return child


def start_postgres(stack: ExitStack, directory: Path) -> int:
    """A server of its own; as root, it runs as the user `postgres`."""
    binaries, directory, port = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1], directory / "postgres", free_port()
    directory.mkdir()
    become: list[str | Path] = []
    if os.geteuid() == 0:
        shutil.chown(directory, "postgres", "postgres")
        become = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
    made = [*become, binaries / "initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync", "-D", directory / "data"]
    subprocess.run(made, capture_output=True, check=True)
    settings = [f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={directory}", "fsync=off"]
    start(stack, directory.parent / "postgres.log", [*become, binaries / "postgres", "-D", directory / "data", *(word for setting in settings for word in ("-c", setting))])
    ready = [binaries / "pg_isready", "-U", "postgres", "-h", "127.0.0.1", "-p", str(port)]
    eventually("Postgres answers", lambda: subprocess.run(ready, capture_output=True).returncode == 0)
    return port


def start_webhook(stack: ExitStack, directory: Path, weir: Path) -> str:
    """The address of its metrics; its certificate is the folder's."""
    reviews, admin = (f"127.0.0.1:{free_port()}" for _ in range(2))
    start(stack, directory / "webhook.log", [weir, "webhook", "--address", reviews, "--admin", admin, "--own-namespace", "weir",
                                             "--tls-cert", directory / "tls.crt", "--tls-key", directory / "tls.key"])
    return f"http://{admin}/metrics"


def certificate(directory: Path) -> None:
    """`tls.crt` and `tls.key`, for localhost."""
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "30", "-subj", "/CN=localhost",
                    "-keyout", directory / "tls.key", "-out", directory / "tls.crt"], capture_output=True, check=True)


@functools.cache
def exported(weir: Path) -> Exported:
    """What a proxy, a worker and an injector export, taken together."""
    with tempfile.TemporaryDirectory(prefix="weir-kube-") as name, ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o711)  # for the user `postgres`
        certificate(directory)
        ports = {port: free_port() for port in ("listener", "secure", "redis", "echo", "admin")}
        start(stack, directory / "redis.log", ["redis-server", "--port", str(ports["redis"]), "--bind", "127.0.0.1", "--save", "", "--dir", name])
        ports["postgres"] = start_postgres(stack, directory)
        start(stack, directory / "echo.log", [weir, "echo", "--address", f"127.0.0.1:{ports['echo']}"])
        proxy, worker, worker_admin = directory / "proxy.yaml", directory / "worker.yaml", free_port()
        proxy.write_text(CONFIG.format(directory=name, **ports))
        worker.write_text(CONFIG.format(directory=name, **ports | {"admin": worker_admin}))
        start(stack, directory / "worker.log", [weir, "worker", "-c", worker])
        serving = start(stack, directory / "proxy.log", [weir, "proxy", "-c", proxy])
        urls = [*(f"http://127.0.0.1:{port}/metrics" for port in (ports["admin"], worker_admin)), start_webhook(stack, directory, weir)]
        listener = f"http://127.0.0.1:{ports['listener']}"
        try:
            for url in urls:
                eventually(url, lambda url=url: get(url)[0] == 200)
            eventually("the proxy serves", lambda: get(listener)[0] == 200)
            refused = [get(f"{listener}/few")[0] for _ in range(3)]
            assert refused == [200, 200, 429], refused
            assert get(f"https://127.0.0.1:{ports['secure']}/")[0] == 200
            # A reload that is taken, and one that is not.
            for text, result in ((CONFIG.replace("2/1d", "3/1d"), "loaded"), ("nonsense: true\n", "refused")):
                proxy.write_text(text.format(directory=name, **ports))
                serving.send_signal(signal.SIGHUP)
                eventually(result, lambda result=result: f'weir_config_reloads_total{{result="{result}"}}' in get(urls[0])[1])
            eventually("a sweep", lambda: "weir_sessions_live{" in get(urls[1])[1])
            stored = re.compile(r"^weir_ingest_events_total [1-9]", re.M)
            eventually("events in Postgres", lambda: stored.search(get(urls[1])[1]))
            return parsed("\n".join(get(url)[1] for url in urls))
        except (RuntimeError, AssertionError, OSError) as error:
            raise RuntimeError(f"{error}\n{told(directory)}") from error


def parsed(text: str) -> Exported:
    found: Exported = {}
    for line in text.splitlines():
        if line.startswith("#") or not line:
            continue
        name, labels = re.match(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ", line + " ").groups()
        known = found.setdefault(name, {})
        for label, value in re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or ""):
            known.setdefault(label, set()).add(value)
    return found
