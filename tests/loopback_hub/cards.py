"""What the Hub demands of a card's metadata, as far as its documentation says."""

import re
from typing import Any

import yaml

LICENSES = {
    "apache-2.0",
    "mit",
    "llama3.2",
    "gemma",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "bsd-3-clause",
    "openrail",
    "other",
    "unknown",
}
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")


def card_errors(content: str) -> list[str]:
    """Every reason why the Hub would refuse the card."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", content, re.DOTALL)
    if not found:
        return ["no metadata block"]
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"metadata is not YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    return [message for key, value in data.items() for message in _field_errors(str(key), value, data)]


def _field_errors(key: str, value: Any, data: dict[str, Any]) -> list[str]:
    if key == "license":
        if value not in LICENSES:
            return [f"license {value!r} is not known"]
        named = data.get("license_name") and str(data.get("license_link", "")).startswith(("http", "LICENSE"))
        return [] if value != "other" or named else ["license other needs license_name and license_link"]
    if key in {"base_model", "datasets"}:
        values = value if isinstance(value, list) else [value]
        return [
            f"{key}: {item!r} is not a repository"
            for item in values
            if not isinstance(item, str) or not _ID.fullmatch(item)
        ]
    if key == "base_model_relation":
        return [] if value in RELATIONS and data.get("base_model") else [f"base_model_relation {value!r}"]
    if key == "tags":
        return (
            [] if isinstance(value, list) and all(isinstance(item, str) for item in value) else ["tags must be texts"]
        )
    if key in {"library_name", "pipeline_tag", "license_name", "license_link"}:
        return [] if isinstance(value, str) and "\n" not in value else [f"{key} must be a line of text"]
    if key == "language":
        return [] if re.fullmatch(r"[a-z]{2,3}|code|multilingual", str(value)) else [f"language {value!r}"]
    if key == "model-index":
        return _index_errors(value)
    return [f"unexpected field {key}"]


def _index_errors(index: Any) -> list[str]:
    try:
        for model in index:
            assert isinstance(model["name"], str), "name"
            for result in model["results"]:
                assert isinstance(result["task"]["type"], str), "task.type"
                assert isinstance(result["dataset"]["name"], str), "dataset.name"
                assert isinstance(result["dataset"]["type"], str), "dataset.type"
                for metric in result["metrics"]:
                    assert isinstance(metric["type"], str), "metric.type"
                    assert isinstance(metric["value"], (int, float)), "metric.value"
                    assert "verified" not in metric, "metric.verified is the Hub's"
                    assert "verifyToken" not in metric, "metric.verifyToken is the Hub's"
    except (AssertionError, KeyError, TypeError) as error:
        return [f"model-index: {error}"]
    return []
