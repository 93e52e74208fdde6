"""Values that are right and unusual: they come out of the templates as what they are."""

import json
from collections.abc import Iterator

import yaml

import chart


class Loader(yaml.SafeLoader):
    """Refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key) for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{twice} twice at line {node.start_mark.line}")
        return super().construct_mapping(node, deep)


Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, lambda loader, node: loader.construct_mapping(node, deep=True))


def objects(given: dict, name: str = "weir", namespace: str = chart.NAMESPACE) -> list[dict]:
    texts = (text for path, text in chart.render(given, name, namespace).items() if path.endswith(".yaml"))
    return [document for text in texts for document in yaml.load_all(text, Loader) if document]  # noqa: S506 - a SafeLoader


def told() -> Iterator[str]:
    """Names and texts that YAML would take for a number or a word stay texts."""
    definitions = {path.stem: chart.strict(json.loads(path.read_text())) for path in chart.CRDS.glob("*.json")}
    everything = chart.values("everything")
    [inbound, plain, local] = everything["config"]["listeners"]
    parts: dict = {
        "nameOverride": "0x1f",
        "image": {"tag": "1.20", "digest": ""},
        "tls": {"existingSecret": "2024"},
        "secrets": {"adminToken": {"existingSecret": "1e3", "key": "null"}, "redisPassword": {"existingSecret": "123", "key": "true"}},
        "config": {"listeners": [{**inbound, "name": "on"}, {**plain, "name": "yes"}, local]},
        "injector": {"priorityClassName": "0", "serviceAccount": {"name": "7"}, "certificates": {"certManager": {"enabled": True}}},
        "monitoring": {"podMonitor": {"port": "null"}},
        "prometheusAdapter": {"configMap": {"enabled": True, "namespace": "11"}},
        "proxy": {
            "priorityClassName": "1", "serviceAccount": {"name": "2"},
            "service": {"type": "LoadBalancer", "loadBalancerClass": "true", "ports": [{"name": "80", "port": 80, "targetPort": "on", "appProtocol": "null"}]},
            "ingress": {"enabled": True, "className": "3", "servicePort": "80", "hosts": [{"host": "a.example.com", "paths": [{"path": "/a: b #c", "pathType": "Exact"}]}]},
        },
        "worker": {"priorityClassName": "4", "serviceAccount": {"create": True, "name": "5"}},
    }
    given = chart.merged(parts, everything)
    for more in ({"fullnameOverride": "null"}, {"fullnameOverride": "on"}, {"fullnameOverride": "edge", "existingConfigMap": "13"}):
        documents = objects(chart.merged(more, given), "123", "456")
        for document in documents:
            yield from (f"{more}: {fault}" for fault in chart.invalid(document, definitions))
            if document["metadata"].get("namespace", "456") not in ("456", "11"):
                yield f"{more}: {document['metadata']}"
    [ingress] = chart.of_kind(documents, "Ingress")
    if ingress["spec"]["rules"][0]["http"]["paths"][0]["path"] != "/a: b #c":
        yield f"{ingress['spec']['rules']}"


def labelled() -> Iterator[str]:
    """No key is there twice, whoever says it, and what is nearest goes before."""
    given = {
        "commonLabels": {"team": "edge", "release": "common"},
        "proxy": {"podLabels": {"team": "proxy"}, "podAnnotations": {"kubectl.kubernetes.io/default-container": "mine", "checksum/config": "mine"}},
        "monitoring": {"labels": {"release": "prometheus"}, "dashboard": {"labels": {"release": "grafana"}}},
        "namespace": {"labels": {"pod-security.kubernetes.io/enforce": "baseline"}},
        "image": {"tag": f"{'a' * 62}--"},
    }
    documents = objects(chart.merged(given, chart.values("everything")))
    labels = {chart.named(document): document["metadata"]["labels"] for document in documents}
    [pod] = [document["spec"]["template"]["metadata"] for document in documents if chart.named(document) == "Deployment weir-dam-proxy"]
    found = {
        "pods": pod["labels"]["team"], "proxy": labels["Deployment weir-dam-proxy"]["team"], "monitor": labels["ServiceMonitor weir-dam"]["release"],
        "dashboard": labels["ConfigMap weir-dam-dashboard"]["release"], "namespace": labels["Namespace weir"]["pod-security.kubernetes.io/enforce"],
        "version": pod["labels"]["app.kubernetes.io/version"], "container": pod["annotations"]["kubectl.kubernetes.io/default-container"],
    }
    wanted = {"pods": "proxy", "proxy": "edge", "monitor": "prometheus", "dashboard": "grafana", "namespace": "baseline", "version": "a" * 62, "container": "mine"}
    if found != wanted:
        yield f"{found}"
    if pod["annotations"]["checksum/config"] == "mine":
        yield "pods do not follow the configuration"
    for theirs in ({"configReload": "live"}, {"existingConfigMap": "theirs"}):
        [pod] = [document["spec"]["template"]["metadata"] for document in objects({"proxy": {"podAnnotations": {"checksum/config": "mine"}}, **theirs})
                 if chart.named(document).startswith("Deployment ") and document["spec"]["template"]["spec"]["containers"][0]["name"] == "proxy"]
        if pod["annotations"].get("checksum/config") != "mine":
            yield f"{theirs}: pods do not follow what their owner says"


def counted() -> Iterator[str]:
    """A quantity that is a number is the injector's as it was written, as Helm reads it from a file."""
    given = {"injector": {"enabled": True, "sidecar": {"resources": {"requests": {"cpu": 1, "memory": 134217728.0}, "limits": {"cpu": 1.5, "memory": 268435456.0}}}}}
    [deployment] = [document for document in objects(given) if chart.named(document) == "Deployment weir-injector"]
    arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    wanted = {"--cpu-request=1", "--memory-request=134217728", "--cpu-limit=1.5", "--memory-limit=268435456"}
    yield from (f"no {argument}: {arguments}" for argument in wanted - set(arguments))


def monitored() -> Iterator[str]:
    """A PodMonitor that is to look at some namespaces looks at no others, and one without a selector at all pods."""
    some, every = {"namespaceSelector": {"matchNames": ["shop"]}}, {"matchExpressions": []}
    for over, key, wanted in ((some, "namespaceSelector", {"matchNames": ["shop"]}), (every, "selector", {}), ({}, "namespaceSelector", {"any": True})):
        [monitor] = chart.of_kind(objects({"monitoring": {"podMonitor": {"enabled": True, **over}}}), "PodMonitor")
        if monitor["spec"][key] != wanted:
            yield f"{over}: {key} is {monitor['spec'][key]}"
