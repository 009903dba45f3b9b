"""What a base's licence says about sharing a model that was made from it."""

from upcycle.errors import UpcycleError

# Sharing changed versions is allowed to anyone, for any purpose; identifiers of the Hub.
PERMISSIVE = {
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "unlicense", "cc0-1.0", "cc-by-2.0",
    "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "wtfpl",
}  # fmt: skip


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
