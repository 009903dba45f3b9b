"""The other ways out of an export: every way read back, by us and by the code that it is for; equality is exact."""

import json
import shutil
import zipfile

import pytest
import tiny
import torch
from conftest import inside, run
from fake_hub import FakeHub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_fresh_process import fresh

from upcycle import provenance
from upcycle.export.diffusers_folder import export_folder
from upcycle.graft.dcdit_names import from_authors, to_authors
from upcycle.graft.pieces import CastTensor, FreshTensor
from upcycle.graft.torch_writer import write_torch_file
from upcycle.graft.writer import write_weights
from upcycle.sources.student import load_student, open_student

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def same(first, second):
    """Two state dicts with the same names, dtypes and bits."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def states(folder):
    """The student's weights as they are stored."""
    return {k: v for file in (folder / "transformer").glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def grid_dir(tmp_path_factory, pipeline_dir):
    """A student of the tiny pipeline that is its teacher: the grid is fixed and nothing was trained."""
    out = tmp_path_factory.mktemp("grid") / "tiny-grid"
    inside("convert", pipeline_dir, "--router", "grid", "-o", out, "--no-verify")
    return out


@pytest.fixture(scope="module")
def authors_dir(tmp_path_factory):
    """The authors' golden model, converted; and the checkpoint that it is from."""
    folder = tmp_path_factory.mktemp("authors")
    tiny.save_dcdit_pt(folder / "0400000.pt", sigma=1.5)
    inside("convert", folder / "0400000.pt", "-o", folder / "out", "--no-verify")
    return folder


# -- single -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_single_file_is_the_same_model(export_dir, tmp_path):
    out = tmp_path / "student.safetensors"
    report = json.loads(run("export", export_dir, "--to", "single", "-o", out, "--json").stdout)
    assert report == {"out": str(out), "to": "single", "dtype": None, "bytes": out.stat().st_size, "notes": []}
    same(load_file(out), states(export_dir))
    with safe_open(out, "pt") as file, safe_open(export_dir / WEIGHTS, "pt") as source:
        metadata, theirs = file.metadata(), source.metadata()
    assert json.loads(metadata.pop("config"))["_class_name"] == "ChunkedDiT"
    told, told_before = json.loads(metadata.pop("upcycle")), json.loads(theirs.pop("upcycle"))
    assert metadata == theirs
    assert told["base"] == told_before["base"]
    assert told["history"][:-1] == told_before["history"]
    assert told["history"][-1]["what"] == "export"
    ours, loaded = load_student(export_dir), load_student(out)
    arguments = torch.randn(2, 4, 16, 16), torch.tensor([900, 30]), torch.tensor([1, 10])
    assert torch.equal(ours(*arguments).sample, loaded(*arguments).sample)
    assert {k: v for k, v in ours.config.items() if k[0] != "_"} == {
        k: v for k, v in loaded.config.items() if k[0] != "_"
    }


def test_shards_become_a_single_file_and_that_a_folder_again(pipeline_dir, tmp_path, failing):
    inside("convert", pipeline_dir, "-o", tmp_path / "shards", "--max-shard-size", "100KB", "--no-verify")
    single, back = tmp_path / "one.safetensors", tmp_path / "back"
    inside("export", tmp_path / "shards", "--to", "single", "-o", single)
    done = inside("export", single, "--to", "diffusers", "-o", back)
    assert "transformer alone" in done.stdout
    same(states(back), states(tmp_path / "shards"))
    assert {path.name for path in (back / "transformer").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", *(p.name for p in (back / "transformer").glob("*.py"))
    }  # fmt: skip
    fresh("AutoModel.from_pretrained(where + '/transformer', trust_remote_code=True)", back, tmp_path)
    before, after = provenance.read(tmp_path / "shards"), provenance.read(back)
    assert after["base"] == before["base"]
    assert [event["what"] for event in after["history"]] == ["convert", "export", "export"]
    assert after["files"].keys() == {path.relative_to(back).as_posix() for path in back.rglob("*.*")} - {
        provenance.FILE
    }
    assert "converted model already" in failing("convert", single, "-o", tmp_path / "no")


# -- diffusers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told_dir(export_dir, tmp_path_factory):
    """An export with everything that can lie in one, also a file without a dot in its name."""
    folder = tmp_path_factory.mktemp("told") / "export"
    shutil.copytree(export_dir, folder)
    (folder / "README.md").write_text("# A student\n")
    (folder / "images").mkdir()
    (folder / "images" / "samples.png").write_bytes(b"PNG")
    (folder / "vae" / "LICENSE").write_text("CC")
    found = {"metric": "error", "better": "lower", "student": 1.0, "teacher": None, "settings": {"samples": 3}}
    provenance.add_evidence(folder, found)
    return folder


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_folder_in_half_precision_loads_in_stock_diffusers(told_dir, tmp_path, dtype):
    inside("export", told_dir, "--to", "diffusers", "--dtype", dtype, "-o", tmp_path / "plain")
    inside("export", told_dir, "--to", "diffusers", "--dtype", dtype, "--variant", "-o", tmp_path / "variant")
    source, plain, variant = states(told_dir), states(tmp_path / "plain"), states(tmp_path / "variant")
    router = {name for name in source if name.startswith("routing_module")}
    assert router
    same(plain, {n: t if n in router else t.to(LOW[dtype]) for n, t in source.items()})
    same(plain, variant)
    for out in ("plain", "variant"):
        for name in ("README.md", "images/samples.png", "model_index.json", "transformer/config.json"):
            assert (tmp_path / out / name).read_bytes() == (told_dir / name).read_bytes()
        told = provenance.read(tmp_path / out)
        assert told["history"][-1]["what"] == "export"
        assert told["evidence"][0]["settings"]["weights"] == "before the export to another precision"
        for name, stated in told["files"].items():
            assert provenance.digest(tmp_path / out / name) == stated["sha256"]
        middle = f".{dtype}" if out == "variant" else ""
        for component in ("transformer", "vae"):
            weights = [path.name for path in (tmp_path / out / component).glob("*.safetensors")]
            assert weights == [f"diffusion_pytorch_model{middle}.safetensors"]
            with safe_open(tmp_path / out / component / weights[0], "pt") as file:
                assert file.metadata()["format"] == "pt"
                if component == "transformer":
                    with safe_open(told_dir / WEIGHTS, "pt") as theirs:
                        before = json.loads(theirs.metadata()["upcycle"])
                    assert json.loads(file.metadata()["upcycle"])["history"][:-1] == before["history"]
                else:
                    assert {file.get_tensor(name).dtype for name in file.keys()} == {LOW[dtype]}  # noqa: SIM118
    fresh(
        f"""
        dtype = {LOW[dtype]}
        common = dict(trust_remote_code=True, torch_dtype=dtype)
        pipe = DiffusionPipeline.from_pretrained(where + "/plain", **common)
        assert type(pipe) is DiTPipeline
        named = DiffusionPipeline.from_pretrained(where + "/variant", variant="{dtype}", **common)
        model = AutoModel.from_pretrained(where + "/plain/transformer", trust_remote_code=True, dtype=dtype)
        for transformer in (pipe.transformer, named.transformer, model):
            assert transformer.dtype == dtype
            assert {{p.dtype for p in transformer.routing_module.parameters()}} == {{torch.float32}}
        images = draw(pipe)
        assert images.isfinite().all() and torch.equal(images, draw(named))
        whole = DiffusionPipeline.from_pretrained(where + "/plain", trust_remote_code=True)
        assert draw(whole).isfinite().all()
        """,
        tmp_path,
        tmp_path,
    )


def test_back_to_fp32_and_replacing(told_dir, tmp_path):
    inside("export", told_dir, "--to", "diffusers", "--dtype", "bf16", "-o", tmp_path / "low")
    for force in ([], ["--force"]):
        done = inside(
            "export", tmp_path / "low", "--to", "diffusers", "--dtype", "fp32", "-o", tmp_path / "high", *force
        )
        assert done.stdout.strip().endswith("high")
    same(states(tmp_path / "high"), {name: tensor.float() for name, tensor in states(tmp_path / "low").items()})
    assert {path.name for path in tmp_path.iterdir()} == {"low", "high"}


def test_shards_of_a_variant_have_the_names_that_diffusers_looks_for(export_dir, tmp_path):
    pieces = {name: FreshTensor(tensor.half()) for name, tensor in states(export_dir).items()}
    shutil.copytree(export_dir / "transformer", tmp_path / "out", ignore=shutil.ignore_patterns("*.safetensors"))
    names = write_weights(tmp_path / "out", pieces, {"format": "pt"}, 100_000, variant="fp16")
    assert len(names) > 2
    fresh(
        """
        model = AutoModel.from_pretrained(where, trust_remote_code=True, variant="fp16", dtype=torch.float16)
        assert model.dtype == torch.float16
        """,
        tmp_path / "out",
        tmp_path,
    )


def test_values_too_large_for_fp16_are_refused(export_dir, tmp_path, failing):
    folder = shutil.copytree(export_dir, tmp_path / "large")
    state = load_file(folder / WEIGHTS)
    state["proj_out_2.weight"][0, 0] = -70000.0
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    before = sorted(tmp_path.rglob("*"))
    for arguments in (["diffusers", "-o", tmp_path / "out"], ["single", "-o", tmp_path / "out.safetensors"]):
        line = failing("export", folder, "--dtype", "fp16", "--to", *arguments)
        assert "proj_out_2.weight" in line
        assert "bf16" in line
    assert sorted(tmp_path.rglob("*")) == before
    export_folder(open_student(folder), tmp_path / "bf16", torch.bfloat16)


def test_a_cast_rounds_as_torch_does():
    """What rounds down to the largest number is kept; what becomes infinite is refused."""
    values = torch.tensor([65504.0, 65519.0, -1e-9])
    cast = torch.cat(list(CastTensor("x", FreshTensor(values), torch.float16).chunks(torch.empty(8))))
    assert torch.equal(cast, values.half())
    with pytest.raises(Exception, match="tensor x holds 65520"):
        list(CastTensor("x", FreshTensor(torch.tensor([65520.0])), torch.float16).chunks(torch.empty(8)))


# -- meta -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["golden", "training"])
def test_a_student_of_a_meta_checkpoint_goes_back_bit_for_bit(dit, tmp_path, source):
    """Also Meta's own numbers, position table included; from a training checkpoint the EMA weights alone."""
    pt = tiny.GOLDEN / "meta_dit_tiny.pt"
    if source == "training":
        pt = tiny.save_meta_pt(tmp_path / "train.pt", dit, training=True)
    whole = torch.load(pt, weights_only=source == "golden")
    inside("convert", pt, "--heads", "2", "--router", "grid", "-o", tmp_path / "student", "--no-verify")
    done = inside("export", tmp_path / "student", "--to", "meta", "-o", tmp_path / "back.pt", "--json")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    same(back, whole.get("ema", whole))
    (note,) = json.loads(done.stdout)["notes"]
    assert "--heads 2" in note
    inside("convert", tmp_path / "back.pt", "--heads", "2", "--router", "grid", "-o", tmp_path / "again", "--no-verify")
    assert states(tmp_path / "again").keys() == states(tmp_path / "student").keys()
    same(states(tmp_path / "again"), states(tmp_path / "student"))


def test_a_diffusers_folder_and_its_student_in_metas_layout(dit, pipeline_dir, grid_dir, tmp_path):
    """The same tensors from both; Meta's code would compute another function of them, which a note says."""
    for name, source in (("dit.pt", pipeline_dir), ("student.pt", grid_dir)):
        done = inside("export", source, "--to", "meta", "-o", tmp_path / name, "--json")
        assert any("near, not equal" in note for note in json.loads(done.stdout)["notes"])
        same(torch.load(tmp_path / name, weights_only=True), tiny.meta_state(dit))
    options = ["--heads", "2", "--time-embedding", "diffusers", "--router", "grid", "--no-verify"]
    inside("convert", tmp_path / "student.pt", *options, "-o", tmp_path / "again")
    same(states(tmp_path / "again"), states(grid_dir))
    config = [json.loads((folder / "transformer/config.json").read_text()) for folder in (tmp_path / "again", grid_dir)]
    assert config[0]["norm_eps"] == config[1]["norm_eps"]
    assert config[0]["time_embedding"] == config[1]["time_embedding"]


def test_metas_layout_in_half_precision_and_from_a_checkpoint(dit, tmp_path):
    pt = tiny.save_meta_pt(tmp_path / "dit.pt", dit)
    inside("export", pt, "--to", "meta", "--dtype", "bf16", "--heads", "2", "-o", tmp_path / "low.pt")
    same(
        torch.load(tmp_path / "low.pt", weights_only=True),
        {name: tensor.bfloat16() for name, tensor in tiny.meta_state(dit).items()},
    )


def test_models_of_the_hub(dit, pipeline_dir, export_dir, tmp_path):
    with FakeHub() as hub:
        hub.add("facebook/DiT-XL-2-256", pipeline_dir)
        hub.add("someone/student", export_dir)
        arguments = ["facebook/DiT-XL-2-256", "--revision", "main", "--to", "meta", "-o", tmp_path / "dit.pt"]
        done = run("export", *arguments, env=hub.env(tmp_path / "home"))
        student = ["someone/student", "--to", "single", "-o", tmp_path / "student.safetensors"]
        run("export", *student, env=hub.env(tmp_path / "home"))
    same(load_file(tmp_path / "student.safetensors"), states(export_dir))
    same(torch.load(tmp_path / "dit.pt", weights_only=True), tiny.meta_state(dit))
    assert done.stdout.splitlines()[-1] == str(tmp_path / "dit.pt")
    assert "near, not equal" in done.stdout


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("trained", "conv_out.bias is not zero"),
        ("dropping", "tail_drop is 0.25"),
        ("ratio", "ratio is 16"),
        ("router", "router"),
    ],
)
def test_a_student_that_is_no_fixed_grid(export_dir, grid_dir, tmp_path, failing, change, says):
    folder = shutil.copytree(export_dir if change == "router" else grid_dir, tmp_path / "student")
    config = json.loads((folder / "transformer/config.json").read_text())
    if change == "trained":
        state = load_file(folder / WEIGHTS)
        state["conv_out.bias"][1] = 1e-9
        save_file(state, folder / WEIGHTS)
    config |= {"dropping": {"tail_drop": 0.25}, "ratio": {"ratio": 16.0}}.get(change, {})
    (folder / "transformer/config.json").write_text(json.dumps(config))
    line = failing("export", folder, "--to", "meta", "-o", tmp_path / "out.pt")
    assert says in line
    assert not (tmp_path / "out.pt").exists()


def test_split_embedders_have_no_place_in_metas_layout(tmp_path, failing):
    split = tiny.make_dit(0)
    with torch.no_grad():
        split.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias += 1
    tiny.save_transformer(tmp_path / "split", split)
    inside("convert", tmp_path / "split", "--router", "grid", "-o", tmp_path / "student", "--no-verify")
    for model in ("split", "student"):
        assert "embedders of their own" in failing("export", tmp_path / model, "--to", "meta", "-o", tmp_path / "o.pt")


# -- authors ----------------------------------------------------------------------------------------------------------


def test_the_authors_checkpoint_goes_back_bit_for_bit(authors_dir, tmp_path):
    """All their tensors, the position table that we never stored, and what only their config tells."""
    out = tmp_path / "0400001.pt"
    report = json.loads(inside("export", authors_dir / "out", "--to", "authors", "-o", out, "--json").stdout)
    assert report["notes"] == []
    content = torch.load(out, weights_only=True)
    assert content.keys() == {"model", "ema", "config"}
    for weights in ("ema", "model"):
        same(content[weights], tiny.dcdit_state())
    stored = sum(tensor.numel() * 4 for tensor in content["ema"].values())
    assert out.stat().st_size < 1.5 * stored, "both are stored once"
    size = tiny.dcdit_description()
    assert content["config"]["model"]["hnet"]["d_model"] == [size["d_model"]] * 2
    assert content["config"]["model"]["hnet"]["enc_dec_dim_factor"] == [size["d_model"] // size["enc_dec_dim"], None]
    inside("convert", out, "-o", tmp_path / "again", "--no-verify")
    same(states(tmp_path / "again"), states(authors_dir / "out"))
    first, second = (
        json.loads((f / "transformer/config.json").read_text()) for f in (tmp_path / "again", authors_dir / "out")
    )
    assert first == second
    assert first["smoothing_sigma"] == 1.5


def test_names_of_the_authors_are_one_table(authors_dir):
    """Every name is changed and changed back; none is lost or doubled."""
    lazy = open_student(authors_dir / "out").tensors
    theirs = to_authors(lazy)
    assert theirs.keys() | {"pos_embed"} == tiny.dcdit_state().keys()
    again = from_authors({name: FakeLazy(name, piece.shape) for name, piece in theirs.items()})
    assert again.keys() == lazy.keys()


class FakeLazy:
    """Only what renaming looks at."""

    def __init__(self, name, shape):
        self.name, self.shape = name, shape

    def rows(self, name, start, stop):
        return FakeLazy(name, (stop - start, *self.shape[1:]))


def test_what_has_no_place_in_the_authors_layout(export_dir, grid_dir, pipeline_dir, tmp_path, failing):
    inside("convert", pipeline_dir, "--init", "paper", "-o", tmp_path / "paper", "--no-verify")
    inside("convert", pipeline_dir, "--init", "paper", "--router", "cosine", "-o", tmp_path / "v1", "--no-verify")
    before = sorted(tmp_path.rglob("*"))
    for model, says in (
        (export_dir, "scaffold is lean"), (tmp_path / "paper", "adaptor"), (tmp_path / "v1", "router is cosine"),
        (pipeline_dir, "no converted model"),
    ):  # fmt: skip
        assert says in failing("export", model, "--to", "authors", "-o", tmp_path / "out.pt")
    assert "scaffold is paper" in failing("export", tmp_path / "paper", "--to", "meta", "-o", tmp_path / "out.pt")
    assert sorted(tmp_path.rglob("*")) == before


# -- files ------------------------------------------------------------------------------------------------------------


def test_torch_files_are_torchs_own(tmp_path):
    """Loads lazily mapped, as any zip archive, with scalars, empty tensors and more than one buffer of values."""
    state = {
        "large": torch.randn(700, 1000), "half": torch.randn(3, 5).half(), "brain": torch.randn(4).bfloat16(),
        "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "double": torch.randn(2).double(),
    }  # fmt: skip
    pieces = {name: FreshTensor(tensor) for name, tensor in state.items()}
    write_torch_file(tmp_path / "a.pt", pieces, lambda tensors: {"ema": tensors, "n": [1, None, "x"]})
    for mapped in (False, True):
        content = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mapped)
        assert content["n"] == [1, None, "x"]
        same(content["ema"], state)
    assert content["ema"]["large"].data_ptr() % 64 == 0
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None


def test_bad_input(export_dir, pipeline_dir, authors_dir, tmp_path, failing):
    there = tmp_path / "there.safetensors"
    there.write_text("mine")
    (tmp_path / "folder.pt").mkdir()
    single = export_dir, "--to", "single", "-o"
    for arguments, says in (
        ((export_dir, "--to", "onnx", "-o", tmp_path / "x"), "onnx"),
        ((export_dir, "--to", "single"), "--out"),
        ((*single, tmp_path / "student.pt"), "end in .safetensors"),
        ((*single, tmp_path / "student"), "end in .safetensors"),
        ((*single, there), "--force"),
        ((*single, there / "x.safetensors"), "there.safetensors"),
        ((*single, export_dir / WEIGHTS, "--force"), "is being read"),
        ((export_dir, "--to", "diffusers", "-o", tmp_path / "x.safetensors"), "writes a folder"),
        ((export_dir, "--to", "diffusers", "-o", export_dir, "--force"), "which replacing it would delete"),
        ((export_dir, "--to", "diffusers", "--variant", "-o", tmp_path / "x"), "--dtype"),
        ((export_dir, "--to", "single", "--variant", "--dtype", "fp16", "-o", tmp_path / "x.safetensors"), "--variant"),
        ((export_dir, "--to", "diffusers", "--dtype", "int8", "-o", tmp_path / "x"), "int8"),
        ((export_dir, "--to", "single", "--revision", "main", "-o", tmp_path / "x.safetensors"), "revision"),
        ((tmp_path / "nowhere", "--to", "single", "-o", tmp_path / "x.safetensors"), "nowhere"),
        ((there, "--to", "single", "-o", tmp_path / "x.safetensors"), "there.safetensors"),
        ((pipeline_dir, "--to", "single", "-o", tmp_path / "x.safetensors"), "upcycle convert"),
        ((authors_dir / "0400000.pt", "--to", "meta", "-o", tmp_path / "x.pt"), "DC-DiT"),
        ((pipeline_dir, "--to", "meta", "-o", tmp_path / "folder.pt", "--force"), "is a folder"),
    ):
        assert says in failing("export", *arguments), arguments
    assert there.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pt", "there.safetensors"]
    damaged = tmp_path / "damaged.safetensors"
    save_file({"x": torch.zeros(1)}, damaged, {"config": '{"_class_name": "ChunkedDiT", "scaffold": "none"}'})
    assert "describes no ChunkedDiT" in failing("export", damaged, "--to", "single", "-o", tmp_path / "x.safetensors")


def test_nan_is_refused_and_nothing_stays(export_dir, tmp_path, failing):
    folder = shutil.copytree(export_dir, tmp_path / "nan")
    state = load_file(folder / WEIGHTS)
    state["conv_in.bias"][0] = float("nan")
    save_file(state, folder / WEIGHTS)
    out = tmp_path / "x.safetensors"
    assert "conv_in.bias" in failing("export", folder, "--to", "single", "-o", out)
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]
