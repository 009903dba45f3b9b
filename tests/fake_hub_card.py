"""What the fake Hub says of a model card: errors in its metadata stop a commit, warnings do not."""

import re

import yaml

# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other
"""


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
        if name not in LICENSES.split():
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
