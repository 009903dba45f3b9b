"""The model card: written from what an export records, merged with what people have written into it.

A card is YAML metadata and sections between markers. A comment at its end holds a digest of each generated part; what
no longer matches its digest has been edited, and is left as it is.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from upcycle import __version__
from upcycle.errors import UpcycleError
from upcycle.evaluation.flops import PAPER_STEPS, chunked_dit_flops, student_flops_by_tail_drop
from upcycle.evaluation.speed import SPEED
from upcycle.graft.export import PICTURES
from upcycle.graft.plan import full_config
from upcycle.graft.verify import DISTANCE
from upcycle.hub import adapter
from upcycle.hub.adapter import AdapterSource
from upcycle.hub.check import Export, variant_of
from upcycle.hub.licence import card_metadata
from upcycle.info import trained_tail_drops
from upcycle.sources import StudentConfig, hub

NOT_MEASURED = "not measured"
CAPTIONS = {
    "samples.png": "Samples",
    "router.png": "What the router keeps, along the noise levels",
    "compression.png": "Tokens kept against the timestep while sampling",
}
_SECTION = re.compile(r"<!-- upcycle: (\w+) -->\n(.*?)\n<!-- /upcycle: \1 -->", re.DOTALL)
_RECORD = re.compile(r"\n*<!-- upcycle card (\{.*?\}) -->\n*")


@dataclass(frozen=True)
class Card:
    """The generated parts of a card: YAML metadata, and Markdown sections in their order."""

    metadata: dict[str, Any]
    sections: dict[str, str]


def make_card(export: Export, repo_id: str) -> Card:
    """The card of an export that will lie at ``repo_id``."""
    if isinstance(export.source, AdapterSource):
        return _adapter_card(export, export.source, repo_id)
    assert isinstance(export.source.config, StudentConfig)
    config = full_config(export.source.config.values)
    origin = export.origin or {"base": {}, "history": [], "evidence": [], "files": {}}
    sections = {
        "summary": _summary(repo_id, config, origin),
        "use": _use(repo_id, config, export, variant_of(export.files)),
        "pictures": _pictures(export),
        "quality": _quality(origin["evidence"]),
        "cost": _cost(config, export, origin["evidence"]),
        "budget": _budget(config, origin),
        "made": _made(config, origin),
        "limits": _limits(config, origin),
        "licence": _licence(origin["base"].get("licence"), origin["base"]),
    }
    return Card(_metadata(repo_id, config, origin), sections)


def _adapter_card(export: Export, source: AdapterSource, repo_id: str) -> Card:
    origin = export.origin or {"base": {}, "history": [], "evidence": [], "files": {}}
    own = adapter.sections(repo_id, source, export.files)
    sections = {
        "summary": own["summary"],
        "use": own["use"],
        "quality": _quality(origin["evidence"]),
        "cost": own["cost"],
        "schedule": own["schedule"],
        "made": _made({}, origin),
        "limits": adapter.limits(origin),
        "licence": _licence(origin["base"].get("licence"), origin["base"]),
    }
    pipeline_tag, tags = adapter.TAGS[source.config.base_class]
    metadata: dict[str, Any] = card_metadata(origin["base"].get("licence"))
    metadata |= {"library_name": "diffusers", "pipeline_tag": pipeline_tag, "tags": ["upcycle", "ddit", *tags]}
    if _on_hub(origin["base"]):
        metadata |= {"base_model": origin["base"]["id"], "base_model_relation": "adapter"}
    return Card(metadata, sections)


# -- metadata ---------------------------------------------------------------------------------------------------------


def _metadata(repo_id: str, config: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, Any]:
    base = origin["base"]
    metadata: dict[str, Any] = card_metadata(base.get("licence"))
    metadata |= {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["upcycle", "dynamic-chunking", "dit", "class-conditional"],
    }
    if grown_from := _direct_base(origin):
        # Of the relations that the Hub knows (adapter, finetune, merge, quantized) the nearest.
        metadata |= {"base_model": grown_from, "base_model_relation": "finetune"}
    measured = [
        found for found in origin["evidence"] if "data" in found["settings"] and found.get("student") is not None
    ]
    results = [_result(found) for found in measured]
    if results:
        metadata["model-index"] = [{"name": repo_id.split("/")[-1], "results": results}]
    return metadata


def _direct_base(origin: Mapping[str, Any]) -> str | None:
    """The student on the Hub that was trained last, else the teacher there; None where neither has been on the Hub."""
    for event in reversed(origin["history"]):
        if event.get("student_revision") and hub.is_hub_id(str(event.get("student"))):
            return event["student"]
    return origin["base"]["id"] if _on_hub(origin["base"]) else None


def _on_hub(base: Mapping[str, Any]) -> bool:
    return bool(base.get("revision")) and hub.is_hub_id(str(base.get("id")))


def _result(found: Mapping[str, Any]) -> dict[str, Any]:
    data = _name(str(found["settings"].get("data", "not stated")))
    return {
        "task": {"type": "unconditional-image-generation", "name": "class-conditional image generation"},
        "dataset": {"name": data, "type": data},
        "metrics": [{"type": found["metric"], "name": found["metric"], "value": found["student"]}],
    }


# -- sections ---------------------------------------------------------------------------------------------------------


def _summary(repo_id: str, config: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    base = origin["base"]
    name = f"[{base['id']}](https://huggingface.co/{base['id']})" if _on_hub(base) else f"`{_name(base.get('id'))}`"
    if base.get("id") is None:
        name = "a DiT that its files do not name"
    grid = config["sample_size"]
    said = (
        f"# {repo_id.split('/')[-1]}\n\n"
        f"A class-conditional Diffusion Transformer with dynamic chunking, made from {name}{_state(origin)}. "
        "An encoder and a router around the pretrained blocks can keep few tokens where the image is smooth or still "
        "noise, and many where there is detail (DC-DiT, [arXiv 2603.06351](https://arxiv.org/abs/2603.06351)). "
        f"The router is set to keep one of {config['ratio']:g} of the {grid}×{grid} positions of a latent as tokens, "
        f"{grid**2 / config['ratio']:.0f} on average"
    )
    counts = [found["settings"].get("tokens_kept") for found in origin["evidence"] if found["metric"] == SPEED]
    said += f"; while sampling it kept {counts[-1]}." if counts and counts[-1] is not None else "."
    return f"{said} Scaffold (encoder and decoder): {config['scaffold']}; router: {config['router']}."


def _state(origin: Mapping[str, Any]) -> str:
    if not origin["history"]:
        return ""
    trained = "post-trained" if _post_trained(origin) else "not trained since its conversion"
    return f" with upcycle {__version__}; {trained}"


def _name(spec: str | None) -> str:
    """The last part of a path: where files lay on somebody's disk says nothing to others."""
    return (spec or "").rstrip("/").rsplit("/", 1)[-1]


def _use(repo_id: str, config: Mapping[str, Any], export: Export, variant: str | None) -> str:
    asked = f'variant="{variant}", ' if variant else ""
    if "model_index.json" not in export.files:
        return (
            "## Use\n\nThe transformer alone, without a VAE:\n\n```python\nfrom diffusers import AutoModel\n\n"
            f'model = AutoModel.from_pretrained("{repo_id}", subfolder="transformer", '
            f"{asked}trust_remote_code=True)\n```"
        )
    labels = [n for n in (207, 360) if n < config["num_classes"]] or list(range(min(2, config["num_classes"])))
    return (
        "## Use\n\n```python\n"
        "import torch\n"
        "from diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", {asked}trust_remote_code=True)\n'
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")\n'
        f"images = pipe(class_labels={labels}, num_inference_steps=50, guidance_scale=4.0).images\n"
        'images[0].save("sample.png")\n```\n\n'
        "The pipeline is diffusers' own `DiTPipeline`; the transformer's code lies beside its weights, which is why "
        "`trust_remote_code` is needed. (diffusers remarks on `auto_map` and on the transformer's type; both are as "
        "they should be.)"
    )


def _pictures(export: Export) -> str:
    there = [name for name in CAPTIONS if f"{PICTURES}/{name}" in export.files]
    if not there:
        return "## Pictures\n\nSamples, router maps, compression against t: none were drawn."
    return "## Pictures\n\n" + "\n\n".join(
        f"![{CAPTIONS[name]}]({PICTURES}/{name})\n\n*{CAPTIONS[name]}*" for name in there
    )


def _quality(evidence: list[dict[str, Any]]) -> str:
    rows = [found for found in evidence if found["metric"] != SPEED]
    lines = ["## Quality", "", "| metric | | this model | its teacher | settings |", "|---|---|---|---|---|"]
    lines += [_measured(found) for found in rows]
    measured = {found["metric"] for found in rows}
    lines += [
        f"| {metric} | | {NOT_MEASURED} | {NOT_MEASURED} | |" for metric in ("FID", "IS") if metric not in measured
    ]
    return "\n".join(lines)


def _measured(found: Mapping[str, Any]) -> str:
    stated = {**found["settings"]}
    if "data" in stated:
        stated["data"] = _name(str(stated["data"]))
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in stated.items())
    student, teacher = (
        NOT_MEASURED if found.get(who) is None else f"{found[who]:.4g}" for who in ("student", "teacher")
    )
    if found["metric"] == DISTANCE:
        teacher = "0"
    cells = (found["metric"], f"{found['better']} is better", student, teacher, settings)
    return f"| {' | '.join(' '.join(cell.split()).replace('|', '&#124;') for cell in cells)} |"


def _cost(config: Mapping[str, Any], export: Export, evidence: list[dict[str, Any]]) -> str:
    assert not isinstance(export.source, AdapterSource)
    count = sum(math.prod(tensor.shape) for tensor in export.source.tensors.values())
    lines = ["## Cost", "", f"{count / 1e6:.4g} M parameters.", ""]
    lines += [f"| tail drop ρ | TFLOPs per image ({PAPER_STEPS} steps, unguided) |", "|---|---|"]
    lines += [f"| {rho} | {value / 1e12:.4g} |" for rho, value in student_flops_by_tail_drop(config).items()]
    shares = chunked_dit_flops(config, config["sample_size"] ** 2 / config["ratio"])
    share = 1 - shares["blocks"] / sum(shares.values())
    gates = f" and DyDiT's gates at their target of {config['dydit']:.0%}" if config.get("dydit") else ""
    counted = f"Counted as in the DC-DiT paper, with the router at its ratio{gates}"
    lines += ["", f"{counted}; {share:.0%} of it is the scaffold."]
    speed = [found for found in evidence if found["metric"] == SPEED]
    if speed:
        lines += ["", "| measured speed | | this model | its teacher | settings |", "|---|---|---|---|---|"]
        lines += [_measured(found) for found in speed]
    else:
        lines += ["", f"Speed: {NOT_MEASURED}."]
    return "\n".join(lines)


def _post_trained(origin: Mapping[str, Any]) -> bool:
    return any(event["what"] in ("finetune", "demo") for event in origin["history"])


def _budget(config: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    trained = trained_tail_drops(origin)
    said = "Whether it was trained for that is not known."
    if trained:
        said = f"It was trained with ρ in {{{', '.join(f'{rho:g}' for rho in trained)}}}."
    elif origin["base"].get("kind") in ("diffusers", "meta"):
        said = "It was not trained for it: expect worse images as ρ grows."
    return (
        "## Tail drop and Lite-CFG\n\nOf the tokens that the router keeps, the least certain ones can be dropped:\n\n"
        "```python\n"
        "pipe.transformer.set_tail_drop(0.3)  # everywhere\n"
        "pipe.transformer.set_lite_cfg(uncond=0.9)  # in the unconditional half of a guided batch\n"
        f"{_target(config)}```\n\n{said} "
        f"The quality at ρ > 0 and with Lite-CFG: {NOT_MEASURED}, unless the table above says so."
    )


def _target(config: Mapping[str, Any]) -> str:
    if not config["calibration"]:
        return ""
    steps = config["calibration"]["steps"]
    return f"pipe.transformer.set_budget(share=0.6)  # of what the teacher costs, calibrated at {steps} steps\n"


def _made(config: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    lines = ["## How it was made", ""]
    base = origin["base"]
    revision = f" at revision `{base['revision']}`" if base.get("revision") else ""
    lines += [
        f"Base: `{_name(base.get('id')) if not _on_hub(base) else base['id']}`{revision}." if base.get("id") else ""
    ]
    for event in origin["history"]:
        versions = ", ".join(f"{name} {version}" for name, version in event.get("versions", {}).items())
        lines += ["", f"**{event['what']}** ({versions}):", ""]
        lines += ["```bash", event["command"], "```"] if event.get("command") else ["called from Python"]
        if options := {key: value for key, value in event.get("options", {}).items() if value is not None}:
            lines += ["", f"With {', '.join(f'{key} {value}' for key, value in options.items())}."]
        if event.get("steps") is not None:
            recipe, data = event["recipe"], event.get("data", {"data": event["recipe"]["data"]})
            stated = ", ".join(f"{key} {value}" for key, value in data.items() if not isinstance(value, dict))
            lines += [
                "",
                f"{event['steps']} steps of {recipe['batch_size']}, seed {recipe['seed']}; {stated}. The recipe:",
            ]
            text = yaml.safe_dump(
                _of_its_method(recipe), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
            )
            lines += ["", "<details><summary>recipe</summary>", "", "```yaml", text.rstrip(), "```", "", "</details>"]
    if not origin["history"]:
        lines += ["", "Not recorded."]
    if origin["files"]:
        lines += ["", "`upcycle.json` holds this and the SHA-256 of every file; `upcycle info` shows it."]
    return "\n".join(lines)


def _of_its_method(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the options that its method does not look at."""
    if recipe.get("method") != "ddit":
        return {key: value for key, value in recipe.items() if key not in ("method", "ddit", "component")}
    others = ("convert", "preview", "teacher_precision", "vae", "heads", "compile")
    stages = [
        {key: value for key, value in stage.items() if key not in ("freeze", "anneal", "tail_drop", "teacher_guidance")}
        | {"losses": {"distill": stage["losses"]["distill"]}}
        for stage in recipe["stages"]
    ]
    optimizer = {key: value for key, value in recipe["optimizer"].items() if not key.endswith("_lr_scale")}
    return {key: value for key, value in recipe.items() if key not in others} | {
        "stages": stages,
        "optimizer": optimizer,
    }


def _limits(config: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    lines = [
        "## Limits",
        "",
        "- What its base cannot do, or does in a biased way, this model does too: no data was checked for that.",
        f"- One size, {config['sample_size']}×{config['sample_size']} positions, and {config['num_classes']} classes, "
        "those of its base.",
        "- Figures above hold for the settings beside them.",
    ]
    if any(found["metric"].startswith("ε-MSE") for found in origin["evidence"]):
        lines.append("- Held-out ε-MSE is no measure of samples.")
    if origin["history"] and not _post_trained(origin) and origin["base"].get("kind") in ("diffusers", "meta"):
        lines.append(f"- It has not been post-trained: {_untrained(config, origin)}")
    return "\n".join(lines)


def _untrained(config: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    if config["scaffold"] != "lean":
        return "its scaffold is fresh, and it makes no images yet."
    exact = [event["exact"] for event in origin["history"] if event.get("exact") is not None]
    if not exact:
        return "its router picks tokens by rule."
    if exact[0]:  # a later conversion copies the student
        return "it keeps its teacher's grid of tokens and computes what its teacher computes, which saves nothing yet."
    return "its router picks tokens by rule, and what it makes is far from its teacher's images and perhaps noise."


def _licence(licence: str | None, base: Mapping[str, Any]) -> str:
    if licence is None:
        return "## Licence\n\nThat of its base, which its files do not state. Look it up before you use this model."
    said = f"## Licence\n\n`{licence}`, inherited from its base."
    if "-nc" in licence:
        said += " It allows non-commercial use only, of this model too."
    return said


# -- text -------------------------------------------------------------------------------------------------------------


def render(card: Card, existing: str | None = None) -> str:
    """The text of a card; what somebody has changed, added or removed in ``existing`` stays so."""
    front, body = _split(existing or "")
    record = _record(body) or {"metadata": {}, "sections": {}}
    body = _RECORD.sub("\n\n", body)
    metadata = dict(front)
    for key, value in card.metadata.items():
        ours_before = record["metadata"].get(key)
        removed = key not in front and ours_before is not None
        edited = key in front and _digest(front[key]) != ours_before
        if _relicensed(card, key) or (not removed and not edited):
            metadata[key] = value
    for key in record["metadata"]:
        if key not in card.metadata and _digest(front.get(key)) == record["metadata"][key]:
            del metadata[key]  # we wrote it, and it is no longer true
    there = {match[1]: match[2] for match in _SECTION.finditer(body)}

    def mended(match: re.Match[str]) -> str:
        name, text = match[1], match[2]
        if name in card.sections and _digest(text) == record["sections"].get(name):
            text = card.sections[name]
        return f"<!-- upcycle: {name} -->\n{text}\n<!-- /upcycle: {name} -->"

    body = _SECTION.sub(mended, body).strip("\n")
    fresh = [name for name in card.sections if name not in there and name not in record["sections"]]
    marked = [f"<!-- upcycle: {name} -->\n{card.sections[name]}\n<!-- /upcycle: {name} -->" for name in fresh]
    body = "\n\n".join([*([body] if body else []), *marked])
    now = {
        "metadata": {key: _digest(value) for key, value in card.metadata.items()},
        "sections": {name: _digest(text) for name, text in card.sections.items()},
    }
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(head) != metadata:  # some characters, such as U+0085, only live through an escape
        head = yaml.safe_dump(metadata, sort_keys=False)
    return f"---\n{head}---\n\n{body}\n\n<!-- upcycle card {json.dumps(now)} -->\n"


def edited_parts(card: Card, existing: str) -> list[str]:
    """Names of sections and metadata keys that somebody has changed or removed, which `render` therefore keeps."""
    front, body = _split(existing)
    record = _record(body)
    if record is None:
        return []
    there = {match[1]: match[2] for match in _SECTION.finditer(body)}
    sections = [name for name, was in record["sections"].items() if _digest(there.get(name)) != was]
    changed = [key for key, was in record["metadata"].items() if _digest(front.get(key)) != was]
    return sections + [key for key in changed if not _relicensed(card, key)]


def resets_licence(card: Card, existing: str) -> bool:
    """Whether somebody has changed the licence, which `render` sets back to that of the base."""
    front, body = _split(existing)
    record = _record(body)
    return record is not None and any(
        _relicensed(card, key) and _digest(front.get(key)) != was for key, was in record["metadata"].items()
    )


def _relicensed(card: Card, key: str) -> bool:
    """Whether the card's word counts whatever somebody has made of it: nobody but the base's owner can relicense."""
    return key in ("license", "license_name") and card.metadata.get("license_name") != "unknown"


def _record(body: str) -> dict[str, Any] | None:
    """What the comment at the end of a card says of its generated parts; None where there is none, or it is broken."""
    found = _RECORD.search(body)
    try:
        record = json.loads(found[1]) if found else None
    except ValueError:
        return None
    known = isinstance(record, dict) and all(isinstance(record.get(part), dict) for part in ("metadata", "sections"))
    return record if known else None


def _split(text: str) -> tuple[dict[str, Any], str]:
    """YAML metadata and body of a card."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    match = re.match(r"---[ \t]*\n(.*?)^---[ \t]*(?:\n|$)", text, re.DOTALL | re.MULTILINE)
    if not match:
        return {}, text
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError:
        raise UpcycleError("the metadata at the top of its README.md is not valid YAML; mend it first") from None
    if front is not None and not isinstance(front, dict):
        return {}, text  # text between two lines
    return front or {}, text[match.end() :]


def _digest(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
