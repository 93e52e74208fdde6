"""Runs the Autobahn Testsuite's cases for servers against a WebSocket server, past weir and through it, and compares.

How a few cases end is a matter of which packet comes first, so those that differ are run again, five times each way: through weir
nothing may come of them that does not come of them past it. `make test-autobahn` installs what it needs into target/.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

HERE = Path(__file__).parent


def said(process, pattern):
    """What `pattern` finds in a line of the process's output."""
    for line in process.stdout:
        if found := re.search(pattern, line):
            return found.group(1)
    sys.exit(f"{process.args[0]} ended without saying {pattern}")


def run(python2, packages, servers, cases, folder):
    """What came of each case, by server: how it went, and how it closed."""
    spec = folder / "spec.json"
    spec.write_text(
        json.dumps(
            {
                "outdir": str(folder / "reports"),
                "servers": [{"agent": name, "url": url} for name, url in servers.items()],
                "cases": cases,
                "exclude-cases": [],
                "exclude-agent-cases": {},
            }
        )
    )
    code = "from autobahntestsuite.wstest import run; run()"
    done = subprocess.run(
        [python2, "-c", code, "-m", "fuzzingclient", "-s", spec],
        env={**os.environ, "PYTHONPATH": str(packages)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    if done.returncode != 0:
        sys.exit(f"the testsuite failed:\n{done.stdout[-4000:]}")
    index = json.loads((folder / "reports" / "index.json").read_text())
    return {
        name: {case: (it["behavior"], it["behaviorClose"]) for case, it in index[name].items()}
        for name in servers
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weir", default="target/debug/weir")
    parser.add_argument("--python2", default="python2.7", help="the testsuite is written in it")
    parser.add_argument("--packages", type=Path, default="target/autobahn")
    parser.add_argument("--server", default="target/peers-venv/bin/python", help="runs the server")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        server = subprocess.Popen([arguments.server, HERE / "peers" / "ws_server.py"], **pipes)
        port = said(server, r"^(\d+)$")
        config = folder / "weir.yaml"
        config.write_text(
            f"listen: 127.0.0.1:0\nupstream: http://127.0.0.1:{port}\nadmin: {{address: 127.0.0.1:0}}\n"
        )
        weir = subprocess.Popen(
            [arguments.weir, "proxy", "-c", config], **pipes, stderr=subprocess.STDOUT
        )
        try:
            through = said(weir, r"listening addresses=127\.0\.0\.1:(\d+)")
            # What it has to say beyond that is passed on.
            threading.Thread(target=lambda: sys.stderr.writelines(weir.stdout), daemon=True).start()
            servers = {
                "past": f"ws://127.0.0.1:{port}",
                "through": f"ws://127.0.0.1:{through}",
            }
            again = (arguments.python2, arguments.packages, servers)
            results = run(*again, ["*"], folder)
            differ = [case for case, end in results["past"].items() if results["through"][case] != end]
            ends = {case: ({results["past"][case]}, {results["through"][case]}) for case in differ}
            for _ in range(5 if differ else 0):
                results_again = run(*again, differ, folder)
                for case, (past, passed) in ends.items():
                    past.add(results_again["past"][case])
                    passed.add(results_again["through"][case])
        finally:
            weir.terminate()
            server.terminate()
    for name, by_case in results.items():
        counts = {}
        for behavior, _ in by_case.values():
            counts[behavior] = counts.get(behavior, 0) + 1
        print(f"{name} weir: {len(by_case)} cases, " + ", ".join(f"{n} {how}" for how, n in sorted(counts.items())))
    for case, (past, passed) in ends.items():
        print(f"{case} varies: past {sorted(past)}, through {sorted(passed)}")
    broken = [case for case, (past, passed) in ends.items() if not passed <= past]
    if broken:
        sys.exit(f"otherwise through weir than past it: {', '.join(broken)}")


main()
