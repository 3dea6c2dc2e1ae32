"""benchmarks/models.py on small models: what a record holds, and that a wrong result is never one."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.accelerate import measure

RECORD = {"op", "case", "dtype", "pass", "device", "threads", "backend", "shape", "ours_ms", "peers_ms", "best_peer", "ratio", "ratio_low",
          "ratio_high", "floor_ms", "of_floor", "peak_bytes", "peer_peak_bytes", "error", "error_limit"}


@pytest.fixture
def models(monkeypatch, perceiver_pytorch):
    """The script as a module, with one small model and a compiler that takes no time."""
    spec = importlib.util.spec_from_file_location("models_bench", Path(__file__).parents[1] / "benchmarks" / "models.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def build():
        return perceiver_pytorch.Perceiver(num_freq_bands=3, depth=1, max_freq=8, num_latents=12, latent_dim=24, latent_heads=3,
                                           latent_dim_head=8, cross_dim_head=16, num_classes=7), (torch.randn(1, 9, 10, 3),)

    module.REAL = module.MODELS
    monkeypatch.setattr(module, "MODELS", {"tiny": module.Model("perceiver-pytorch", build, dict(pixels=90))})
    monkeypatch.setattr(module, "COMPILE", dict(backend="aot_eager"))
    monkeypatch.setattr(measure, "not_worth", lambda forward, step: False)
    yield module
    torch.compiler.reset()


def test_records(models, tmp_path, capsys):
    file = tmp_path / "models.json"
    assert models.main(["tiny", "--threads", "1,2", "--pass", "forward,both", "--quick", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert {"machine", "versions", "command", "ceilings", "records"} == set(document)
    assert document["versions"]["perceiver-pytorch"]
    keys = [(r["op"], r["pass"], r["threads"]) for r in document["records"]]
    assert keys == [(op, pass_, n) for n in (1, 2) for pass_ in ("forward", "both") for op in ("accelerate", "accelerate + compile")]
    for record in document["records"]:
        assert set(record) == RECORD
        assert set(record["peers_ms"]) == {"eager", "compile"} and record["best_peer"] in record["peers_ms"]
        assert 0 < record["error"] < record["error_limit"] and record["ours_ms"] > 0
    assert "accelerate + compile" in capsys.readouterr().out


def _dit():
    model = fastdiff.models.DiT(depth=1, dim=16, heads=2, patch=2, size=4, channels=2, classes=3, dropout=0.0)
    return model, (torch.randn(1, 2, 4, 4), torch.tensor([7]), torch.tensor([1]))


def test_records_of_our_models(models, monkeypatch):
    """One with a peer of the same weights, and one alone."""
    monkeypatch.setattr(models, "MODELS", {
        "ours": models.Model("torch", _dit, {}, lambda module, _: (copy.deepcopy(module), None), "models"),
        "alone": models.Model(None, _dit, {}, lambda module, _: (module, None), "models", alike=False)})
    document, notes = models.run(["ours", "alone"], threads=[1], passes=["both"], quick=True, command="")
    assert not notes and "failures" not in document
    assert [(r["case"], r["op"]) for r in document["records"]] == [
        (case, op) for case in ("ours", "alone") for op in ("models", "models + compile")]
    for record in document["records"]:
        assert set(record) == RECORD and record["backend"] == "ops" and record["error"] < record["error_limit"]
        assert set(record["peers_ms"]) == (set() if record["case"] == "alone" else {"eager", "compile"})
        assert (record["ratio"] is None) == (record["peer_peak_bytes"] is None) == (record["case"] == "alone")


def test_a_wrong_model_of_ours_is_no_record(models, monkeypatch):
    def spoiled(module, _):
        made = copy.deepcopy(module)
        with torch.no_grad():
            made.blocks[0].mlp.fc2.bias.add_(1.0)
        return made, None

    monkeypatch.setattr(models, "MODELS", {"ours": models.Model("torch", _dit, {}, spoiled, "models")})
    document, _ = models.run(["ours"], threads=[1], passes=["forward"], quick=True, command="")
    assert not document["records"] and "accelerated is off by" in document["failures"][0]["reason"]


def test_a_wrong_result_is_no_record(models, monkeypatch, tmp_path, capsys):
    def spoil(model, example, show):
        with torch.no_grad():
            model.to_logits[-1].bias.add_(0.1)
        return None  # the report is not read before the result is refused

    monkeypatch.setattr(models, "accelerate", spoil)
    file = tmp_path / "models.json"
    assert models.main(["--quick", "--json", str(file)]) == 1
    document = json.loads(file.read_text())
    assert not document["records"] and "accelerated is off by" in document["failures"][0]["reason"]
    assert "FAILED tiny, forward" in capsys.readouterr().out


def test_a_wrong_gradient_is_no_record(models, monkeypatch):
    """The output is right and one gradient is not."""

    def spoil(model, example, show):
        model.latents.register_hook(lambda grad: grad + 1.0)

    monkeypatch.setattr(models, "accelerate", spoil)
    assert models.main(["--quick", "--pass", "both"]) == 1


def test_a_compiler_that_fails_is_a_note(models, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(models, "COMPILE", dict(backend=refuse))
    assert models.main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert "compile left out" in out and "accelerated, compiled left out" in out
    assert out.count("\naccelerate ") == 1


def test_a_missing_package_is_a_note(models, monkeypatch, capsys):
    def build():
        raise ImportError("No module named 'perceiver_pytorch'")

    monkeypatch.setattr(models, "MODELS", {"tiny": models.Model("perceiver-pytorch", build, {})})
    assert models.main(["--quick"]) == 0
    assert "pip install perceiver-pytorch" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "why"), [(["huge"], "unknown model huge; there are tiny"), (["--pass", "sideways"], "forward or both")])
def test_refusals(models, argv, why, capsys):
    with pytest.raises(SystemExit):
        models.main(argv)
    assert why in capsys.readouterr().err


PARTS = {"perceiver": 5, "perceiver-64": 5, "perceiver-io": 9, "perceiver-io-64": 5, "rin-1024": 6, "rin-256": 10, "perceiver-ar-1024": 5,
         "hourglass-2048": 10, "denoising-diffusion-32": 74, "unet-32": 28, "unet-64": 26, "conditional-unet-32": 50, "dit-256": 19,
         "transformer-2d-16": 3, "vit-224": 5}


@pytest.mark.parametrize("name", PARTS)
def test_the_real_models(models, rin_pytorch, transformers_perceiver, name):
    """Built without memory: the packages take the arguments, and the rules know their modules."""
    try:
        with torch.device("meta"):
            module, _ = models.REAL[name].build()
    except ImportError as missing:
        pytest.skip(str(missing))
    assert len(fastdiff.accelerate(module, show=False).replaced) == PARTS[name]


def test_a_patched_unet(models):
    """The two sides are one function of the same weights, and differ in nothing but who moves the patches."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    model = models.REAL["patched-unet-4"]
    plain, inputs = model.build()
    x, t = inputs
    models._random(plain)
    fast, report = model.fast(plain, inputs)
    assert report is None and not {p.data_ptr() for p in fast.parameters()} & {p.data_ptr() for p in plain.parameters()}
    with torch.no_grad():
        out = plain(x[:1, :, :32, :32], t[:1])
        torch.testing.assert_close(fast(x[:1, :, :32, :32], t[:1]), out)
    assert out.shape == (1, 3, 32, 32) and out.std() > 0


def _rin(dim):
    model = fastdiff.models.RIN((8, 8), patch=4, dim=dim, latents=4, latent_dim=16, layers=(1,), heads=2, latent_heads=2)
    return model, (torch.randn(1, 3, 8, 8), torch.rand(1))


def test_a_peer_of_the_same_sizes_alone(models, monkeypatch):
    """Ours is held to its own reference, whatever the other computes."""
    row = models.Model("torch", lambda: _rin(16), {}, lambda *_: (_rin(24)[0], None), "models", alike=False)
    monkeypatch.setattr(models, "MODELS", {"rin": row})
    document, notes = models.run(["rin"], threads=[1], passes=["both"], quick=True, command="")
    assert not notes and "failures" not in document
    assert [(r["op"], set(r["peers_ms"])) for r in document["records"]] == [
        (op, {"eager", "compile"}) for op in ("models", "models + compile")]
    monkeypatch.setattr(fastdiff.models.rin.Block, "forward", lambda self, z, x, tokens: (z, torch.randn_like(x)))
    document, _ = models.run(["rin"], threads=[1], passes=["forward"], quick=True, command="")
    assert not document["records"] and "accelerated is off by" in document["failures"][0]["reason"]


@pytest.mark.parametrize("name", ["perceiver, ours", "perceiver-io, ours", "rin-64, ours", "rin-1024, ours"])
def test_our_models_have_the_sizes_of_the_others(models, rin_pytorch, transformers_perceiver, name):
    row = models.REAL[name]
    with torch.device("meta"):
        theirs, inputs = row.build()
        mine, _ = row.fast(theirs, inputs)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (mine, theirs)]
    assert sizes[0] == sizes[1] if row.alike else sizes[0] == pytest.approx(sizes[1], rel=0.3)
