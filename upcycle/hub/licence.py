"""What a base's licence says about sharing a model that was made from it."""

from upcycle.errors import UpcycleError

# Sharing changed versions is allowed to anyone, for any purpose; identifiers of the Hub.
PERMISSIVE = {
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "unlicense", "cc0-1.0", "cc-by-2.0",
    "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "wtfpl",
}  # fmt: skip

# What a card may give as its license; others go by "other" and a name of their own.
# https://huggingface.co/docs/hub/repositories-licenses
IDENTIFIERS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma
""".split()  # noqa: SIM905


def card_metadata(licence: str | None) -> dict[str, str]:
    """``license``, and ``license_name`` where the Hub has no identifier for it, as a model card states them."""
    if licence is not None and licence.lower() in IDENTIFIERS:
        return {"license": licence.lower()}
    return {"license": "other", "license_name": licence or "unknown"}


def check_licence(licence: str | None, *, accepted: bool) -> None:
    """Raise `UpcycleError` unless a model of this licence may be shared, or the user accepts its terms.

    Licences that forbid changed versions cannot be accepted.
    """
    if licence is not None and licence.lower() in PERMISSIVE:
        return
    if licence is not None and "-nd" in licence.lower():
        raise UpcycleError(
            f"the base's licence, {licence}, forbids sharing changed versions; this model cannot be shared"
        )
    if accepted:
        return
    if licence is None:
        raise UpcycleError(
            "the base's licence is not known; look it up, and pass --accept-license if it allows sharing this model"
        )
    what = "allows non-commercial use only" if "-nc" in licence.lower() else "has terms of its own"
    raise UpcycleError(
        f"the base's licence, {licence}, {what}, and the model inherits it; pass --accept-license to share it so"
    )
