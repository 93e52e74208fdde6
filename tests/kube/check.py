#!/usr/bin/env python3
"""Checks what weir brings for Kubernetes and Prometheus: the chart, the dashboard, the alerts and the schema of its file. `make chart` installs what it needs and runs it.

Each check yields what is wrong; a line a check, and exit 1 if one has found anything.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

import chart
import found
import inject
import odd
import queries
import running
import schema

ROOT = Path(__file__).resolve().parents[2]
RULES, RULES_TEST = ROOT / "deploy/prometheus/rules.yaml", ROOT / "deploy/prometheus/rules_test.yaml"
ADAPTER = ROOT / "deploy/prometheus/adapter.yaml"
DASHBOARD = ROOT / "deploy/grafana/weir.json"


def run(*command: str | Path, cwd: Path = ROOT) -> Iterator[str]:
    """What a command says, if it fails."""
    said = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if said.returncode != 0:
        yield (said.stdout + said.stderr).strip() or f"{command[0]} exits with {said.returncode}"


def dashboard() -> Iterator[str]:
    """The dashboard is what its source makes, and Grafana can draw it."""
    made = ROOT / "target/kube/weir.json"
    made.parent.mkdir(parents=True, exist_ok=True)
    yield from run(sys.executable, ROOT / "deploy/grafana/weir.py", made)
    if made.read_text() != DASHBOARD.read_text():
        yield "deploy/grafana/weir.json is not fresh: make manifests"
    yield from queries.overlaps(DASHBOARD)


def rules() -> Iterator[str]:
    """promtool takes the alerts and passes their tests, and the scrape that docs/docker.md shows; each alert has both kinds of test and a section in the runbook."""
    yield from run("promtool", "check", "rules", RULES)
    yield from run("promtool", "test", "rules", RULES_TEST.name, cwd=RULES.parent)
    shown = re.search(r"^```yaml\n(scrape_configs:.*?)^```", (ROOT / "docs/docker.md").read_text(), re.M | re.S)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(shown)
        file.flush()
        yield from run("promtool", "check", "config", file.name)
    tested = RULES_TEST.read_text()
    sections = {title.lower() for title in re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(), re.M)}
    linked = set()
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            name, said = rule["alert"], rule["annotations"]
            yield from (f"{name}: no {key}" for key in ("summary", "description", "runbook_url") if not said.get(key))
            if rule["labels"].get("severity") not in ("critical", "warning", "info"):
                yield f"{name}: no severity"
            page, _, section = said["runbook_url"].partition("#")
            linked.add(section)
            if page != "docs/runbook.md" or section not in sections:
                yield f"{name}: docs/runbook.md has no section {section}"
            samples = re.findall(rf'alertname="{name}",alertstate="firing"}}\)\', eval_time: \w+, exp_samples: \[(.?)', tested)
            if "]" not in samples or "{" not in samples:
                yield f"{name}: rules_test.yaml must see it both quiet and firing"
    yield from (f"docs/runbook.md: no alert links to {section}" for section in sections - linked)


def asked(weir: Path) -> Iterator[str]:
    """Queries of dashboard and alerts are PromQL, and ask only for metrics, labels and values that a running weir exports."""
    wanted = [*queries.of_dashboard(DASHBOARD), *queries.of_rules(RULES)]
    exported = running.exported(weir)
    for wrong in ("rate(weir_nonsense_total[5m])", "sum by (planet) (weir_breaker_state)", 'weir_breaker_state{state="ajar"}', 'weir_panics_total{planet="x"}'):
        if not list(queries.faults("", wrong, exported)):
            yield f"this check finds nothing wrong with {wrong}"
    # The autoscaler's metric is what prometheus-adapter makes of one that weir exports.
    for rule in yaml.safe_load(ADAPTER.read_text())["rules"]:
        series = re.match(r"\w+", rule["seriesQuery"])[0]
        expression = rule["metricsQuery"].replace("<<.Series>>", series).replace("<<.LabelMatchers>>", 'pod="a"').replace("<<.GroupBy>>", "pod")
        wanted += [("adapter.yaml", rule["seriesQuery"]), ("adapter.yaml", expression)]
        made = re.sub(rule["name"]["matches"], rule["name"]["as"], series)
        scaled = [metric["pods"]["metric"]["name"] for scaler in chart.of_kind(chart.objects(chart.values("production")), "HorizontalPodAutoscaler")
                  for metric in scaler["spec"]["metrics"] if metric["type"] == "Pods"]
        if scaled != [made]:
            yield f"the autoscaler asks for {scaled}, and prometheus-adapter makes {made}"
    if unparsed := queries.unparsed(wanted):
        yield unparsed
    for where, expression in wanted:
        yield from queries.faults(where, expression, exported)


def reference(weir: Path) -> Iterator[str]:
    """docs/reference.md has each metric that a running weir exports, with its labels. tests/reference.rs holds the rest of that page."""
    rows = re.findall(r"^\| `(\w+)` \| (counter|gauge|histogram|info) \|(.*?)\|", (ROOT / "docs/reference.md").read_text(), re.M)
    documented = {name: set(re.findall(r"`(\w+)`", labels)) for name, _, labels in rows}
    for sample, labels in running.exported(weir).items():
        name = next((name for name in (sample, re.sub("_(bucket|sum|count)$", "", sample)) if name in documented), None)
        if name is None:
            yield f"docs/reference.md has no {sample}"
        elif set(labels) - {"le"} != documented[name]:
            yield f"docs/reference.md: {name} has the labels {set(labels)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weir", type=Path, default=ROOT / "target/debug/weir", help="[%(default)s]")
    parser.add_argument("--only", help="the check of that name alone")
    parser.add_argument("--write", action="store_true", help="write what is made of the chart, and check nothing")
    options = parser.parse_args()
    if options.write:
        chart.write()
        return
    checks: dict[str, Callable[[], Iterator[str]]] = {
        "dashboard": dashboard,
        "rules": rules,
        "asked": lambda: asked(options.weir),
        "reference": lambda: reference(options.weir),
        "chart is fresh": chart.fresh,
        "helm lint": chart.linted,
        "mistakes are refused": chart.refused,
        "mends are taken": chart.taken,
        "unusual names": odd.told,
        "labels": odd.labelled,
        "numbers": odd.counted,
        "monitors": odd.monitored,
        "lanes": chart.laned,
        "replicas": found.scaled,
        "migrations": chart.migrates,
        "keys that are taken out": chart.pruned,
        "configuration is held": chart.held,
        "users": chart.anyones,
        "notes": chart.noted,
        "notes of an audit that is lost": chart.warned,
        "schemas": chart.valid,
        "sound": chart.sound,
        "injector's certificate": found.certified,
        "weir check": lambda: chart.configured(options.weir),
        "weir schema": lambda: schema.taken(options.weir),
        "a sidecar by hand": chart.beside,
        "injected": inject.valid,
        "injected is monitored": inject.monitored,
        "a job a workload": inject.jobs,
        "an injected sidecar": lambda: inject.started(options.weir),
        "injected, checkov": inject.policy,
        "the pod's command": lambda: chart.started(options.weir),
        "docs/rollout.md's canary": chart.canary,
        "IPv4 and IPv6": lambda: chart.every_family(options.weir),
        "the injector's arguments": lambda: inject.taken(options.weir),
        "the injector's command": lambda: inject.reviewed(options.weir),
        "PrometheusRule": chart.installed_rules,
        "checkov": chart.policy,
    }
    failed = 0
    chosen = {name: check for name, check in checks.items() if options.only in (None, name)}
    for name, check in chosen.items():
        began = time.monotonic()
        try:
            faults = list(check())
        except Exception:  # noqa: BLE001 - the other checks go on
            faults = [traceback.format_exc()]
        failed += bool(faults)
        print(f"{'FAILED' if faults else 'ok':6} {name} ({time.monotonic() - began:.1f} s)", flush=True)
        for fault in faults:
            print("  " + fault.replace("\n", "\n  "), flush=True)
    print(f"{len(chosen) - failed} passed, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
