#!/usr/bin/env python3
"""Measures what the audit takes of a lane's thread, over HTTP: `weir proxy` with redis and postgres, whose one route is audited or not.

Owns: that scenario and its page. Processes, load and tables are bench.py's. `make bench-lane` builds and installs what it needs.
The figure is the time on a CPU of the thread named "lane-0" by /proc/PID/task/TID/schedstat, in nanoseconds, over the requests done.
All proxies have the same Redis, worker and Postgres, and take turns; a turn begins once all earlier events are stored.

Two loads: as fast as answers come, where those that wait for the disk make their clients ask less often; and at one pace for all, where
batches are small and Redis, worker and Postgres run on the lane's own core between its requests.
"""

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import bench
import peers
from bench import Column, Figures, Process
from peers import free_port

CONNECTIONS = 32
# Each connection pauses for 0 to 20 ms between an answer and its next request.
PACED, PACE = 128, "function delay() return math.random(0, 20) end\n"
BAR = 1.5  # µs a request, at most
NONE, BEST_EFFORT, GUARANTEED = "not audited", "best effort", "guaranteed"
BESIDE = "not audited, others' events beside"
BESIDE_CASE = "guaranteed, 12,000/s"  # of benches/audit.rs
COLUMNS = [Column("lane", "the lane, CPU µs a request", 2), Column("added", "added to it, µs", 2),
           Column("cpu", "weir proxy, CPU µs a request", 2), Column("rate", "requests/s", 0), Column("p50", "p50 ms", 2),
           Column("p99", "p99 ms", 2)]

bench.COMMANDS["weir proxy"] = lambda config: ["proxy", "-c", str(config)]
bench.COMMANDS["weir worker"] = lambda config: ["worker", "-c", str(config)]
bench.SUFFIX |= {"weir proxy": ".yaml", "weir worker": ".yaml", "postgres": ".conf"}


def lane_time(pid: int) -> int:
    """Nanoseconds that lanes have been on a CPU so far."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    lanes = [task for task in tasks if (task / "comm").read_text().startswith("lane-")]
    if not lanes:
        raise RuntimeError("no thread is named lane-0")
    return sum(int((lane / "schedstat").read_text().split()[0]) for lane in lanes)


def load(process: Process, seconds: float, wrk: str, pace: Path | None = None) -> Figures:
    before = lane_time(process.child.pid)
    process.script = pace
    figures = bench.load(process, seconds, wrk, 200, PACED if pace else CONNECTIONS)
    return {**figures, "lane": (lane_time(process.child.pid) - before) / figures["requests"] / 1000}


@contextmanager
def events_beside(seconds: float) -> Iterator[None]:
    """While it is entered, and for no longer than this, another process and servers of its own take events as guaranteed ones go."""
    command = ["cargo", "bench", "--quiet", "--bench", "audit", "--", "--only", BESIDE_CASE, "--seconds", str(round(seconds) + 2)]
    beside = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=bench.ROOT)
    said = []
    for line in beside.stdout:
        said.append(line)
        if line == "begins\n":
            break
    else:
        raise RuntimeError(f"no events beside:\n{''.join(said)}")
    try:
        yield
    finally:
        rest, _ = beside.communicate(timeout=60)
    if beside.returncode != 0:
        raise RuntimeError(f"events beside failed:\n{rest}")


def stores(redis: int, postgres: int) -> str:
    return f"""\
redis: {{urls: "redis://127.0.0.1:{redis}"}}
postgres: {{write: "postgres://postgres@127.0.0.1:{postgres}/postgres?sslmode=disable"}}
"""


def proxy(redis: int, postgres: int, level: str, delivery: str) -> peers.Config:
    return lambda port, upstream, directory: f"""\
version: 1
listeners: [{{name: inbound, address: "127.0.0.1:{port}"}}]
upstreams:
  app: {{endpoints: ["http://127.0.0.1:{upstream}"]}}
routes: [{{upstream: app, audit: {level}}}]
audit: {{delivery: {delivery}, spool: {{path: "{directory}/spool"}}}}
runtime: {{lanes: 1}}
admin: {{address: "127.0.0.1:{peers.beside(port, "admin")}"}}
""" + stores(redis, postgres)


def worker(redis: int, postgres: int) -> peers.Config:
    return lambda port, upstream, _: f"""\
listen: 127.0.0.1:0
upstream: http://127.0.0.1:{upstream}
audit: {{}}
admin: {{address: "127.0.0.1:{port}"}}
""" + stores(redis, postgres)


def start_postgres(stack: ExitStack, binaries: Path, directory: Path) -> int:
    """A server of its own; as root, it runs as the user `postgres`."""
    directory.mkdir()
    data, port = directory / "data", free_port()
    become = []
    if os.geteuid() == 0:
        shutil.chown(directory, "postgres", "postgres")
        become = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
    made = [*become, binaries / "initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-D", data]
    subprocess.run(made, capture_output=True, check=True)
    settings = [f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={directory}", "shared_buffers=256MB"]
    given = [word for setting in settings for word in ("-c", setting)]
    # `setpriv` becomes the server, so that signals reach it.
    first, *others = [*become, str(binaries / "postgres"), "-D", str(data), *given]
    bench.COMMANDS["postgres"] = lambda _: others
    stack.enter_context(Process(first, "postgres", lambda *_: "", 0, directory / "process", port))
    return port


def measure(options: argparse.Namespace, paths: dict[str, str], directory: Path) -> tuple[list[dict[str, Figures]], list[dict[str, Figures]]]:
    """The rounds as fast as it goes, and those at a pace."""
    directory.chmod(0o711)  # for the user `postgres`
    (pace := directory / "pace.lua").write_text(PACE)
    fast: list[dict[str, Figures]] = [{} for _ in range(options.rounds)]
    paced: list[dict[str, Figures]] = [{} for _ in range(options.rounds)]
    with ExitStack() as stack:
        upstream = stack.enter_context(Process(paths["nginx"], "nginx", peers.nginx_upstream, 0, directory / "upstream")).port
        redis = stack.enter_context(Process(paths["redis-server"], "redis-server", peers.redis, 0, directory / "redis")).port
        postgres = start_postgres(stack, Path(paths["postgres"]).parent, directory / "postgres")
        ingests = worker(redis, postgres)
        stack.enter_context(Process(paths["weir"], "weir worker", ingests, upstream, directory / "worker"))
        running = {}
        for name, level, delivery in [(NONE, "none", "best_effort"), (BEST_EFFORT, "metadata", "best_effort"),
                                      (GUARANTEED, "metadata", "guaranteed")]:
            config = proxy(redis, postgres, level, delivery)
            place = directory / name.replace(" ", "-")
            running[name] = stack.enter_context(Process(paths["weir"], "weir proxy", config, upstream, place))
            running[name].audited = True
            running[name].probe(200)
            load(running[name], 1, paths["wrk"])  # to warm up
        for number, both in enumerate(zip(fast, paced)):
            for figures, by in zip(both, (None, pace)):
                names = [*running, BESIDE] if by else [*running]
                for name in bench.in_turn(names, number):
                    with events_beside(options.seconds) if name == BESIDE else nullcontext():
                        figures[name] = load(running[NONE if name == BESIDE else name], options.seconds, paths["wrk"], by)
                    bench.show(number, name, figures[name])
                for each in figures.values():
                    each["added"] = each["lane"] - figures[NONE]["lane"]
    return fast, paced


def bars(rounds: list[dict[str, Figures]]) -> list[str]:
    lines = ["| added to the lane by auditing every request, µs | median of the rounds | range | between the least of each | at most |  |",
             "|---|---:|---:|---:|---:|---|"]

    def least(name: str) -> float:
        return min(figures[name]["lane"] for figures in rounds)

    for name in (BEST_EFFORT, GUARANTEED):
        added = [figures[name]["added"] for figures in rounds]
        median = statistics.median(added)
        verdict = "met" if median <= BAR else "**missed**"
        lines.append(f"| {name} | {median:.2f} | {min(added):.2f} to {max(added):.2f} | {least(name) - least(NONE):.2f} | {BAR:g} | {verdict} |")
    if BESIDE in rounds[0]:
        beyond = [figures[GUARANTEED]["lane"] - figures[BESIDE]["lane"] for figures in rounds]
        lines += ["", f"Guaranteed costs the lane {statistics.median(beyond):.2f} µs a request ({min(beyond):.2f} to {max(beyond):.2f}; between the"
                  f" least of each {least(GUARANTEED) - least(BESIDE):.2f}) beyond what as many events of another process cost it, of which it does nothing itself."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("BENCH_ROUNDS", 10)), help="or BENCH_ROUNDS [%(default)s]")
    parser.add_argument("--seconds", type=int, default=int(os.environ.get("BENCH_SECONDS", 3)), help="or BENCH_SECONDS [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 1 s, which replace no page")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 2, 1
    paths = {name: bench.program(name, bench.ROOT / "target/release/weir") for name in ("weir", "nginx", "wrk", "redis-server")}
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    paths["postgres"] = str(found[-1]) if found else bench.program("postgres", Path())
    os.environ["WEIR_LOG"] = "warn"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the children are ended too
    with tempfile.TemporaryDirectory(prefix="weir-bench-") as directory:
        fast, paced = measure(options, paths, Path(directory))
    postgres = subprocess.run([paths["postgres"], "--version"], capture_output=True, text=True).stdout.strip()
    said = ["# What the audit takes of a lane", "",
            f"`make bench-lane` wrote this, by `python3 benches/lane.py --rounds {options.rounds} --seconds {options.seconds}`: medians of the"
            " rounds, the least CPU in brackets. `weir proxy` with one lane, a Redis and a Postgres of its own and a worker that ingests; GET, a 1 KiB body, keep-alive on both"
            " sides. The same file each time, but for `audit` of the route and `audit.delivery`. The lane's time is that of its thread by"
            " `schedstat`; what packs, spools and sends events runs beside it, and is in the CPU of `weir proxy`.", "",
            *bench.versions(paths, CONNECTIONS), f"- {postgres}", "",
            "## As fast as answers come", "", *bench.table(COLUMNS, [NONE, BEST_EFFORT, GUARANTEED], fast), *bars(fast), "",
            "## At a pace", "",
            f"By {PACED} connections (`wrk -c{PACED}`), each of which pauses for 0 to 20 ms between an answer and its next request: batches are small, and"
            " Redis, worker and Postgres run on the lane's own core between its requests. With others' events beside, nothing of the lane is audited, while"
            f" `benches/audit.rs` has a producer, a spool, a Redis, a worker and a Postgres of its own and the case \"{BESIDE_CASE}\".", "",
            *bench.table(COLUMNS, [NONE, BESIDE, BEST_EFFORT, GUARANTEED], paced), *bars(paced)]
    print("\n".join(said))
    if not options.quick:
        (bench.ROOT / "benches/LANE.md").write_text("\n".join(said) + "\n")


if __name__ == "__main__":
    main()
