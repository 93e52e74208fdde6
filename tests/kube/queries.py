"""What dashboards and rules ask Prometheus for: parsed by promtool, and every metric, label and value found in what weir exports."""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from running import Exported

# What Prometheus or its scrape configuration adds to every series.
TARGET = {"namespace", "job", "instance", "pod", "container", "le"}
# What others export, with the labels that are asked for: Prometheus itself, and the kubelet (cAdvisor).
OTHERS = {
    "up": TARGET, "ALERTS": {"alertname", "alertstate"},
    "container_cpu_usage_seconds_total": TARGET, "container_cpu_cfs_periods_total": TARGET,
    "container_cpu_cfs_throttled_periods_total": TARGET, "container_memory_working_set_bytes": TARGET,
}
WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless", "offset", "bool", "inf", "nan"}
# Labels whose values weir says itself; those of others are names of the configuration.
CLOSED = {"state", "decision", "result", "outcome", "event", "cap", "class", "client", "version", "session"}


def of_dashboard(path: Path) -> Iterator[tuple[str, str]]:
    """(where, expression), with Grafana's variables filled in."""
    dashboard = json.loads(path.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "5m").replace("$__interval", "1m")
            yield f"{path.name}: {panel['title']}", re.sub(r"\$(namespace|job|instance)\b", ".*", expression)
    for variable in dashboard["templating"]["list"]:
        if asked := re.match(r"label_values\((.*), (\w+)\)$", variable.get("definition", "")):
            selector = re.sub(r"\$\w+", ".*", asked[1])
            yield f"{path.name}: variable {variable['name']}", f"sum by ({asked[2]}) ({selector})"


def of_rules(path: Path) -> Iterator[tuple[str, str]]:
    for group in yaml.safe_load(path.read_text())["groups"]:
        for rule in group["rules"]:
            yield f"{path.name}: {rule.get('alert', rule.get('record'))}", rule["expr"]


def unparsed(queries: list[tuple[str, str]]) -> str | None:
    """What promtool says of them, unless it takes all."""
    rules = [{"record": f"query:{number}", "expr": expression} for number, (_, expression) in enumerate(queries)]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}, file)
        file.flush()
        said = subprocess.run(["promtool", "check", "rules", "--lint=none", file.name], capture_output=True, text=True)
    if said.returncode == 0:
        return None
    named = [f"{number}: {where}: {expression}" for number, (where, expression) in enumerate(queries)]
    return said.stdout + said.stderr + "\n".join(named)


def faults(where: str, expression: str, exported: Exported) -> Iterator[str]:
    """Metrics, labels and values in one expression that weir does not export."""
    asked: set[str] = set()
    grouped: set[str] = set()

    def selector(found: re.Match[str]) -> str:
        name = found[1]
        asked.add(name)
        labels = OTHERS[name] if name in OTHERS else TARGET | set(exported.get(name, {}))
        for label, operator, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"', found[2]):
            problems.extend([f"{where}: {name} has no label {label}"] if label not in labels else [])
            if label in CLOSED and name in exported:
                values = exported[name].get(label, set())
                for one in value.split("|"):
                    problems.extend([f"{where}: {name} has no {label} {one!r}: {sorted(values)}"] if one not in values else [])
        return " "

    problems: list[str] = []
    text = re.sub(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}", selector, expression)
    text = re.sub(r'"(?:[^"\\]|\\.)*"', " ", text)

    def grouping(found: re.Match[str]) -> str:
        if found[1] != "without":
            grouped.update(label.strip() for label in found[2].split(",") if label.strip())
        return " "

    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", grouping, text)
    text = re.sub(r"\[[^\]]*\]|\boffset\s+\w+", " ", text)
    for name in re.findall(r"(?<![\w:.])([a-zA-Z_:][\w:]*)(?!\s*\(|[\w:])", text):
        if name not in WORDS:
            asked.add(name)
    for name in asked - set(OTHERS) - set(exported):
        problems.append(f"{where}: weir exports no {name}")
    known = TARGET.union(*(exported.get(name, {}) for name in asked))
    problems.extend(f"{where}: by {label}, which no metric here has" for label in grouped - known)
    yield from problems


def overlaps(path: Path) -> Iterator[str]:
    """Faults of the dashboard itself: ids that are not unique, panels that overlap or leave the grid, queries without a data source."""
    dashboard = json.loads(path.read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    if len(ids) != len(set(ids)):
        yield f"{path.name}: ids are not unique"
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        if at["x"] + at["w"] > 24:
            yield f"{path.name}: {panel['title']} leaves the grid"
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            if other := taken.setdefault(cell, panel["title"]):
                if other != panel["title"]:
                    yield f"{path.name}: {panel['title']} overlaps {other}"
        for part in [panel, *panel.get("targets", [])]:
            if panel["type"] != "row" and part["datasource"]["uid"] != "${datasource}":
                yield f"{path.name}: {panel['title']} does not use the variable's data source"
