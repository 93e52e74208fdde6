"""The services of deploy/docker-compose.production.yml as processes of this machine: each with the command, the environment and the files that
the stack gives it, but for where servers listen and folders are.

Ends what it started, by process id, however the test ends.
"""

import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose"
PR_SET_PDEATHSIG = 1
REDIS = range(1, 7)
WEIRS = range(1, 4)
WORKERS = range(1, 3)


def free_port(taken):
    """None of those taken, below those that the kernel gives away, and with room for a Redis node's second port, which is 10,000 above."""
    while True:
        port = random.randrange(11_000, 21_000)
        if port in taken:
            continue
        try:
            for asked in (port, port + 10_000):
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", asked))
            return port
        except OSError:
            continue


def eventually(what, yes, within=30.0):
    """The first true answer."""
    deadline = time.monotonic() + within
    while True:
        answer = yes()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: it did not happen within {within:.0f} s")
        time.sleep(0.05)


def get(address, path):
    with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as response:
        return response.read().decode()


class Stack:
    def __init__(self, weir):
        self.weir = Path(weir).resolve()
        self.services = yaml.safe_load((DEPLOY / "docker-compose.production.yml").read_text())["services"]
        self.folder = Path(tempfile.mkdtemp(prefix="weir-stack-"))
        # Postgres and nginx's workers have users of their own.
        self.folder.chmod(0o755)
        self.secrets = self.folder / "secrets"
        self.children = {}
        self.at = {}
        names = [f"redis-{n}:6379" for n in REDIS] + [f"app-{n}:3000" for n in WEIRS]
        names += [f"weir-{n}:{port}" for n in WEIRS for port in (8080, 9901, 9902)]
        names += [f"worker-{n}:{port}" for n in WORKERS for port in (9901, 9902)]
        names += ["postgres-primary:5432", "postgres-replica:5432", "nginx:8080", "prometheus:9090"]
        ports = []
        for name in names:
            ports.append(free_port(ports))
            self.at[name] = f"127.0.0.1:{ports[-1]}"
        self.port = {name: address.split(":")[1] for name, address in self.at.items()}
        self.file = self.write("weir.yaml", (COMPOSE / "weir/weir.yaml").read_text())
        env = {
            "POSTGRES_PRIMARY": self.at["postgres-primary:5432"],
            "POSTGRES_REPLICA": self.at["postgres-replica:5432"],
        }
        self.run([COMPOSE / "secrets.sh", self.secrets], env)
        self.secrets.chmod(0o755)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in reversed(self.children.values()):
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 8
        for child in self.children.values():
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, name, text):
        """A file of the stack, with the paths and the addresses that it has here."""
        for name_there, address in self.at.items():
            text = text.replace(name_there, address)
        text = text.replace("/run/secrets", str(self.secrets))
        path = self.folder / name
        path.write_text(text)
        return path

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def run(self, command, env=None, within=60):
        done = subprocess.run(
            [str(part) for part in command], env=os.environ | (env or {}), cwd=self.folder, timeout=within, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def start(self, name, command, env=None):
        def die_with_us():
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

        with open(self.folder / f"{name}.log", "ab") as log:
            self.children[name] = subprocess.Popen(
                [str(part) for part in command],
                env=os.environ | (env or {}),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_us,
            )

    def kill(self, name):
        child = self.children.pop(name)
        child.kill()
        child.wait()

    def environment(self, service):
        return self.services[service].get("environment", {})

    def start_weir(self, service):
        """A service of weir's image, by its own command."""
        command = [part.replace("/etc/weir/weir.yaml", str(self.file)) for part in self.services[service]["command"]]
        command = [part.replace("0.0.0.0:3000", self.at.get(f"{service}:3000", "")) for part in command]
        env = {
            "WEIR_LISTEN": self.at.get(f"{service}:8080", "127.0.0.1:0"),
            "WEIR_ADMIN": self.at.get(f"{service}:9901", ""),
            "WEIR_METRICS": self.at.get(f"{service}:9902", ""),
            "WEIR_TRUSTED": "127.0.0.1/32",
            "WEIR_SPOOL": str(self.folder / f"{service}-spool"),
            # A machine that does other things, too, answers later, and no one waits a minute for a killed worker's events.
            "REDIS_TIMEOUT": "1s",
            "WORKER_CLAIM_AFTER": "3s",
        }
        env |= {f"REDIS_{n}": self.at[f"redis-{n}:6379"] for n in (1, 2, 3)}
        env |= {name: self.at.get(value, value) for name, value in self.environment(service).items()}
        self.start(service, [self.weir, *command], env)

    def is_ready(self, service):
        self.run([self.weir, "await", "--timeout", "30s", "--address", self.at[f"{service}:9901"]])

    def redis_env(self):
        return {"SECRETS": str(self.secrets)}

    def start_redis(self):
        for n in REDIS:
            self.start_redis_node(n)
        for n in REDIS:
            eventually(f"redis-{n} answers", lambda: self.redis(n, "ping") == "PONG\n")
        nodes = " ".join(self.at[f"redis-{n}:6379"] for n in REDIS)
        for _ in range(2):
            # The second time there is nothing to do.
            self.run([COMPOSE / "redis-init.sh"], self.redis_env() | {"REDIS_NODES": nodes})

    def start_redis_node(self, n):
        data = self.folder / f"redis-{n}"
        data.mkdir(exist_ok=True)
        env = self.redis_env() | {"REDIS_PORT": self.port[f"redis-{n}:6379"], "REDIS_DATA": str(data), "REDIS_IP": "127.0.0.1"}
        self.start(f"redis-{n}", [COMPOSE / "redis-node.sh"], env)

    def redis(self, n, *command):
        """What a node answers, nothing where it cannot be reached."""
        env = os.environ | {"REDISCLI_AUTH": (self.secrets / "redis-password").read_text()}
        command = ["redis-cli", "-p", self.port[f"redis-{n}:6379"], *command]
        return subprocess.run(command, env=env, capture_output=True, text=True).stdout

    def as_postgres(self, command):
        """Postgres refuses to be root's."""
        if os.geteuid() != 0:
            return command
        return ["setpriv", "--pdeathsig", "KILL", "--reuid", "postgres", "--regid", "postgres", "--clear-groups", *command]

    def postgres_env(self, service):
        folder = self.folder / service
        folder.mkdir(exist_ok=True)
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        path = os.pathsep.join([*(str(folder) for folder in binaries[-1:]), os.environ["PATH"]])
        return folder, {
            "PATH": path,
            "PGDATA": str(folder / "data"),
            "PGHOST": str(folder),
            "PGPORT": self.port[f"{service}:5432"],
            "POSTGRES_USER": "postgres",
            "SECRETS": str(self.secrets),
        }

    def postgres_options(self, service, folder):
        port = self.port[f"{service}:5432"]
        return ["-c", f"port={port}", "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]

    def start_postgres(self):
        service = "postgres-primary"
        folder, env = self.postgres_env(service)
        # As the image does it.
        password = self.secrets / "postgres-password"
        self.run(
            self.as_postgres(
                ["initdb", "-U", "postgres", "-E", "UTF8", "--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={password}", "-N"]
            ),
            env,
        )
        command = self.services[service]["command"] + self.postgres_options(service, folder)
        self.start(service, self.as_postgres(command), env)
        ready = ["pg_isready", "-q"]
        eventually(f"{service} answers", lambda: subprocess.run(ready, env=os.environ | env).returncode == 0)
        self.run(self.as_postgres([COMPOSE / "postgres-init.sh"]), env)
        self.children[service].send_signal(signal.SIGHUP)

        service = "postgres-replica"
        folder, replica = self.postgres_env(service)
        replica |= {"PRIMARY_HOST": "127.0.0.1", "PRIMARY_PORT": self.port["postgres-primary:5432"]}
        command = self.services[service]["command"]
        command = [COMPOSE / "postgres-replica.sh", *command[1:], *self.postgres_options(service, folder)]
        self.start(service, self.as_postgres(command), replica)
        eventually(f"{service} answers", lambda: subprocess.run(ready, env=os.environ | replica).returncode == 0)

    def query(self, service, sql):
        _, env = self.postgres_env(service)
        return self.run(["psql", "-U", "postgres", "-d", "weir", "-Atc", sql], env).strip()

    def start_nginx(self):
        env = self.environment("nginx")
        text = (COMPOSE / "nginx.conf.template").read_text().replace("/tmp/", f"{self.folder}/")
        for name, value in env.items():
            text = text.replace("${" + name + "}", self.at.get(value, value))
        text = text.replace("listen 8080", f"listen {self.at['nginx:8080']}")
        path = self.folder / "nginx.conf"
        path.write_text(text)
        nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
        self.start("nginx", [nginx, "-c", path, "-g", "daemon off;"])

    def start_prometheus(self):
        text = (COMPOSE / "prometheus.yaml").read_text().replace("/etc/prometheus/", f"{DEPLOY}/prometheus/")
        config = self.write("prometheus.yaml", text)
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={self.folder}/prometheus"]
        self.start("prometheus", [*command, f"--web.listen-address={self.at['prometheus:9090']}"])
