"""charts/weir by the real Helm engine: its profiles rendered, the plain manifests and golden files made of them, and what must hold of both."""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml
from helm_python.chart import Chart, lint

import running

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/weir"
GOLDEN, MANIFESTS, CRDS = ROOT / "tests/kube/golden", ROOT / "deploy/k8s", ROOT / "tests/kube/crds"
# Each is a chain of files of values; the later go before the earlier.
PROFILES = {
    "default": [], "dev": ["values-dev.yaml"], "production": ["values-production.yaml"],
    "aws": ["values-production.yaml", "values-aws.yaml"], "everything": ["ci/everything-values.yaml"], "injector": ["ci/injector-values.yaml"],
}
KEPT = ("default", "dev", "everything", "injector")  # as golden files; deploy/k8s is the production one
VERSIONS = ["1.29", "1.31", kubernetes_validate.latest_version()]
NAMESPACE = "weir"
Object = dict


def merged(over: dict, under: dict) -> dict:
    """As `helm -f under -f over`."""
    both = {**under}
    for key, value in over.items():
        both[key] = merged(value, under[key]) if isinstance(value, dict) and isinstance(under.get(key), dict) else value
    return both


def values(profile: str) -> dict:
    found: dict = {}
    for name in PROFILES[profile]:
        found = merged(yaml.safe_load((CHART / name).read_text()), found)
    return found


@functools.cache
def packed() -> Path:
    """The chart as `helm package` packs it: its links to deploy/ followed, of which the engine would tell at each load."""
    target = ROOT / "target/kube/chart"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(CHART, target)
    return target


def render(given: dict, name: str = "weir", namespace: str = NAMESPACE) -> dict[str, str]:
    """Each template's text by its path in the chart."""
    with Chart.load(packed()) as chart:
        made = chart.render(given, name=name, namespace=namespace)
    return {name.removeprefix("weir/templates/"): text for name, text in sorted(made.items())}


def objects(given: dict, name: str = "weir") -> list[Object]:
    texts = (text for path, text in render(given, name).items() if path.endswith(".yaml"))
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def named(document: Object) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def of_kind(documents: list[Object], kind: str) -> list[Object]:
    return [document for document in documents if document["kind"] == kind]


# What is made of the chart.

def golden(profile: str) -> str:
    texts = render(values(profile))
    # The dashboard is a file of its own, whose changes are not the chart's.
    texts = {name: re.sub(r"^    \{\"annotations\".*$", "    (deploy/grafana/weir.json)", text, flags=re.M) for name, text in texts.items()}
    # A certificate is made anew each time, since there is no cluster to look it up in.
    texts = {name: re.sub(r'^( *(?:ca\.crt|tls\.crt|tls\.key|caBundle|weir\.dev/renew-after): )[\w+/="-]+$', r"\1(made)", text, flags=re.M)
             for name, text in texts.items()}
    return "".join(f"# {name}\n{text.strip()}\n" for name, text in texts.items() if text.strip())


def manifests() -> dict[str, str]:
    """deploy/k8s: the production profile with its namespace, a file a template, without what is Helm's own."""
    texts = render(merged({"namespace": {"create": True}}, values("production")))
    # A later file may need an earlier one; those of operators, which need their definitions first, are in folders.
    order = {"namespace.yaml": "00-namespace", "quota.yaml": "01-quota", "serviceaccounts.yaml": "02-serviceaccounts", "configmap.yaml": "03-configmap",
             "proxy/deployment.yaml": "10-proxy-deployment", "proxy/service.yaml": "11-proxy-service", "proxy/autoscaling.yaml": "12-proxy-hpa-pdb",
             "proxy/ingress.yaml": "13-proxy-ingress", "worker/deployment.yaml": "20-worker", "networkpolicy.yaml": "30-networkpolicy",
             "injector/certmanager.yaml": "injector/40-certificate", "injector/deployment.yaml": "injector/41-injector",
             "injector/webhook.yaml": "injector/42-webhook", "monitoring.yaml": "monitoring/monitoring"}
    made = {}
    for name, text in texts.items():
        if not text.strip() or not name.endswith(".yaml") or name.startswith("tests/"):
            continue
        text = re.sub(r"\n *(helm\.sh/chart|app\.kubernetes\.io/managed-by): [^\n]*", "", text).strip()
        made[f"{order[name]}.yaml"] = f"# Made of charts/weir/templates/{name} and values-production.yaml by `make manifests`.\n{text}\n"
    return made


def write() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for profile in KEPT:
        (GOLDEN / f"{profile}.yaml").write_text(golden(profile))
    for old in MANIFESTS.rglob("*.yaml"):
        old.unlink()
    for name, text in manifests().items():
        (MANIFESTS / name).parent.mkdir(parents=True, exist_ok=True)
        (MANIFESTS / name).write_text(text)
    (CHART / "README.md").write_text(readme())


def readme() -> str:
    """The values with their texts: of each key below a comment that begins with `--`."""
    source = (CHART / "values.yaml").read_text()
    defaults, path, said, shown, rows = yaml.safe_load(source), [], [], None, []
    for line in source.splitlines():
        comment = re.match(r"\s*# (.*)", line)
        key = re.match(r"( *)([\w.]+):", line)
        if comment and comment[1].startswith("-- "):
            said, shown = [comment[1][3:]], None
        elif comment and comment[1].startswith("@default -- "):
            shown = comment[1][12:]
        elif comment and said:
            said.append(comment[1])
        elif key:
            path = [*path[: len(key[1]) // 2], key[2]]
            if said:
                found = defaults
                for part in path:
                    found = found[part]
                default = shown or f"`{json.dumps(found)}`"
                rows.append(f"| `{'.'.join(path)}` | {' '.join(said)} | {default} |".replace("||", "\\|\\|"))
            said, shown = [], None
    page = (CHART / "README.head.md").read_text()
    return page + "\n| value | what | default |\n|---|---|---|\n" + "\n".join(rows) + "\n"


# Checks: each yields what is wrong.

def fresh() -> Iterator[str]:
    """Golden files, plain manifests and the README are what the chart makes."""
    wanted = {GOLDEN / f"{profile}.yaml": golden(profile) for profile in KEPT}
    wanted |= {MANIFESTS / name: text for name, text in manifests().items()} | {CHART / "README.md": readme()}
    kept = {*GOLDEN.glob("*"), *MANIFESTS.rglob("*.yaml"), CHART / "README.md"}
    for path in sorted(kept | set(wanted)):
        if not path.exists() or path.read_text() != wanted.get(path):
            yield f"{path.relative_to(ROOT)} is not fresh: look at the difference of `make manifests`"


def linted() -> Iterator[str]:
    """`helm lint --strict` takes every profile."""
    for profile in PROFILES:
        said = lint(packed(), values(profile), namespace=NAMESPACE, strict=True)
        yield from (f"{profile}: {error}" for error in said["errors"])
        yield from (f"{profile}: {message['path']}: {message['error']}" for message in said["messages"] if message["severity"] > 1)


def spooled(sizeLimit: str | int | None = "1Gi", **spool: str) -> dict:
    """An audit with a spool, on an `emptyDir` of that size."""
    config = {"audit": {"spool": spool}, "redis": {"urls": "redis://redis"}, "postgres": {}}
    return {"config": config, "proxy": {"dataVolume": {"emptyDir": {"sizeLimit": sizeLimit}}}}


def refused() -> Iterator[str]:
    """Mistakes in values are told, by the schema or by the templates."""
    listener = {"name": "inbound", "address": "0.0.0.0:8080"}
    for wrong, told in (
        ({"proxy": {"replicas": 3}}, "replicas"),
        ({"worker": {"autoscaling": {"enabled": True}}}, "autoscaling"),
        ({"image": {"digest": "sha256:abc"}}, "digest"),
        ({"configReload": "sometimes"}, "configReload"),
        ({"proxy": {"resources": {"request": {"cpu": 1}}}}, "request"),
        ({"config": {"listeners": [{**listener, "name": "Much_too_long_a_name"}]}}, "name"),
        ({"config": {"listeners": []}}, "listeners"),
        ({"config": {"shutdown": {"drain": "soon"}}}, "drain"),
        ({"config": {"upstreams": {"shop": "http://shop:80"}}}, "shop"),
        ({"defaultUpstream": "app:80"}, "defaultUpstream"),
        ({"config": {"listen": "0.0.0.0:8080"}}, "short form"),
        ({"proxy": {"service": {"ports": [{"name": "http", "port": 80, "targetPort": "outbound"}]}}}, "there are inbound"),
        ({"worker": {"enabled": True}}, "config needs redis"),
        # What the API server refuses, or takes for something else.
        ({"proxy": {"dataVolume": {"persistentVolumeClaim": {"claimName": "spool"}}}}, "proxy.dataVolume: a volume is of one kind, and this one is emptyDir and persistentVolumeClaim"),
        (spooled(max="1GiB"), "config.audit.spool.max: the spool's 1GiB are no less than the 1Gi of proxy.dataVolume.emptyDir.sizeLimit"),
        (spooled(max="{{ 1 }}GB", sizeLimit="900M"), "config.audit.spool.max"),
        (spooled(sizeLimit=268435456), "the spool's 256MiB"),
        ({"proxy": {"strategy": {"type": "Recreate"}}}, "proxy.strategy: Recreate rolls nothing"),
        ({"injector": {"enabled": True, "strategy": {"type": "Recreate"}}}, "injector.strategy: Recreate rolls nothing"),
        ({"proxy": {"strategy": {"rollingUpdate": {"maxSurge": 0}}}}, "maxSurge or maxUnavailable"),
        ({"proxy": {"strategy": {"rollingUpdate": {"maxSurge": "0%"}}}}, "maxSurge or maxUnavailable"),
        ({"config": {"listeners": [listener, {"name": "metrics", "address": "0.0.0.0:8081"}]}}, 'config.listeners[1].name: another port of the pod has the name "metrics"'),
        ({"config": {"listeners": [{**listener, "name": "admin"}]}, "secrets": {"adminToken": {"existingSecret": "admin"}}}, 'config.listeners[0].name: another port of the pod has the name "admin"'),
        ({"config": {"listeners": [listener, {**listener, "address": "0.0.0.0:8081"}]}}, 'has the name "inbound"'),
        ({"config": {"listeners": [{**listener, "name": "80"}]}}, "'80' does not match pattern"),
        ({"config": {"listeners": [{**listener, "name": "a--b"}]}}, "'a--b' does not match pattern"),
        ({"proxy": {"autoscaling": {"enabled": True, "minReplicas": 11}}}, "minReplicas is 11 and maxReplicas 10"),
        ({"proxy": {"autoscaling": {"enabled": True, "targetCPUUtilizationPercentage": None}}}, "nothing to scale by"),
        ({"proxy": {"ingress": {"enabled": True, "servicePort": "web"}}}, 'named "web"; there are http'),
        ({"proxy": {"service": {"ports": [{"name": "http", "port": 80, "targetPort": "inbound"}, {"name": "http", "port": 81, "targetPort": "inbound"}]}}}, 'two ports have the name "http"'),
        ({"proxy": {"service": {"ports": [{"name": "http", "port": 80, "targetPort": "inbound"}, {"name": "web", "port": 80, "targetPort": "inbound"}]}}}, "two ports have the number 80"),
        ({"secrets": {"redisPassword": {"existingSecret": "redis"}}}, "add config.redis.urls"),
        ({"secrets": {"auditKey": {"existingSecret": "audit"}}}, "add config.audit"),
        ({"secrets": {"databaseUrl": {"existingSecret": "postgres"}}}, "add config.postgres"),
        ({"config": {"listeners": [{**listener, "address": "[::]:${PORT}"}]}}, 'config.listeners[0].address: "[::]:${PORT}" does not end with a port'),
        ({"config": {"listeners": [{**listener, "address": "0.0.0.0:65536"}]}}, "config.listeners[0].address"),
        ({"config": {"redis": "redis://redis:6379"}}, "/config/redis"),
        ({"config": {"audit": {"sqlite": "audit.db"}}}, "/config/audit/sqlite"),
        ({"fullnameOverride": "Weir.eu"}, 'fullnameOverride: "Weir.eu"'),
        ({"fullnameOverride": "2nd"}, 'fullnameOverride: "2nd"'),
        ({"proxy": {"service": {"loadBalancerSourceRanges": ["10.0.0.0/8"]}}}, "proxy.service.loadBalancerSourceRanges: the type is ClusterIP"),
        (merged({"proxy": {"service": {"type": "ClusterIP"}}}, values("aws")), "proxy.service."),
        ({"proxy": {"service": {"ports": [{"name": "http", "port": 80, "targetPort": "inbound", "nodePort": 30080}]}}}, 'a ClusterIP has no nodePort, and the port "http" has'),
        ({"commonLabels": {"app.kubernetes.io/part-of": "shop"}}, "commonLabels: app.kubernetes.io/part-of is the chart's own"),
        ({"proxy": {"podLabels": {"app.kubernetes.io/name": "shop"}}}, "proxy.podLabels: app.kubernetes.io/name"),
        # What is null is not there, to Helm, and left "null" in the middle of an object.
        ({"proxy": {"probes": {"startup": None}}}, "missing property 'startup'"),
        ({"worker": {"dataVolume": None}}, "missing property 'dataVolume'"),
        ({"proxy": {"probes": {"liveness": {"successThreshold": 2}}}}, "/proxy/probes/liveness/successThreshold"),
        ({"monitoring": {"serviceMonitor": {"enabled": True, "interval": "5s"}}}, "monitoring.serviceMonitor.scrapeTimeout: 10s is more than interval, 5s"),
        ({"monitoring": {"serviceMonitor": {"enabled": True, "scrapeTimeout": "1m30s", "interval": "89999ms"}}}, "monitoring.serviceMonitor.scrapeTimeout"),
        ({"injector": {"certificates": {"certManager": {"issuerRef": {"kind": "ClusterIssuer"}}}}}, "issuerRef"),
        ({"monitoring": {"prometheusRule": {"runbookBase": "docs"}}}, "runbookBase"),
        ({"monitoring": {"prometheusRule": {"enabled": True, "disabled": ["WeirAbsnt"]}}}, 'prometheusRule.disabled: no alert is named "WeirAbsnt"; there are Weir'),
        ({"injector": {"onUnfit": "deny"}}, "onUnfit"),
        ({"injector": {"sidecar": {"uid": 0}}}, "uid"),
        # What no sidecar would get.
        ({"injector": {"sidecar": {"resources": {"limits": {"ephemeral-storage": "1Gi"}}}}}, "ephemeral-storage"),
        ({"proxy": {"terminationGracePeriodSeconds": 0}}, "terminationGracePeriodSeconds"),
        ({"injector": {"enabled": True, "certificates": {"existingSecret": "mine"}}}, "go together"),
        ({"injector": {"enabled": True, "certificates": {"caBundle": "-----BEGIN CERTIFICATE-----\n"}}}, "go together"),
        ({"injector": {"certificates": {"existingSecret": "mine", "caBundle": "LS0tLS1CRUdJTi"}}}, "caBundle"),
        ({"injector": {"enabled": True, "certificates": {"existingSecret": "mine", "caBundle": "-----BEGIN CERTIFICATE-----\n", "certManager": {"enabled": True}}}}, "either"),
    ):
        try:
            render(wrong)
            yield f"{wrong} is taken"
        except Exception as error:  # noqa: BLE001 - the engine's own, of several kinds
            if told not in str(error):
                yield f"{wrong}: {told!r} is not in: {error}"


def taken() -> Iterator[str]:
    """The mends that the refusals name."""
    for mended in (
        {"proxy": {"dataVolume": {"emptyDir": None, "persistentVolumeClaim": {"claimName": "spool"}}}},
        spooled(max="2GiB", sizeLimit="3Gi"),
        spooled(max="2GiB", sizeLimit=None),
        spooled(max="2GiB", path="/var/spool/weir"),
        {"config": {"audit": {"spool": {"max": "2GiB"}}}},  # in SQLite it has no spool
        {"proxy": {"strategy": {"type": "Recreate", "rollingUpdate": None}}},
        {"proxy": {"strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}}},
        {"config": {"listeners": [{"name": "admin", "address": "0.0.0.0:8080"}]}, "proxy": {"service": {"ports": [{"name": "http", "port": 80, "targetPort": "admin"}]}}},
        {"proxy": {"autoscaling": {"enabled": True, "targetCPUUtilizationPercentage": None, "targetMemoryUtilizationPercentage": 80}}},
        {"config": {"listeners": [{"name": "inbound", "address": "[::]:{{ .Values.proxy.replicaCount }}"}]}},
        {"proxy": {"probes": {"startup": {"periodSeconds": None, "failureThreshold": None}, "readiness": {"successThreshold": 2}}}},
    ):
        yield from (f"{mended}: {fault}" for document in objects(mended) for fault in invalid(document, {}))


def laned() -> Iterator[str]:
    """A proxy has the lanes that its file says, else those of its CPU limit, which weir sees itself, else of its CPU request."""
    cpu = lambda **resources: {"proxy": {"resources": {kind: {"cpu": amount} for kind, amount in resources.items()}}}  # noqa: E731
    shed = {"config": {"runtime": {"shed": {"memory": "90%"}}}}
    for given, runtime in (
        ({}, {"lanes": 1}),
        (cpu(requests="1001m"), {"lanes": 2}),
        (cpu(requests=2), {"lanes": 2}),
        (cpu(requests="0.5"), {"lanes": 1}),
        ({"proxy": {"resources": {"requests": None, "limits": None}}}, {"lanes": 1}),
        (cpu(requests="100m", limits="2"), None),
        (merged(shed, cpu(limits=2)), {"shed": {"memory": "90%"}}),
        (shed, {"lanes": 1, "shed": {"memory": "90%"}}),
        ({"config": {"runtime": {"lanes": "auto"}}}, {"lanes": "auto"}),
    ):
        text = of_kind(objects(given), "ConfigMap")[0]["data"]["weir.yaml"]
        if yaml.safe_load(text).get("runtime") != runtime:
            yield f"{given}: the file has {text}"


def migrates() -> Iterator[str]:
    """`config.postgres.migrate` is what the file says; `worker.migrate` stands in for it."""
    for said, by_default, expected in ((None, True, True), (None, False, False), (False, True, False), (True, False, True)):
        postgres = {} if said is None else {"migrate": said}
        given = {"config": {"postgres": postgres}, "worker": {"migrate": by_default}}
        text = of_kind(objects(given), "ConfigMap")[0]["data"]["weir.yaml"]
        if yaml.safe_load(text)["postgres"] != {"migrate": expected}:
            yield f"{given}: the file has {text}"


def pruned() -> Iterator[str]:
    """A `null` in `config` takes out the key that another values file has, and leaves none that weir would refuse."""
    given = merged({"config": {"worker": None, "audit": {"spool": None}}}, values("production"))
    text = of_kind(objects(given), "ConfigMap")[0]["data"]["weir.yaml"]
    config = yaml.safe_load(text)
    if "worker" in config or "spool" in config["audit"] or "null" in text:
        yield f"nulls do not take keys out: {text}"
    for nothing in ({"audit": None}, {"audit": {"sqlite": None}}):
        render({"config": nothing})


def held() -> Iterator[str]:
    """With `configReload: rollout` a pod keeps the file that it began with, so that a bad one stops at the first new pod: the kubelet refreshes no `subPath`."""
    for given, holds in (({}, True), (values("production"), True), ({"configReload": "live"}, False), ({"existingConfigMap": "mine"}, False)):
        for deployment in of_kind(objects(given), "Deployment"):
            container = deployment["spec"]["template"]["spec"]["containers"][0]
            for mount in container["volumeMounts"]:
                if mount["name"] == "config":
                    file = mount["mountPath"] if holds else f"{mount['mountPath']}/weir.yaml"
                    if mount.get("subPath") != ("weir.yaml" if holds else None) or file != container["args"][-1]:
                        yield f"{given.get('configReload')}: {named(deployment)} has {mount}"


def anyones() -> Iterator[str]:
    """Pods whose user the cluster chooses say none, and are as restricted as ever; what a pod is told holds for every one."""
    nobody = {"runAsUser": None, "runAsGroup": None}
    given = {"podSecurityContext": {**nobody, "fsGroup": None, "supplementalGroups": [7]}, "securityContext": {**nobody, "seLinuxOptions": {"level": "s0:c1"}}}
    for document in objects(merged(given, values("everything"))):
        spec = document["spec"] if document["kind"] == "Pod" else document.get("spec", {}).get("template", {}).get("spec")
        if spec is None:
            continue
        containers = [*spec.get("initContainers", []), *spec["containers"]]
        if {"runAsUser", "runAsGroup", "fsGroup"} & {key for part in (spec, *containers) for key in part["securityContext"]}:
            yield f"{named(document)} has a user of its own"
        if spec["securityContext"].get("supplementalGroups") != [7] or any("seLinuxOptions" not in container["securityContext"] for container in containers):
            yield f"{named(document)} is not as the values say"
        yield from (f"{named(document)}: {fault}" for fault in (*invalid(document, {}), *unrestricted(spec)))


def noted() -> Iterator[str]:
    """What is said after an installation can be typed: a command in a pod finds the admin port by the file, whatever its number."""
    for where, text in (("NOTES.txt", render({})["NOTES.txt"]), *((page.name, page.read_text()) for page in (ROOT / "docs").glob("*.md"))):
        typed = re.findall(r"^ *(?:\$ )?kubectl .* -- (weir .*)$", text, re.M)
        yield from (f"{where}: {command}" for command in typed if " -c /etc/weir/config/weir.yaml" not in command)
        if where == "NOTES.txt" and not typed:
            yield "NOTES.txt has no command"
    # What is in a ConfigMap that the chart has not made is not known.
    for given, said in (({}, True), ({"existingConfigMap": "mine"}, False)):
        if ("There is no `config.redis`" in render(given)["NOTES.txt"]) != said:
            yield f"{given}: the notes do {'not ' if said else ''}say that there is no Redis"


def warned() -> Iterator[str]:
    """An audit that is lost with its pod is told, and how much of it the volume holds, at whose bound the kubelet evicts the pod."""
    claim = {"dataVolume": {"emptyDir": None, "persistentVolumeClaim": {"claimName": "audit"}}}
    for given, lost in (
        ({}, False),
        ({"config": {"audit": {}}}, True),
        (values("dev"), True),
        ({"config": {"audit": {"level": "none"}}, "proxy": claim}, False),
        ({"config": {"audit": {"sqlite": {"path": "/audit/weir.db"}}}}, False),
        ({"config": {"audit": {}, "redis": {"urls": "redis://redis"}, "postgres": {}}}, False),
        (values("production"), False),
    ):
        if ("is lost with its pod" in render(given)["NOTES.txt"]) != lost:
            yield f"{given}: the notes do {'not ' if lost else ''}say that the audit is lost"
    recreate = {"strategy": {"type": "Recreate", "rollingUpdate": None}}
    for proxy, told in (({}, True), (claim, True), ({**claim, **recreate}, False)):
        notes = render({"config": {"audit": {}}, "proxy": proxy})["NOTES.txt"]
        if ("strategy: {type: Recreate, rollingUpdate: null}" in notes) != told:
            yield f"{proxy}: a claim and a rollout want the same volume, and the notes do {'not ' if told else ''}say so: {notes}"
    for size, room in (("1Gi", "2.7 million"), ("10G", "25.0 million"), (None, None)):
        notes = render({"config": {"audit": {}}, "proxy": {"dataVolume": {"emptyDir": {"sizeLimit": size}}}})["NOTES.txt"]
        if ("evicts" in notes) != (size is not None) or (room and f"{size}, which some {room} events fill" not in notes):
            yield f"an emptyDir of {size}: {notes}"


def strict(schema: object) -> object:
    """A definition's schema that refuses keys it does not know, and takes Kubernetes' metadata."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(part) for key, part in schema.items()}
    if isinstance(made.get("properties"), dict) and made["properties"] and "additionalProperties" not in made:
        made["additionalProperties"] = False
    return made


def valid() -> Iterator[str]:
    """Every object of every profile is one of Kubernetes' of each version, or of its definition, and nothing in it is unknown."""
    definitions = {path.stem: strict(json.loads(path.read_text())) for path in CRDS.glob("*.json")}
    for profile in PROFILES:
        for document in objects(values(profile)):
            yield from (f"{profile}: {fault}" for fault in invalid(document, definitions))
    # And this check itself finds what is wrong.
    for document in objects(values("everything")):
        for part in (document, document.get("spec")):
            if part is not None:
                part["nonsense"] = 1
                if len(list(invalid(document, definitions))) < (1 if is_custom(document) else len(VERSIONS)):
                    yield f"{named(document)}: a key that is not known is not found"
                del part["nonsense"]


def is_custom(document: Object) -> bool:
    return document["apiVersion"].startswith(("monitoring.coreos.com/", "cert-manager.io/"))


def invalid(document: Object, definitions: dict) -> Iterator[str]:
    if is_custom(document):
        checker = jsonschema.Draft202012Validator(definitions[document["kind"].lower()])
        yield from (f"{named(document)}: {'.'.join(map(str, error.path))}: {error.message}" for error in checker.iter_errors(document))
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except Exception as error:  # noqa: BLE001 - an unknown kind or version, too
            yield f"{version}: {named(document)}: {error}"


def sound() -> Iterator[str]:
    """What Kubernetes' schemas do not say: names that must meet, bounds that must fit, pods that are `restricted`."""
    for profile in PROFILES:
        documents = objects(values(profile))
        for fault in unsound(documents):
            yield f"{profile}: {fault}"


def seconds(duration: str) -> float:
    return float(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def quantity(text: str | int) -> float:
    number, unit = re.match(r"([\d.]+)(\w*)", str(text)).groups()
    return float(number) * {"": 1, "m": 0.001, "Mi": 2**20, "Gi": 2**30}[unit]


def unsound(documents: list[Object]) -> Iterator[str]:
    deployments, scalers = of_kind(documents, "Deployment"), of_kind(documents, "HorizontalPodAutoscaler")
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    yield from (f"{name} is there twice" for name in set(names) if names.count(name) > 1)
    templates = {named(deployment): deployment["spec"]["template"] for deployment in deployments}
    pods = {**templates, **{named(pod): pod for pod in of_kind(documents, "Pod")}}
    config = next((yaml.safe_load(document["data"]["weir.yaml"]) for document in of_kind(documents, "ConfigMap") if "weir.yaml" in document["data"]), None)
    asked: dict[str, float] = {"pods": 0}
    for deployment in deployments:
        spec, labels = deployment["spec"], deployment["spec"]["template"]["metadata"]["labels"]
        if not spec["selector"]["matchLabels"].items() <= labels.items():
            yield f"{named(deployment)} does not select its own pods"
        scaler = next((scaler for scaler in scalers if scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]), None)
        if (scaler is None) != ("replicas" in spec):
            yield f"{named(deployment)}: replicas are the autoscaler's, or the chart's"
        most = scaler["spec"]["maxReplicas"] if scaler else spec["replicas"]
        surge = str(spec.get("strategy", {}).get("rollingUpdate", {}).get("maxSurge", "25%"))
        most += -(-most * int(surge[:-1]) // 100) if surge.endswith("%") else int(surge)
        asked["pods"] += most
        for container in spec["template"]["spec"]["containers"]:
            for bound, amounts in container["resources"].items():
                for resource, amount in amounts.items():
                    key = f"{bound}.{resource}"
                    asked[key] = asked.get(key, 0) + most * quantity(amount)
        if labels["app.kubernetes.io/component"] == "proxy":
            grace, shutdown = spec["template"]["spec"]["terminationGracePeriodSeconds"], config["shutdown"]
            if grace < seconds(shutdown["propagation_delay"]) + seconds(shutdown["drain"]) + 5:
                yield f"{named(deployment)} is killed after {grace} s, before it has drained"
            container = spec["template"]["spec"]["containers"][0]
            if "cpu" not in container["resources"].get("limits", {}) and "lanes" not in config.get("runtime", {}):
                yield f"{named(deployment)} has as many lanes as the node has cores"
            wanted = [int(listener["address"].rpartition(":")[2]) for listener in config["listeners"] if not listener["address"].startswith("unix:")]
            opened = [port["containerPort"] for port in container["ports"] if port["name"] not in ("admin", "metrics")]
            if wanted != opened:
                yield f"{named(deployment)} listens at {wanted}, and its container opens {opened}"
    for quota in of_kind(documents, "ResourceQuota"):
        for key, bound in quota["spec"]["hard"].items():
            if key in asked and asked[key] > quantity(bound):
                yield f"the quota's {key} is {bound}, and {asked[key]:g} may be asked for"
    for kind, found in (("Service", lambda spec: spec["selector"]), ("PodDisruptionBudget", lambda spec: spec["selector"]["matchLabels"]),
                        ("NetworkPolicy", lambda spec: spec["podSelector"]["matchLabels"])):
        for document in of_kind(documents, kind):
            selected = [pod for pod in pods.values() if found(document["spec"]).items() <= pod["metadata"]["labels"].items()]
            if len(selected) != 1:
                yield f"{named(document)} selects {len(selected)} kinds of pods"
                continue
            ports = {port["name"] for container in selected[0]["spec"]["containers"] for port in container.get("ports", [])}
            wanted = [port["targetPort"] for port in document["spec"].get("ports", [])]
            wanted += [port["port"] for rule in document["spec"].get("ingress", []) for port in rule["ports"]] if kind == "NetworkPolicy" else []
            yield from (f"{named(document)}: the pods have no port {port}" for port in wanted if port not in ports)
    services = {document["metadata"]["name"]: {port["name"] for port in document["spec"]["ports"]} for document in of_kind(documents, "Service")}
    for ingress in of_kind(documents, "Ingress"):
        for backend in (path["backend"]["service"] for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]):
            if backend["port"]["name"] not in services.get(backend["name"], set()):
                yield f"{named(ingress)}: no service {backend}"
    for monitor in of_kind(documents, "ServiceMonitor"):
        labels = monitor["spec"]["selector"]["matchLabels"]
        seen = [document for document in of_kind(documents, "Service") if labels.items() <= document["metadata"]["labels"].items()]
        jobs = {document["metadata"]["labels"].get(monitor["spec"]["jobLabel"], document["metadata"]["name"]) for document in seen}
        if jobs != {"weir"}:
            yield f"the alerts do not know the jobs {jobs}"
        if len(seen) != sum("metrics" in service for service in services):
            yield f"the ServiceMonitor sees {[named(document) for document in seen]}"
    yield from untrue(documents)
    for name, pod in pods.items():
        yield from (f"{name}: {fault}" for fault in unrestricted(pod["spec"]))
        if pod["spec"].get("automountServiceAccountToken") is not False:
            yield f"{name} mounts a token that it does not need"
    yield from (f"{named(document)}: weir needs no rights" for document in documents if "Role" in document["kind"])


def untrue(documents: list[Object]) -> Iterator[str]:
    """What the API server is told of the injector and does not hold: its Service, its certificate, and that it never waits for itself."""
    for configuration in of_kind(documents, "MutatingWebhookConfiguration"):
        hook, deployment = configuration["webhooks"][0], next(found for found in of_kind(documents, "Deployment") if found["metadata"]["name"].endswith("-injector"))
        asked, spec = hook["clientConfig"]["service"], deployment["spec"]["template"]["spec"]
        services = [found for found in of_kind(documents, "Service") if found["metadata"]["name"] == asked["name"]]
        if [port["port"] for service in services for port in service["spec"]["ports"]] != [asked["port"]] or asked["namespace"] != NAMESPACE:
            yield f"{named(configuration)} asks {asked}, which is no Service"
        by_name = [its for its in hook["namespaceSelector"]["matchExpressions"] if (its["key"], its["operator"]) == ("kubernetes.io/metadata.name", "NotIn")]
        if not any({NAMESPACE, "kube-system"} <= set(excluded["values"]) for excluded in by_name):
            yield f"{named(configuration)} holds for the namespace of its own pods"
        mounted = next(volume["secret"]["secretName"] for volume in spec["volumes"] if volume["name"] == "tls")
        source = configuration["metadata"].get("annotations", {}).get("cert-manager.io/inject-ca-from")
        certificates = {f"{NAMESPACE}/{found['metadata']['name']}": found["spec"] for found in of_kind(documents, "Certificate")}
        if source is None:
            if "caBundle" not in hook["clientConfig"]:
                yield f"{named(configuration)} trusts nothing"
        elif certificates[source]["secretName"] != mounted or f"{asked['name']}.{NAMESPACE}.svc" not in certificates[source]["dnsNames"]:
            yield f"{named(configuration)}: the certificate {source} is not what the injector shows"
        issuers = {found["metadata"]["name"] for found in of_kind(documents, "Issuer")}
        yield from (f"{name} has no issuer" for name, wanted in certificates.items() if issuers and wanted["issuerRef"]["name"] not in issuers)


def unrestricted(spec: Object) -> Iterator[str]:
    """What PodSecurity `restricted` refuses."""
    if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares a namespace of the host"
    allowed = {"configMap", "emptyDir", "projected", "secret", "downwardAPI", "ephemeral", "persistentVolumeClaim", "csi"}
    for volume in spec.get("volumes", []):
        yield from (f"volume {kind}" for kind in volume if kind != "name" and kind not in allowed)
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        context = container.get("securityContext", {})
        if context.get("privileged") or context.get("allowPrivilegeEscalation") is not False or context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{container['name']} has privileges"
        if not context.get("runAsNonRoot") or context.get("runAsUser") == 0 or context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{container['name']} is not restricted"
        if not context.get("readOnlyRootFilesystem"):
            yield f"{container['name']} may write to its root"


def configured(weir: Path) -> Iterator[str]:
    """`weir check` takes the file of every profile, and of those whose only upstream has another name than the chart's."""
    another = {"config": {"upstreams": {"shop": {"endpoints": ["http://shop:80"]}}}}
    for profile, given in {**{profile: values(profile) for profile in PROFILES}, "another upstream": another}.items():
        for document in of_kind(objects(given), "ConfigMap"):
            if "weir.yaml" not in document["data"]:
                continue
            with tempfile.TemporaryDirectory(prefix="weir-kube-") as name:
                for secret, text in (("admin-token", "t0ken"), ("redis-password", "s3cret"), ("audit-key", "k3y"), ("database-url", "postgres://weir:pw@db/weir")):
                    (Path(name) / secret).write_text(text + "\n")
                running.certificate(Path(name))
                file = Path(name) / "weir.yaml"
                file.write_text(re.sub("/etc/weir/(secrets|tls)", name, document["data"]["weir.yaml"]))
                environment = {**os.environ, "APP_HOST": "app", "DATABASE_URL": "postgres://weir:pw@db/weir"}
                said = subprocess.run([weir, "check", "-c", file], capture_output=True, text=True, env=environment)
                if said.returncode != 0:
                    yield f"{profile}: {said.stdout}{said.stderr}"


def selects(selector: dict, labels: dict) -> bool:
    """Whether what the chart's PodMonitor is given selects a pod."""
    among = all(labels.get(it["key"]) in it["values"] for it in selector["matchExpressions"] if it["operator"] == "In")
    return among and selector["matchLabels"].items() <= labels.items()


def beside() -> Iterator[str]:
    """The patch in docs/kubernetes.md makes a Deployment with a sidecar that Kubernetes takes, `restricted`."""
    page = (ROOT / "docs/kubernetes.md").read_text()
    patch = yaml.safe_load(re.search(r"^\$ cat sidecar.yaml\n(.*?)^```", page, re.M | re.S)[1])
    app = {"name": "app", "image": "app:1"}
    labels = {"app": "shop"}
    template = merged(patch["spec"]["template"], {"metadata": {"labels": labels}, "spec": {"containers": [app]}})
    document = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "app"}, "spec": {"selector": {"matchLabels": labels}, "template": template}}
    yield from invalid(document, {})
    sidecar = template["spec"]["initContainers"][0]
    yield from unrestricted({**template["spec"], "initContainers": [], "containers": [sidecar]})
    monitor = values_of_chart()["monitoring"]["podMonitor"]
    if not selects(monitor, template["metadata"]["labels"]) or monitor["port"] not in [port["name"] for port in sidecar["ports"]]:
        yield "the chart's PodMonitor does not see it"


def canary() -> Iterator[str]:
    """The command in docs/rollout.md, beside the production profile: one proxy that enforces, a share of the host's traffic, and nothing that the first release has."""
    page = (ROOT / "docs/rollout.md").read_text()
    shown, command = re.search(r"^\$ cat canary.yaml\n(.*?)^\$ (helm install weir-canary .*?)^```", page, re.M | re.S).groups()
    words = shlex.split(command.replace("\\\n", " "))
    given: dict = {}
    for flag, word in zip(words, words[1:]):
        if flag == "-f":
            given = merged({"mine.yaml": values("production"), "canary.yaml": yaml.safe_load(shown)}[word], given)
        elif flag in ("--set", "--set-string"):
            for assignment in word.split(","):
                key, _, value = assignment.partition("=")
                told: object = value if flag == "--set-string" else yaml.safe_load(value)
                for part in reversed(re.split(r"(?<!\\)\.", key)):
                    told = {part.replace("\\.", "."): told}
                given = merged(told, given)
    made, first = objects(given, words[2]), objects(values("production"))
    twice = {(it["kind"], it["metadata"]["name"]) for it in made} & {(it["kind"], it["metadata"]["name"]) for it in first}
    yield from (f"{' '.join(it)} is of both releases" for it in sorted(twice))
    for kind in ("HorizontalPodAutoscaler", "MutatingWebhookConfiguration", "ResourceQuota", "LimitRange", "PodMonitor", "PrometheusRule", "Certificate"):
        yield from (f"{named(document)} is there" for document in of_kind(made, kind))
    deployments = {document["metadata"]["name"]: document["spec"].get("replicas") for document in of_kind(made, "Deployment")}
    if deployments != {"weir-canary-proxy": 1}:
        yield f"the Deployments are {deployments}"
    [ingress], [main] = of_kind(made, "Ingress"), of_kind(first, "Ingress")
    said = ingress["metadata"]["annotations"]
    if (said.get("nginx.ingress.kubernetes.io/canary"), said.get("nginx.ingress.kubernetes.io/canary-weight")) != ("true", "5"):
        yield f"the Ingress has {said}"
    if "cert-manager.io/cluster-issuer" in said or [rule["host"] for rule in ingress["spec"]["rules"]] != [rule["host"] for rule in main["spec"]["rules"]]:
        yield "the Ingress is not beside the first one's"
    if "enforce" not in json.dumps([document for document in made if document["kind"] == "ConfigMap"]):
        yield "nothing is enforced"
    yield from (fault for document in made if not is_custom(document) for fault in invalid(document, {}))


def values_of_chart() -> dict:
    return yaml.safe_load((CHART / "values.yaml").read_text())


def every_family(weir: Path) -> Iterator[str]:
    """What the chart says takes IPv4 and IPv6, and on a node without IPv6 still IPv4."""
    for profile in set(PROFILES) - {"everything"}:
        yield from (f"{profile}: {named(document)} listens by IPv4 alone" for document in objects(values(profile)) if "0.0.0.0:" in json.dumps(document))
    for url, before in (("http://127.0.0.1", None), ("http://[::1]", None), ("http://127.0.0.1", running.without_ipv6)):
        with tempfile.TemporaryDirectory(prefix="weir-kube-") as name, ExitStack() as stack:
            listener, metrics, admin = (running.free_port() for _ in range(3))
            file = Path(name) / "weir.yaml"
            given = {"config": {"listeners": [{"name": "inbound", "address": f"[::]:{listener}"}], "routes": [{"reply": {"status": 200, "body": "ok"}}]}, "ports": {"metrics": metrics, "admin": admin}}
            file.write_text(of_kind(objects(given), "ConfigMap")[0]["data"]["weir.yaml"])
            proxy = running.start(stack, Path(name) / "proxy.log", [weir, "proxy", "-c", file], before)
            try:
                for port in (listener, metrics):
                    running.eventually(f"{url}:{port} answers", lambda url=f"{url}:{port}/metrics": running.get(url)[0] == 200 or proxy.poll() is not None)
            except RuntimeError as error:
                yield f"{error}\n{running.told(Path(name))}"
            if proxy.poll() is not None:
                yield f"the proxy has ended\n{running.told(Path(name))}"


def started(weir: Path) -> Iterator[str]:
    """What the dev profile's Deployment runs serves, its probes pass, and it ends in time; ports and folders apart, as in a pod."""
    documents = objects(values("dev"))
    pod = next(document for document in of_kind(documents, "Deployment") if document["metadata"]["name"] == "weir-proxy")["spec"]["template"]["spec"]
    container, echo = pod["containers"][0], running.free_port()
    with tempfile.TemporaryDirectory(prefix="weir-kube-") as name, ExitStack() as stack:
        text = next(document for document in of_kind(documents, "ConfigMap") if "weir.yaml" in document["data"])["data"]["weir.yaml"]
        ports = {port: running.free_port() for port in (8080, 9901, 9902)}
        for port, free in ports.items():
            text = text.replace(f":{port}", f":{free}")
        file = Path(name) / "weir.yaml"
        file.write_text(text.replace("weir-echo:80", f"127.0.0.1:{echo}").replace("/var/lib/weir", name))
        running.start(stack, Path(name) / "echo.log", [weir, "echo", "--address", f"127.0.0.1:{echo}"])
        proxy = running.start(stack, Path(name) / "proxy.log", [weir, *(word.replace("/etc/weir/config", name) for word in container["args"])])
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            command = [word.replace("9901", str(ports[9901])) for word in container[probe]["exec"]["command"]]
            asked = lambda command=command: subprocess.run([weir, *command[1:]], capture_output=True).returncode == 0  # noqa: E731
            try:
                running.eventually(f"{probe} passes", lambda asked=asked: asked() or proxy.poll() is not None)
            except RuntimeError as error:
                yield f"{error}\n{running.told(Path(name))}"
                return
            if proxy.poll() is not None:
                yield f"the proxy has ended\n{running.told(Path(name))}"
                return
        found = [running.get(f"http://127.0.0.1:{ports[8080]}/limited")[0] for _ in range(6)]
        if found != [200] * 5 + [429]:
            yield f"/limited is answered with {found}, not as docs/kubernetes.md says"
        if running.get(f"http://127.0.0.1:{ports[9902]}/metrics")[0] != 200:
            yield "the metrics port does not serve metrics"
        proxy.terminate()
        if proxy.wait(pod["terminationGracePeriodSeconds"]) != 0:
            yield f"the proxy ends with {proxy.returncode}"


def installed_rules() -> Iterator[str]:
    """The PrometheusRule is what promtool takes, has the alerts that were not left out, and links to where it was told."""
    given = values("everything")
    rule = of_kind(objects(given), "PrometheusRule")[0]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(rule["spec"], file)
        file.flush()
        said = subprocess.run(["promtool", "check", "rules", file.name], capture_output=True, text=True)
    if said.returncode != 0:
        yield said.stdout + said.stderr
    alerts = {rule["alert"]: rule for group in rule["spec"]["groups"] for rule in group["rules"]}
    source = yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text())
    if set(alerts) != {rule["alert"] for group in source["groups"] for rule in group["rules"]} - {"WeirAbsent"}:
        yield "alerts are missing, or one that was left out is there"
    base = given["monitoring"]["prometheusRule"]["runbookBase"]
    yield from (f"{name}: {alert['annotations']['runbook_url']}" for name, alert in alerts.items() if not alert["annotations"]["runbook_url"].startswith(base))


def policy() -> Iterator[str]:
    """checkov finds nothing but what tests/kube/checkov.yaml explains."""
    explained = yaml.safe_load((ROOT / "tests/kube/checkov.yaml").read_text())
    directory = ROOT / "target/kube/rendered"
    directory.mkdir(parents=True, exist_ok=True)
    for profile in PROFILES:
        (directory / f"{profile}.yaml").write_text(yaml.safe_dump_all(objects(values(profile))))
    checkov = Path(sys.executable).with_name("checkov")
    said = subprocess.run([checkov, "--framework", "kubernetes", "--skip-download", "--compact", "--quiet", "-o", "json", "-d", directory], capture_output=True, text=True)
    try:
        found = json.loads(said.stdout)
        checked, failed = found["summary"]["passed"], found["results"]["failed_checks"]
    except (ValueError, KeyError, TypeError):
        yield f"checkov says nothing to read: {said.stdout[-500:]}{said.stderr[-500:]}"
        return
    if checked < 100:
        yield f"checkov looked at too little: {found['summary']}"
    met = set()
    for fault in failed:
        if fault["check_id"] in explained:
            met.add(fault["check_id"])
        else:
            yield f"{fault['check_id']} {fault['check_name']}: {Path(fault['file_path']).name} {fault['resource']}"
    yield from (f"tests/kube/checkov.yaml explains {check}, which is not found any more" for check in set(explained) - met)
