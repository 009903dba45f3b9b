"""What the fake Hub says of a model card: errors in its metadata stop a commit, warnings do not."""

import re

import yaml

from upcycle.hub.licence import IDENTIFIERS


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings for the text of a README.md."""
    header = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    empty = "empty or missing yaml metadata in repo card"
    if header is None:
        return [], [empty]
    try:
        data = yaml.safe_load(header[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if not data:
        return [], [empty]
    if not isinstance(data, dict):
        return ["metadata must be a mapping"], []
    errors = []
    for name in _list(data.get("license")):
        if name not in {*IDENTIFIERS, "unknown", "other"}:
            errors.append(f'"license" must be one of the known licenses, not {name!r}')
    for name in _list(data.get("base_model")):
        if not isinstance(name, str) or not re.fullmatch(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?", name):
            errors.append(f'"base_model" with value {name!r} is not valid. Use a model id from https://hf.co/models.')
    for key in ("tags", "datasets"):
        if not all(isinstance(item, str) for item in _list(data.get(key))):
            errors.append(f'"{key}" must be an array of strings')
    if not all(isinstance(data.get(key, ""), str) for key in ("library_name", "pipeline_tag")):
        errors.append('"library_name" and "pipeline_tag" must be strings')
    return errors, []


def _list(value: object) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]
