#!/usr/bin/env python3
"""The production stack on this machine, under load, with a worker, a weir and a master of Redis killed in the middle of it.

What docs/docker.md promises of deploy/docker-compose.production.yml is asserted here, each with its count. `make stack-test` runs it.
"""

import argparse
import http.client
import itertools
import json
import threading
import time

from processes import REDIS, WEIRS, WORKERS, Stack, eventually, get

THREADS = 8
LIMIT = 20


def say(text):
    print(f"{time.monotonic() - BEGAN:5.1f} s  {text}", flush=True)


def ask(address, path, fields=None):
    host, port = address.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    try:
        connection.request("GET", path, headers=fields or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()
    finally:
        connection.close()


class Load:
    """Threads that ask one address until they are told to end, and count what becomes of it."""

    def __init__(self, address):
        self.host, port = address.split(":")
        self.port = int(port)
        self.statuses = {}
        self.broken = 0
        self.longest = 0.0
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.ask, daemon=True) for _ in range(THREADS)]
        for thread in self.threads:
            thread.start()

    def ask(self):
        connection = None
        while not self.over.is_set():
            began = time.monotonic()
            try:
                connection = connection or http.client.HTTPConnection(self.host, self.port, timeout=20)
                connection.request("GET", "/load")
                response = connection.getresponse()
                response.read()
                status = response.status
            except (OSError, http.client.HTTPException):
                connection, status = None, None
            took = time.monotonic() - began
            with self.lock:
                self.longest = max(self.longest, took)
                if status is None:
                    self.broken += 1
                else:
                    self.statuses[status] = self.statuses.get(status, 0) + 1

    def answered(self):
        with self.lock:
            return sum(self.statuses.values())

    def until(self, more):
        goal = self.answered() + more
        eventually(f"{more} more requests are answered", lambda: self.answered() >= goal)

    def stop(self):
        self.over.set()
        for thread in self.threads:
            thread.join()


def served_by(stack):
    """Requests that each weir has counted since it began."""
    counts = {}
    for n in WEIRS:
        lines = get(stack.at[f"weir-{n}:9902"], "/metrics").splitlines()
        counts[f"weir-{n}"] = sum(int(float(line.split()[-1])) for line in lines if line.startswith("weir_requests_total{"))
    return counts


def begin(stack):
    # The workers come first: that they wait is what they are started with.
    for n in WORKERS:
        stack.start_weir(f"worker-{n}")
    for n in WORKERS:
        eventually("the workers wait", lambda: "waiting for redis" in stack.log(f"worker-{n}"))
    stack.start_redis()
    say("the cluster of six is formed")
    stack.start_postgres()
    say("the replica follows the primary")
    for n in WEIRS:
        stack.start_weir(f"app-{n}")
        stack.start_weir(f"weir-{n}")
    for service in [*(f"weir-{n}" for n in WEIRS), *(f"worker-{n}" for n in WORKERS)]:
        stack.is_ready(service)
    stack.start_nginx()
    stack.start_prometheus()
    eventually("nginx answers", lambda: "error" not in stack.log("nginx") and reaches(stack.at["nginx:8080"]))
    say("workers waited for six nodes of Redis and for Postgres; three weirs, nginx and Prometheus are up")


def reaches(address):
    try:
        return ask(address, "/")[0] == 200
    except OSError:
        return False


def sessions(stack):
    weirs = [stack.at[f"weir-{n}:8080"] for n in WEIRS]
    status, fields, _ = ask(weirs[0], "/login?user=ann&role=customer")
    cookie = fields["Set-Cookie"].split(";")[0]
    assert status == 200, status
    for weir in weirs[1:]:
        status, _, body = ask(weir, "/me", {"Cookie": cookie})
        assert status == 200 and json.loads(body)["headers"]["x-auth-user"] == "ann", (status, body)
        assert ask(weir, "/me")[0] == 401
    say("a session made at weir-1 holds at weir-2 and weir-3, and without it they answer 401")
    return 1 + 2 * len(weirs[1:])


def limits(stack):
    weirs = [stack.at[f"weir-{n}:8080"] for n in WEIRS]
    statuses = [ask(weirs[n % len(weirs)], "/export")[0] for n in range(LIMIT + 10)]
    assert statuses == [200] * LIMIT + [429] * 10, statuses
    say(f"of {len(statuses)} requests over three weirs a limit of {LIMIT} a minute admitted {statuses.count(200)} and refused {statuses.count(429)}")
    return len(statuses)


def load(stack, seconds):
    before = served_by(stack)
    load = Load(stack.at["nginx:8080"])
    load.until(300)
    after = served_by(stack)
    spread = {name: after[name] - before[name] for name in after}
    assert min(spread.values()) > 60, spread
    say(f"nginx spread the load: {spread}")

    stack.kill("worker-1")
    load.until(300)
    say("worker-1 was killed, with requests under way")
    stack.kill("weir-2")
    load.until(300)
    say("weir-2 was killed, with requests under way")
    # As Docker would by the restart policy.
    stack.start_weir("worker-1")
    stack.start_weir("weir-2")
    stack.is_ready("weir-2")
    stack.is_ready("worker-1")
    began = time.monotonic()
    again = eventually("weir-2 is asked again", lambda: served_by(stack)["weir-2"])
    load.until(300)
    limited = lose_a_master(stack)
    load.until(300)
    eventually("the load lasts", lambda: time.monotonic() - began > seconds)
    load.stop()
    refused = {status: count for status, count in load.statuses.items() if status != 200}
    failed = load.broken + sum(refused.values())
    # Each thread has one request under way; nginx asks another weir where one is gone, if nothing was sent back yet.
    assert failed <= THREADS, (refused, load.broken)
    say(
        f"of {load.answered()} requests {failed} failed ({refused or 'none'} by status, {load.broken} broken off), at most {THREADS} were under way; "
        f"the longest took {load.longest:.2f} s; weir-2 was asked again ({again})"
    )
    return load.answered() + limited


def lose_a_master(stack):
    """A master of Redis is gone until its replica has taken over. Meanwhile the other shards serve their keys."""
    role = lambda n: stack.redis(n, "role").split("\n")[0]
    lost, *others = [n for n in REDIS if role(n) == "master"]
    began = time.monotonic()
    stack.kill(f"redis-{lost}")
    clients = itertools.count(1)

    def replaced():
        client = next(clients)
        # Each client has a counter, in any of the shards.
        fields = {"X-Forwarded-For": f"10.0.{client // 250}.{client % 250}"}
        status = ask(stack.at[f"weir-{client % len(WEIRS) + 1}:8080"], "/export", fields)[0]
        assert status == 200, status
        for n in others:
            info = stack.redis(n, "cluster", "info")
            assert "cluster_state:ok" in info, info
        return sum(role(n) == "master" for n in REDIS) == len(others) + 1

    eventually("a replica takes over", replaced)
    took = time.monotonic() - began
    asked = next(clients) - 1
    stack.start_redis_node(lost)
    eventually("the lost master follows", lambda: stack.redis(lost, "role").split("\n")[3:4] == ["connected"])
    say(f"redis-{lost}, a master, was killed; {asked} requests with an exact limit were answered until its replica took over after {took:.1f} s")
    return asked


def audited(stack, answered):
    """Every answer has its row, and few rows have no answer: those under way when a weir was killed."""
    rows = lambda service: int(stack.query(service, "SELECT count(*) FROM weir.audit_events"))
    eventually("as many rows as answers", lambda: rows("postgres-primary") >= answered, 40)
    verify = [stack.weir, "audit", "verify", "-c", stack.file]
    # Until the killed weir's boot has its end mark, which the new one sends.
    said = eventually("the audit is whole", lambda: whole(stack, verify), 30)
    count = rows("postgres-primary")
    assert answered <= count <= answered + THREADS, (answered, count)
    eventually("the replica has them", lambda: rows("postgres-replica") == count)
    recovering = stack.query("postgres-replica", "SELECT pg_is_in_recovery()")
    assert recovering == "t", recovering
    say(f"{answered} answers, {count} rows on the primary and on the replica; weir audit verify: {said}")
    queried = stack.run([stack.weir, "audit", "query", "-c", stack.file, "--status", "429", "--format", "jsonl"])
    assert len(queried.splitlines()) == 10, queried
    say("weir audit query, which reads the replica, finds the 10 that were refused")


def whole(stack, verify):
    try:
        return stack.run(verify, weir_env(stack)).strip().splitlines()[-1]
    except AssertionError:
        return None


def weir_env(stack):
    return {f"REDIS_{n}": stack.at[f"redis-{n}:6379"] for n in (1, 2, 3)}


def watched(stack):
    api = lambda path: json.loads(get(stack.at["prometheus:9090"], f"/api/v1/{path}"))["data"]
    targets = eventually(
        "all targets are up",
        lambda: (found := api("targets")["activeTargets"]) and all(target["health"] == "up" for target in found) and found,
    )
    assert len(targets) == len(WEIRS) + len(WORKERS), targets
    rules = [rule for group in api("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 30 and all(rule["health"] != "err" for rule in rules), rules
    firing = [alert["labels"] for alert in api("alerts")["alerts"] if alert["state"] == "firing"]
    assert not firing, firing
    say(f"Prometheus: {len(targets)} targets are up, {len(rules)} alerts are evaluated, none fires")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weir", default="target/debug/weir")
    parser.add_argument("--seconds", type=float, default=3, help="of load once all is back")
    arguments = parser.parse_args()
    with Stack(arguments.weir) as stack:
        try:
            begin(stack)
            answered = sessions(stack) + limits(stack)
            of_load = load(stack, arguments.seconds)
            # Those by which nginx was found to be up are in the audit, too.
            probes = int(stack.query("postgres-primary", "SELECT count(*) FROM weir.audit_events WHERE path = '/'"))
            audited(stack, answered + of_load + probes)
            watched(stack)
        except BaseException:
            for name in stack.children:
                print(f"--- {name}\n{stack.log(name)[-1500:]}")
            raise
    say("the stack holds")


BEGAN = time.monotonic()
if __name__ == "__main__":
    main()
