"""Load a DDiT adapter as others will: with diffusers and the code beside it. Run as a script, without `upcycle`.

    python load_adapter.py FOLDER        # prints one JSON object: {"class", "sizes", "finite"}

Beside its base it is attached to the stock transformer; a class-conditional DiT is called at every size.
"""

import importlib.abc
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


class _Block(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "upcycle":
            raise ImportError("upcycle is not importable in this process")


def main(folder: Path) -> None:
    """Load, attach where the base is there, call where it is known how, and print what came out."""
    sys.meta_path.insert(0, _Block())
    import diffusers
    import torch

    places = [path for path in (folder, folder / "ddit", folder / "ddit_2") if (path / "ddit.py").is_file()]
    spec: Any = importlib.util.spec_from_file_location("ddit", places[0] / "ddit.py")
    ddit: Any = importlib.util.module_from_spec(spec)
    sys.modules["ddit"] = ddit
    spec.loader.exec_module(ddit)
    finite = True
    for config, tensors in ddit.load_adapters(folder):
        finite = finite and all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        if not (folder / config.component / "config.json").is_file():
            continue
        model = getattr(diffusers, config.base_class).from_pretrained(folder / config.component)
        ddit.attach(model, config, tensors)
        if config.base_class == "DiTTransformer2DModel":
            c = model.config
            x = torch.randn(2, c.in_channels, c.sample_size, c.sample_size, generator=torch.Generator().manual_seed(0))
            labels = torch.tensor([0, c.num_embeds_ada_norm])
            for m in (1, *config.patches):
                with torch.inference_mode(), model.at(m):
                    out = model(x.to(model.dtype), torch.tensor([500, 20]), labels).sample
                finite = finite and bool(out.isfinite().all())
    print(json.dumps({"class": config.base_class, "sizes": config.patches, "finite": finite}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
