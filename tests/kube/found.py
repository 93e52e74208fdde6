"""What the chart makes of what Helm finds in the cluster: how many pods there are, and the injector's certificate."""

import base64
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import yaml
from helm_python.chart import Chart

import chart
from chart import Object


def looked_up(template: str, found: Object, given: dict) -> object:
    """What Helm makes of a template that is given what `lookup` would find, which this engine does not look for."""
    with tempfile.TemporaryDirectory(prefix="weir-kube-") as name:
        copy = Path(name) / "weir"
        shutil.copytree(chart.packed(), copy)
        (copy / "templates/found.yaml").write_text(template + "\n")
        with Chart.load(copy) as loaded:
            return yaml.safe_load(loaded.render({**given, "global": {"found": found}}, name="weir", namespace=chart.NAMESPACE)["weir/templates/found.yaml"])


def certificate(found: Object) -> Object:
    """What Helm makes of the injector's certificate, where the cluster has this Secret."""
    return looked_up('{{ include "weir.injectorCertificate" (list . .Values.global.found) }}', found, {})


def scaled() -> Iterator[str]:
    """A Deployment that an autoscaler takes over keeps the pods that it has: one without `replicas` would be cut to 1."""
    for autoscaling, found, expected in (
        (False, {"spec": {"replicas": 40}}, 3),
        (True, {"spec": {"replicas": 40}}, 40),
        (True, {"spec": {"replicas": 0}}, 0),
        (True, {}, None),
    ):
        given = {"proxy": {"replicaCount": 3, "autoscaling": {"enabled": autoscaling}}}
        if (pods := looked_up('{{ include "weir.replicas" (list .Values.proxy .Values.global.found) }}', found, given)) != expected:
            yield f"with {found}, autoscaling {autoscaling}: {pods} replicas, not {expected}"
    documents = chart.objects({"proxy": {"autoscaling": {"enabled": True}}})
    for deployment in chart.of_kind(documents, "Deployment"):
        if "replicas" in deployment["spec"]:
            yield f"{chart.named(deployment)}: replicas are made up where none is found"
    # One that may have several pods wants a budget for them, whatever the fewest.
    for fewest, most, budgets in ((1, 8, 1), (1, 1, 0), (2, 8, 1)):
        given = {"proxy": {"autoscaling": {"enabled": True, "minReplicas": fewest, "maxReplicas": most}}}
        if len(chart.of_kind(chart.objects(given), "PodDisruptionBudget")) != budgets:
            yield f"{given}: not {budgets} PodDisruptionBudgets"
    # Memory that a proxy has taken for keys it does not give back, so that by memory pods are added and never taken away.
    for scaler in chart.of_kind(documents, "HorizontalPodAutoscaler"):
        by = [metric["containerResource"]["name"] for metric in scaler["spec"]["metrics"]]
        if by != ["cpu"]:
            yield f"unless told, {chart.named(scaler)} goes by {by}"


def certified() -> Iterator[str]:
    """The injector's certificate is for its Service, is kept for two thirds of its time, and the API server trusts the old beside the new."""
    first = certificate({})
    secret = lambda renew_after: {"metadata": {"annotations": {"weir.dev/renew-after": renew_after}}, "data": first["data"]}  # noqa: E731
    days = (date.fromisoformat(first["annotations"]["weir.dev/renew-after"]) - date.today()).days
    if not 242 <= days <= 244:
        yield f"of 365 days, it is renewed after {days}"
    kept = certificate(secret((date.today() + timedelta(1)).isoformat()))
    if (kept["data"], kept["bundle"]) != (first["data"], first["bundle"]):
        yield "it is made anew before its time"
    renewed = certificate(secret((date.today() - timedelta(1)).isoformat()))
    for due in (renewed, certificate({"metadata": {}, "data": first["data"]})):
        if due["data"]["tls.crt"] == first["data"]["tls.crt"]:
            yield "it is not made anew at its time"
    torn = secret("2999-01-01")
    torn["data"] = {**first["data"], "tls.key": ""}
    if certificate(torn)["data"]["tls.crt"] == first["data"]["tls.crt"]:
        yield "a Secret without a key is kept"
    service = chart.of_kind(chart.objects({"injector": {"enabled": True}}), "MutatingWebhookConfiguration")[0]["webhooks"][0]["clientConfig"]["service"]
    host = f"{service['name']}.{service['namespace']}.svc"
    with tempfile.TemporaryDirectory(prefix="weir-kube-") as name:
        for trusted, served, holds in ((first, first, True), (renewed, renewed, True), (renewed, first, True), (first, renewed, False)):
            (Path(name) / "bundle").write_bytes(base64.b64decode(trusted["bundle"]))
            (Path(name) / "served").write_bytes(base64.b64decode(served["data"]["tls.crt"]))
            command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", host, "-CAfile", "bundle", "served"]
            said = subprocess.run(command, cwd=name, capture_output=True, text=True)
            if (said.returncode == 0) != holds:
                yield f"{host}: {said.stdout}{said.stderr}"
