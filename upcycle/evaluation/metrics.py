"""FID, sFID, KID, Inception score, precision and recall, by torch-fidelity's functions on features that are kept."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from upcycle.errors import UpcycleError
from upcycle.evaluation.features import extract
from upcycle.evaluation.images import STATISTICS, ImageSet

KID_SUBSET = 1000  # samples of each of the 100 subsets; fewer where there are fewer
SPLITS = 10  # of the Inception score

Features = dict[str, torch.Tensor]
Reference = dict[str, np.ndarray]
"""``mu``, ``sigma``; ``mu_s``, ``sigma_s`` of the spatial features and ``features`` [n, d] where they are known."""


def features_of(
    extractor: Any, images: ImageSet, batch_size: int, on_images: Callable[[int], None], rows: list[int] | None = None
) -> Features:
    """Features fp32 [n, d] by name, of all images or of ``rows``."""
    rows = list(range(images.count)) if rows is None else rows
    device = next(extractor.parameters()).device
    parts: list[Mapping[str, torch.Tensor]] = []
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        parts.append(extract(extractor, images.read(some).to(device)))
        on_images(len(some))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def reference_of(
    extractor: Any, images: ImageSet, batch_size: int, on_images: Callable[[int], None], cache: Path
) -> Reference:
    """What samples are compared with, from the file ``cache`` if it is there; else that is written.

    Statistics that ``images`` bring go before those of its images, which are fewer in ADM's files.
    """
    if images.count == 0:
        return dict(images.statistics or {})
    if cache.is_file():
        found = load_file(cache)
        on_images(images.count)
    else:
        features = features_of(extractor, images, batch_size, on_images)
        found = {**statistics(features["features"]), "features": features["features"].numpy()}
        found |= {f"{name}_s": value for name, value in statistics(features["spatial"]).items()}
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_name(f".{cache.name}.partial")
        save_file(found, partial)
        partial.replace(cache)
    if images.statistics:
        found = {"features": found["features"], **images.statistics}
    return found


def statistics(features: torch.Tensor) -> dict[str, np.ndarray]:
    """Mean ``mu`` [d] and covariance ``sigma`` [d, d] of features [n, d]; raises `UpcycleError` for a single image."""
    if len(features) < 2:
        raise UpcycleError("one image has no covariance to compare; give more images")
    return fid_features_to_statistics(features)


def frechet(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """The Fréchet distance of two sets' ``mu`` and ``sigma``."""
    # Files hold fp32 or fp64; torch-fidelity wants both alike.
    theirs = {name: theirs[name].astype(ours[name].dtype) for name in STATISTICS}
    return fid_statistics_to_metric(ours, theirs, verbose=False)[KEY_METRIC_FID]


def measure(features: Features, reference: Reference) -> dict[str, Any]:
    """All metrics of samples; None for those that ``reference`` has no numbers for.

    ``kid_subset``: samples a subset of KID.

    Raises:
        UpcycleError: the reference's statistics are of other features.
    """
    spatial = {name: reference[f"{name}_s"] for name in STATISTICS if f"{name}_s" in reference} or None
    for name, mu in (("features", reference["mu"]), ("spatial", spatial and spatial["mu"])):
        if mu is not None and len(mu) != features[name].shape[1]:
            raise UpcycleError(
                f"the reference has statistics of {len(mu)} features and the samples {features[name].shape[1]}; "
                "choose the extractor that it was made with, with --features"
            )
    isc = isc_features_to_metric(features["logits"], min(SPLITS, len(features["logits"])))
    found: dict[str, Any] = {
        "fid": frechet(statistics(features["features"]), reference),
        "sfid": frechet(statistics(features["spatial"]), spatial) if spatial else None,
        "inception_score": isc[KEY_METRIC_ISC_MEAN],
        "inception_score_std": isc[KEY_METRIC_ISC_STD],
    }
    names = ("kid", "kid_std", "kid_subset", "precision", "recall")
    if "features" not in reference:
        return found | dict.fromkeys(names)
    ours, theirs = features["features"], torch.from_numpy(reference["features"])
    subset = min(KID_SUBSET, len(ours), len(theirs))
    kid = kid_features_to_metric(ours, theirs, kid_subset_size=subset, verbose=False)
    values: list[Any] = [kid[KEY_METRIC_KID_MEAN], kid[KEY_METRIC_KID_STD], subset, None, None]
    if min(len(ours), len(theirs)) > 3:  # precision and recall look at the third neighbour
        prc = prc_features_to_metric(ours, theirs, save_cpu_ram=True, verbose=False)
        values[3:] = [prc[KEY_METRIC_PRECISION], prc[KEY_METRIC_RECALL]]
    return found | dict(zip(names, values, strict=True))
