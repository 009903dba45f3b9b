"""An export loads in a fresh process that cannot import this package, in the three ways of stock diffusers."""

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap

import tiny
from conftest import run
from fake_hub import FakeHub
from fresh import BLOCK

from upcycle.models.chunked_dit import MODULE_NAME


def fresh(code, where, scratch, env=None):
    """Run code in an isolated process, in another folder."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", BLOCK + textwrap.dedent(code), str(where), str(scratch)],
        capture_output=True,
        text=True,
        cwd=scratch,
        timeout=300,
        env={**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), **(env or {})},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


THREE_WAYS = """
    a = DiffusionPipeline.from_pretrained(where, trust_remote_code=True)
    assert type(a) is DiTPipeline
    model = AutoModel.from_pretrained(where, subfolder="transformer", trust_remote_code=True)
    b = DiTPipeline.from_pretrained(where, transformer=model)
    images = draw(a)
    assert images.isfinite().all()
    assert torch.equal(images, draw(b))
    assert not torch.equal(images, draw(a, guidance=1.0))
    # save and reload with stock code, twice, bit for bit
    for round in ("first", "second"):
        a.save_pretrained(f"{scratch}/{round}")
        a = DiffusionPipeline.from_pretrained(f"{scratch}/{round}", trust_remote_code=True)
        assert torch.equal(images, draw(a)), round
    c = DiTPipeline.from_pretrained(f"{scratch}/second", transformer=model)
    assert torch.equal(images, draw(c))
    # sharded and as a variant
    a.save_pretrained(f"{scratch}/sharded", max_shard_size="100KB")
    assert torch.equal(images, draw(DiffusionPipeline.from_pretrained(f"{scratch}/sharded", trust_remote_code=True)))
    for dtype in (torch.bfloat16, torch.float16):
        low = DiffusionPipeline.from_pretrained(where, trust_remote_code=True, torch_dtype=dtype)
        assert low.transformer.dtype == dtype
        assert {p.dtype for p in low.transformer.routing_module.parameters()} == {torch.float32}
        assert draw(low).isfinite().all()
        low.save_pretrained(f"{scratch}/{dtype}", variant="low")
        again = DiffusionPipeline.from_pretrained(
            f"{scratch}/{dtype}", trust_remote_code=True, torch_dtype=dtype, variant="low")
        assert torch.equal(draw(low), draw(again)), dtype
    print(sorted(m for m in sys.modules if m.partition(".")[0] == "upcycle"))
"""


def test_local_folder(export_dir, tmp_path):
    assert fresh(THREE_WAYS, export_dir, tmp_path).strip().endswith("[]")


def test_from_a_hub(export_dir, tmp_path):
    with FakeHub() as hub:
        hub.add("someone/tiny-dc4", export_dir)
        code = """
            a = DiffusionPipeline.from_pretrained(where, trust_remote_code=True)
            model = AutoModel.from_pretrained(where, subfolder="transformer", trust_remote_code=True)
            b = DiTPipeline.from_pretrained(where, transformer=model)
            assert type(a) is DiTPipeline
            images = draw(a)
            assert torch.equal(images, draw(b))
            local = DiffusionPipeline.from_pretrained(scratch + "/local", trust_remote_code=True)
            assert torch.equal(images, draw(local))
        """
        (tmp_path / "local").symlink_to(export_dir)
        fresh(code, "someone/tiny-dc4", tmp_path, env=hub.env(tmp_path / "home"))


def test_student_in_the_stock_base_pipeline(export_dir, pipeline_dir, tmp_path):
    """`DiTPipeline.from_pretrained(stock_base, transformer=student)` draws what the export draws."""
    (tmp_path / "base").symlink_to(pipeline_dir)
    fresh(
        """
        model = AutoModel.from_pretrained(where, subfolder="transformer", trust_remote_code=True)
        base = DiTPipeline.from_pretrained(scratch + "/base", transformer=model)
        export = DiffusionPipeline.from_pretrained(where, trust_remote_code=True)
        assert torch.equal(draw(base), draw(export))
        """,
        export_dir,
        tmp_path,
    )


def test_student_draws_what_its_teacher_draws(export_dir, pipeline_dir, tmp_path):
    (tmp_path / "base").symlink_to(pipeline_dir)
    fresh(
        """
        student = DiffusionPipeline.from_pretrained(where, trust_remote_code=True)
        teacher = DiTPipeline.from_pretrained(scratch + "/base")
        difference = (draw(student, guidance=1.0) - draw(teacher, guidance=1.0)).abs().max()
        assert difference < 1e-5, difference
        """,
        export_dir,
        tmp_path,
    )


def test_two_exports_with_different_code_do_not_change_each_other(export_dir, tmp_path):
    """Local code files share one namespace in diffusers; the content hash keeps them apart."""
    other = tmp_path / "other"
    shutil.copytree(export_dir, other)
    code = (other / "transformer" / f"{MODULE_NAME}.py").read_text()
    changed = code.replace("return (base + correction).to(x.dtype), routing", "return 0 * base, routing")
    assert changed != code
    (other / "transformer" / f"{MODULE_NAME}.py").unlink()
    name = "chunked_dit_" + hashlib.sha256(changed.encode()).hexdigest()[:12]
    (other / "transformer" / f"{name}.py").write_text(changed)
    for file in (other / "model_index.json", other / "transformer" / "config.json"):
        file.write_text(json.dumps(json.loads(file.read_text().replace(MODULE_NAME, name))))
    fresh(
        """
        first = DiffusionPipeline.from_pretrained(where, trust_remote_code=True)
        before = draw(first)
        second = DiffusionPipeline.from_pretrained(scratch + "/other", trust_remote_code=True)
        assert not torch.equal(draw(second), before)
        assert torch.equal(draw(first), before)
        assert torch.equal(draw(DiffusionPipeline.from_pretrained(where, trust_remote_code=True)), before)
        """,
        export_dir,
        tmp_path,
    )


def test_converted_in_shards(pipeline_dir, tmp_path):
    run("convert", pipeline_dir, "-o", tmp_path / "out", "--max-shard-size", "100KB", "--no-verify")
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) > 1
    fresh("assert draw(DiffusionPipeline.from_pretrained(where, trust_remote_code=True)).isfinite().all()",
          tmp_path / "out", tmp_path)  # fmt: skip


def test_half_precision_source_gives_a_half_precision_export(dit, tmp_path):
    tiny.save_pipeline(tmp_path / "fp16", copy.deepcopy(dit).half(), variant="fp16")
    vae = tmp_path / "fp16" / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    run("sample", tmp_path / "fp16", "--classes", "1", "--steps", "1", "-o", tmp_path / "drawn")
    run("convert", tmp_path / "fp16", "-o", tmp_path / "out", "--no-verify")
    fresh(
        """
        pipe = DiffusionPipeline.from_pretrained(where, trust_remote_code=True, torch_dtype=torch.float16)
        assert pipe.transformer.dtype == torch.float16
        assert draw(pipe).isfinite().all()
        """,
        tmp_path / "out",
        tmp_path,
    )
