"""Load an export with stock diffusers and call its transformer once. Run as a script, without `upcycle`.

    python load.py FOLDER [VARIANT]        # prints one JSON object: {"pipeline", "transformer", "shape", "finite"}

The script is how `upcycle push-to-hub` proves that an export loads for others before it is sent.
"""

import importlib.abc
import json
import sys
from pathlib import Path


class _Block(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "upcycle":
            raise ImportError("upcycle is not importable in this process")


def main(folder: Path, variant: str | None = None) -> None:
    """Load, call with two noisy samples (one of them of the null class) and print what came out."""
    sys.meta_path.insert(0, _Block())
    import torch
    from diffusers import AutoModel, DiffusionPipeline

    pipeline = None
    if (folder / "model_index.json").is_file():
        pipe = DiffusionPipeline.from_pretrained(folder, variant=variant, trust_remote_code=True)
        pipeline, model = type(pipe).__name__, pipe.transformer
    else:
        model = AutoModel.from_pretrained(str(folder), subfolder="transformer", variant=variant, trust_remote_code=True)
    c = model.config
    dtype = next(model.parameters()).dtype
    x = torch.randn(2, c.in_channels, c.sample_size, c.sample_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        out = model(x.to(dtype), torch.tensor([500, 20]), torch.tensor([0, c.num_classes])).sample
    found = {
        "pipeline": pipeline,
        "transformer": type(model).__name__,
        "shape": list(out.shape),
        "finite": bool(out.isfinite().all()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
