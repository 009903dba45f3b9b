"""The devices and number formats that commands take."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from upcycle.errors import UpcycleError

Dtype = Literal["fp32", "bf16", "fp16"]


def to_device(model: Any, device: str | None) -> Any:
    """``model`` on ``device``, by default CUDA where there is one. Raises `UpcycleError` if it cannot be used."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # fails on a device that holds no data, such as meta
        return model.to(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UpcycleError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def torch_dtype(name: Dtype) -> Any:
    """The `torch.dtype` of an option."""
    from upcycle.graft.pieces import DTYPES

    return DTYPES[name]


@contextlib.contextmanager
def enough_memory(batch_size: int) -> Iterator[None]:
    """A GPU that is full is the batch's fault."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UpcycleError(f"the GPU's memory is too small for --batch-size {batch_size}; lower it") from error
