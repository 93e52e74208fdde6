"""`weir schema`: what weir takes the schema takes, in the docs' samples and in the files that weir brings."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import yaml

ROOT = Path(__file__).resolve().parents[2]
# Written in other ways than most; weir takes all.
TAKEN = """
rate_limits: {a: {limit: 10, by: path, algorithm: concurrency, hold_ttl: "${TTL:-60s}", mode: "${MODE:-shadow}", accuracy: "${A}"}, b: {limit: [5/s, "${N}/m"], burst: "${B}", by: [path]}}
upstreams: {a: {endpoints: "http://x:1", retries: {retry_on: [503, reset], attempts: "${ATTEMPTS}"}, trust_session_headers: "${TRUST}"}}
circuit_breakers: {c: {window: {type: count, size: 100}, failure_rate: "${RATE:-50%}"}}
runtime: {lanes: "${LANES:-auto}"}
rate_limit_defaults: {max_keys: "${KEYS:-auto}"}
"""
REFUSED = ["runtime: {lanes: many}", "rate_limit_defaults: {max_keys: many}", "shutdown: {drain: 25}", "rate_limits: {a: {limit: 1/s, by: path, mode: off}}", "metrics: {max_series: few}", "listner: x"]


def samples() -> Iterator[tuple[str, object]]:
    """Each with its name: the files that weir brings, and the blocks of YAML in the docs that are of weir's file."""
    for file in [*ROOT.glob("config/*.yaml"), *ROOT.glob("deploy/**/weir.yaml")]:
        yield str(file.relative_to(ROOT)), yaml.safe_load(file.read_text())
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S), 1):
            sample = yaml.safe_load(block)
            if not {"apiVersion", "scrape_configs", "services"} & set(sample):
                yield f"{page.relative_to(ROOT)}, YAML {number}", sample


def taken(weir: Path) -> Iterator[str]:
    schema = json.loads(subprocess.run([weir, "schema"], capture_output=True, check=True).stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for name, sample in [*samples(), ("written in other ways", yaml.safe_load(TAKEN))]:
        for error in validator.iter_errors(sample):
            yield f"{name}: {error.json_path}: {error.message}"
    yield from (f"takes {text}" for text in REFUSED if validator.is_valid(yaml.safe_load(text)))
