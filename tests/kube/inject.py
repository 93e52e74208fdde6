"""What `weir inject` makes of tests/inject, and the chart's injector of a pod: Kubernetes takes it, checkov finds no more in it than before, and it runs."""

import base64
import http.client
import json
import re
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import jsonpatch
import kubernetes_validate
import yaml

import chart
import running

ROOT = Path(__file__).resolve().parents[2]
INJECTED = sorted((ROOT / "tests/inject").glob("*.injected.yaml"))
# Native sidecars need 1.29; a plain container goes further back.
PLAIN = ("plain-container",)
OLDEST = "1.25"
# Pods have resources of their own since 1.32.
YOUNG = ("pod-resources",)
# Of operators: no schema is at hand.
FOREIGN = ("argoproj.io/",)


def documents(path: Path) -> list[dict]:
    found: list[dict] = []
    for document in yaml.safe_load_all(path.read_text()):
        if document:
            found += document["items"] if document["kind"] == "List" else [document]
    return [document for document in found if not document["apiVersion"].startswith(FOREIGN)]


def name(path: Path) -> str:
    return path.name.removesuffix(".injected.yaml")


def versions(path: Path) -> list[str]:
    if name(path) in PLAIN:
        return [OLDEST]
    return chart.VERSIONS[-1:] if name(path) in YOUNG else chart.VERSIONS


def before(path: Path) -> Path:
    return path.with_name(name(path) + ".yaml")


def template(document: dict) -> dict:
    """The pod of a workload."""
    spec = document.get("spec", {})
    return document if document["kind"] == "Pod" else spec.get("jobTemplate", {}).get("spec", spec).get("template", {})


def sidecar(document: dict) -> dict | None:
    spec = template(document).get("spec") or {}
    containers = [*spec.get("initContainers", []), *spec.get("containers", [])]
    return next((container for container in containers if container["name"] == "weir" and "env" in container), None)


def valid() -> Iterator[str]:
    """Every injected object is one of Kubernetes' of each version, and weir's container is `restricted`."""
    if len(INJECTED) < 20:
        yield f"there are only {len(INJECTED)} golden files"
    for path in INJECTED:
        for document in documents(path):
            for version in versions(path):
                try:
                    kubernetes_validate.validate(document, version, strict=True)
                except Exception as error:  # noqa: BLE001 - an unknown kind or version, too
                    yield f"{name(path)}: {version}: {chart.named(document)}: {error}"
            if container := sidecar(document):
                volumes = [volume for volume in template(document)["spec"]["volumes"] if volume["name"].startswith("weir-")]
                yield from (f"{name(path)}: {fault}" for fault in chart.unrestricted({"containers": [container], "volumes": volumes}))


def monitored() -> Iterator[str]:
    """The chart's PodMonitor sees every injected pod."""
    monitor = chart.values_of_chart()["monitoring"]["podMonitor"]
    for path in INJECTED:
        for document in documents(path):
            if container := sidecar(document):
                labels = template(document)["metadata"]["labels"]
                if not chart.selects(monitor, labels) or monitor["port"] not in [port["name"] for port in container["ports"]]:
                    yield f"{name(path)}: {chart.named(document)}"


def jobs() -> Iterator[str]:
    """Prometheus itself gives the sidecars of each workload a job of their own, by the chart's PodMonitor, and those of one workload the same."""
    monitor = chart.of_kind(chart.objects(chart.values("everything")), "PodMonitor")[0]
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    snake = lambda name: re.sub("[A-Z]", lambda capital: f"_{capital[0].lower()}", name)  # noqa: E731 - Prometheus' own names
    rules = [{snake(key): value for key, value in rule.items()} for rule in endpoint["relabelings"]]
    wanted = {
        ("web-6d4cf56db6-x2x7k", "ReplicaSet", "web-6d4cf56db6"): "weir-sidecar/web",
        ("web-799cdb5f4-abcde", "ReplicaSet", "web-799cdb5f4"): "weir-sidecar/web",
        ("cart-api-5d8f9b7c4-qwert", "ReplicaSet", "cart-api-5d8f9b7c4"): "weir-sidecar/cart-api",
        ("db-0", "StatefulSet", "db"): "weir-sidecar/db",
        ("nightly-29401440-k2j4h", "Job", "nightly-29401440"): "weir-sidecar/nightly",
        ("import-2-k2j4h", "Job", "import-2"): "weir-sidecar/import-2",
        ("agent-zzzzz", "DaemonSet", "agent"): "weir-sidecar/agent",
        ("once", "", ""): "weir-sidecar/once",
    }
    targets = [{"targets": [f"10.0.0.{number}:9902"], "labels": {"__meta_kubernetes_pod_name": pod, "__meta_kubernetes_pod_controller_kind": kind,
                                                                 "__meta_kubernetes_pod_controller_name": name}}
               for number, (pod, kind, name) in enumerate(wanted)]
    scrape = {"job_name": "podMonitor", "static_configs": targets, "relabel_configs": rules}
    with tempfile.TemporaryDirectory(prefix="weir-kube-") as folder:
        file = Path(folder) / "prometheus.yaml"
        file.write_text(yaml.safe_dump({"scrape_configs": [scrape]}))
        said = subprocess.run(["promtool", "check", "service-discovery", "--timeout=1s", file, "podMonitor"], capture_output=True, text=True)
    made = {target["discoveredLabels"]["__meta_kubernetes_pod_name"]: target["labels"]["job"] for target in json.loads(said.stdout)}
    for (pod, _, _), job in wanted.items():
        if made.get(pod) != job:
            yield f"{pod} is of the job {made.get(pod)}, and ought to be of {job}"


def findings(folder: Path) -> set[tuple[str, str, str]]:
    """What checkov finds, by file, object and check."""
    checkov = Path(sys.executable).with_name("checkov")
    said = subprocess.run([checkov, "--framework", "kubernetes", "--skip-download", "--compact", "--quiet", "-o", "json", "-d", folder], capture_output=True, text=True)
    found = json.loads(said.stdout)
    if found["summary"]["passed"] < 100:
        raise RuntimeError(f"checkov looked at too little: {found['summary']}")
    return {(Path(fault["file_path"]).name, fault["resource"], f"{fault['check_id']} {fault['check_name']}") for fault in found["results"]["failed_checks"]}


def policy() -> Iterator[str]:
    """checkov finds nothing that was not there before, but what tests/kube/checkov-inject.yaml explains."""
    explained = yaml.safe_load((ROOT / "tests/kube/checkov-inject.yaml").read_text())
    with tempfile.TemporaryDirectory(prefix="weir-kube-") as folder:
        for kind in ("before", "after"):
            (Path(folder) / kind).mkdir()
        for path in INJECTED:
            for kind, source in (("before", before(path)), ("after", path)):
                # A list is its objects to checkov, and a pod without a name is none.
                made = [document for document in documents(source) if "name" in document["metadata"]]
                (Path(folder) / kind / f"{name(path)}.yaml").write_text(yaml.safe_dump_all(made))
        added = findings(Path(folder) / "after") - findings(Path(folder) / "before")
    met = set()
    for file, resource, check in sorted(added):
        number = check.split()[0]
        met.add(number)
        if number not in explained:
            yield f"{check}: {file} {resource}"
    yield from (f"tests/kube/checkov-inject.yaml explains {check}, which is not found any more" for check in set(explained) - met)


def started(weir: Path) -> Iterator[str]:
    """An injected sidecar, run as the pod would: its probes pass, it serves the app, it ends in time; ports and folders apart."""
    document = next(document for document in documents(ROOT / "tests/inject/helm-web.injected.yaml") if document["kind"] == "Deployment")
    pod, container, app = template(document), sidecar(document), running.free_port()
    text = pod["metadata"]["annotations"]["weir.dev/config-inline"].replace(":8080", f":{app}")
    with tempfile.TemporaryDirectory(prefix="weir-kube-") as folder, ExitStack() as stack:
        ports = {port: running.free_port() for port in (9900, 9901, 9902)}
        for port, free in ports.items():
            text = text.replace(f":{port}", f":{free}")
        (Path(folder) / "weir.yaml").write_text(text)
        running.start(stack, Path(folder) / "echo.log", [weir, "echo", "--address", f"127.0.0.1:{app}"])
        proxy = running.start(stack, Path(folder) / "proxy.log", [weir, *(word.replace("/etc/weir/config", folder) for word in container["args"])])
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            command = [word.replace(":9901", f":{ports[9901]}") for word in container[probe]["exec"]["command"]]
            asked = lambda command=command: subprocess.run([weir, *command[1:]], capture_output=True).returncode == 0  # noqa: E731
            running.eventually(f"{probe} passes", asked)
        if running.get(f"http://127.0.0.1:{ports[9900]}/")[0] != 200:
            yield "the app is not served"
        if running.get(f"http://127.0.0.1:{ports[9902]}/metrics")[0] != 200:
            yield "the metrics port does not serve metrics"
        said = subprocess.run([weir, *(word.replace("/etc/weir/config", folder) for word in container["lifecycle"]["preStop"]["exec"]["command"][1:])], capture_output=True, text=True)
        connection = http.client.HTTPConnection("127.0.0.1", ports[9900], timeout=10)
        connection.request("GET", "/")
        answer = connection.getresponse()
        if said.returncode != 0 or (answer.status, answer.getheader("connection")) != (200, "close"):
            yield f"preStop does not have clients leave: {answer.status} {answer.getheaders()} {said.stderr}"
        proxy.terminate()
        if proxy.wait(30) != 0:
            yield f"the sidecar ends with {proxy.returncode}"


def reviewed(weir: Path) -> Iterator[str]:
    """What the chart's injector runs is ready, and answers the API server's question about a pod with a patch whose pod Kubernetes takes; it ends in time."""
    documents = chart.objects({"injector": {"enabled": True}})
    pod = next(document for document in chart.of_kind(documents, "Deployment") if document["metadata"]["name"] == "weir-injector")["spec"]["template"]["spec"]
    container, client = pod["containers"][0], chart.of_kind(documents, "MutatingWebhookConfiguration")[0]["webhooks"][0]["clientConfig"]
    secret = next(secret for secret in chart.of_kind(documents, "Secret") if secret["metadata"]["name"] == pod["volumes"][0]["secret"]["secretName"])
    with tempfile.TemporaryDirectory(prefix="weir-kube-") as folder, ExitStack() as stack:
        for item in pod["volumes"][0]["secret"]["items"]:
            (Path(folder) / item["path"]).write_bytes(base64.b64decode(secret["data"][item["key"]]))
        ports = {port["containerPort"]: running.free_port() for port in container["ports"]}
        command = [word.replace("/tls/", f"{folder}/").replace("$(POD_NAMESPACE)", chart.NAMESPACE).replace("[::]", "127.0.0.1") for word in container["args"]]
        for port, free in ports.items():
            command = [word.replace(f":{port}", f":{free}") for word in command]
        webhook = running.start(stack, Path(folder) / "webhook.log", [weir, *command])
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            url = f"http://127.0.0.1:{ports[9901]}{container[probe]['httpGet']['path']}"
            running.eventually(f"{probe} passes", lambda url=url: running.get(url)[0] == 200)
        for namespace, expected in (("shop", "injected"), (chart.NAMESPACE, "left as it is")):
            app = {"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "web-"}, "spec": {"containers": [{"name": "web", "image": "web:1", "ports": [{"containerPort": 8080}]}]}}
            asked = {"uid": "1", "kind": {"group": "", "version": "v1", "kind": "Pod"}, "operation": "CREATE", "namespace": namespace, "object": app}
            answer = asked_by_the_server(client, ports[9443], {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": asked})
            if not answer["allowed"] or ("patch" in answer) != (expected == "injected"):
                yield f"a pod of {namespace} is not {expected}: {answer}"
            elif "patch" in answer:
                made = jsonpatch.apply_patch(app, base64.b64decode(answer["patch"]).decode())
                yield from chart.invalid({**made, "metadata": {**made["metadata"], "name": "web-1"}}, {})
                if (image := sidecar(made)["image"]) != container["image"]:
                    yield f"the pod's weir is {image}, and the injector's is {container['image']}"
        webhook.terminate()
        if webhook.wait(30) != 0:
            yield f"the injector ends with {webhook.returncode}"


def taken(weir: Path) -> Iterator[str]:
    """The injector of every profile has arguments that weir takes: without its certificate it ends, and not for their sake."""
    for profile in chart.PROFILES:
        for document in chart.of_kind(chart.objects(chart.values(profile)), "Deployment"):
            container = document["spec"]["template"]["spec"]["containers"][0]
            if container["name"] == "injector":
                said = subprocess.run([weir, *container["args"]], capture_output=True, text=True, timeout=30)
                if said.returncode != 1 or "/tls/tls.crt" not in said.stdout + said.stderr:
                    yield f"{profile}: {said.returncode}: {said.stdout}{said.stderr}"


def asked_by_the_server(client: dict, port: int, review: dict) -> dict:
    """The answer that the API server would get by this clientConfig: the certificate must be of the bundle, and for the Service."""
    trusted = ssl.create_default_context(cadata=base64.b64decode(client["caBundle"]).decode())
    name = f"{client['service']['name']}.{client['service']['namespace']}.svc"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.connect()
    connection.sock = trusted.wrap_socket(connection.sock, server_hostname=name)
    connection.request("POST", client["service"]["path"], json.dumps(review), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {text}")
    return json.loads(text)["response"]
