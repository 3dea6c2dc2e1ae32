"""RIN against what the published programs compute, and against the published sizes."""

import pytest
import torch

from fastdiff.models import RIN
from fastdiff.models.rin import EPS, Scalar

# The program's own errors in float32: of outputs, of gradients.
PUBLISHED = {"rin": (1.8e-6, 1.5e-6), "rin_tape_cond": (2.1e-6, 2.6e-6)}
MILLIONS = {"cifar-10": 31.0, "imagenet-64": 157.8, "noise-schedule-64": 214.5, "noise-schedule-128": 318.5, "noise-schedule-256": 319.0,
            "noise-schedule-512": 320.6, "noise-schedule-768": 408.3, "noise-schedule-1024": 412.0}
TINY = dict(size=(8, 12), patch=(4, 2), dim=16, latents=6, latent_dim=24, layers=(1, 2), heads=2, latent_heads=3)
NAMES = {"image": "image", "latents": "latents", "interface": "tape"}


def options(file):
    c = file.config
    return dict(size=(c["image_height"], c["image_width"]), patch=c["patch_size"], dim=c["tape_dim"], latents=c["latent_slots"],
                latent_dim=c["latent_dim"], layers=tuple(map(int, c["num_layers"].split(","))), heads=c["rw_num_heads"],
                latent_heads=c["latent_num_heads"], classes=file["in/cond"].shape[1], mlp_ratio=c["tape_mlp_ratio"],
                latent_mlp_ratio=c["latent_mlp_ratio"], tokens="latents" if c["time_on_latent"] else "interface",
                previous={"latent": "latents", "latent+tape": "both"}[c["self_cond"]], source_norm=c["xattn_enc_ln"])


def load(file, dtype):
    """The model of a file by the original's names, which are the port's too."""
    model = RIN.from_pix2seq({k: x.to(dtype) for k, x in file.under("official/").items()}, **options(file))
    port = RIN.from_rin_pytorch({k: x.to(dtype) for k, x in file.under("weights/").items()} | {"seed": torch.tensor(3)}, **options(file))
    assert all(map(torch.equal, model.state_dict().values(), port.state_dict().values()))
    return model


def inputs(file, dtype):
    return {name: file.tensors[f"in/{theirs}"].to(dtype).requires_grad_() for name, theirs in
            (("image", "x"), ("gamma", "gamma"), ("label", "cond"), ("latents", "latent_prev"), ("interface", "tape_prev"))
            if f"in/{theirs}" in file.tensors}


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_the_published(golden, held, name):
    file, (outputs, gradients) = golden(name), PUBLISHED[name]
    model, given = load(file, held.dtype), inputs(file, held.dtype)
    out = model(**given)
    sum((getattr(out, mine) * file[f"cot/prev/{theirs}"].to(held.dtype)).sum() for mine, theirs in NAMES.items()).backward()
    held.outputs(outputs, **{mine: (getattr(out, mine), file[f"out/prev/{theirs}"]) for mine, theirs in NAMES.items()})
    pairs = {"x": (given["image"].grad, file["grad/prev/x"]), "latent_prev": (given["latents"].grad, file["grad/prev/latent_prev"])}
    if "interface" in given:
        pairs["tape_prev"] = given["interface"].grad, file["grad/prev/tape_prev"]
    wanted = file.under("grad/prev/official/")
    mine = {path: gradient for path, gradient in gradients_by_path(model) if path in wanted}
    assert mine.keys() == wanted.keys() and len(wanted) >= 3
    held.gradients(gradients, pairs | {path: (mine[path].reshape(wanted[path].shape), wanted[path]) for path in wanted})


def gradients_by_path(model):
    """Of everything, by the original's names, kernels flattened to matrices."""
    for path, module, rows, _ in model._variables():
        if isinstance(module, torch.nn.LayerNorm):
            yield f"{path}/gamma", module.weight.grad
        else:
            grad = module.weight.grad[rows]
            yield f"{path}/kernel", grad.T if grad.dim() == 2 else grad.permute(2, 3, 1, 0)
    yield from (("tape_pos_emb", model.position.grad), ("latent_pos_emb", model.latents.grad))


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_state_or_label(golden, held, name):
    file = golden(name)
    model, given = load(file, held.dtype), inputs(file, held.dtype)
    with torch.no_grad():
        first = model(given["image"], given["gamma"], file["in/label"])
        no_label = model(**given | {"label": None})
    for case, out in (("zero_prev", first), ("prev_uncond", no_label)):
        held.outputs(PUBLISHED[name][0], **{mine: (getattr(out, mine), file[f"out/{case}/{theirs}"]) for mine, theirs in NAMES.items()})


def _millions(make):
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters()) / 1e6


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters(name):
    assert _millions(lambda: RIN.from_config(name)) == pytest.approx(MILLIONS[name], abs=0.05)


def test_a_video():
    """Patches of frames: each output patch depends on its token, tokens are row-major over time, rows, columns."""
    model = RIN(**TINY | dict(size=(4, 8, 8), patch=(2, 4, 4)), classes=3)
    out = model(torch.randn(2, 3, 4, 8, 8), torch.rand(2), torch.tensor([0, 2]))
    assert [x.shape for x in out] == [(2, 3, 4, 8, 8), (2, 6, 24), (2, 8, 16)]
    # Token 5 is frames 2 and 3, rows 0 to 3, columns 4 to 7.
    patch = torch.nn.functional.linear(model.norm(out.interface[:, 5]), model.out.linear.weight, model.out.linear.bias)
    torch.testing.assert_close(out.image[:, :, 2:, :4, 4:], patch.view(2, 2, 4, 4, 3).movedim(-1, 1))


@pytest.mark.parametrize("features", [6, 12, 24, 96, 128, 192])
def test_scalars(features):
    """As many waves as features, of mean 0 and variance 1, the first sine of the scaled number itself."""
    scalar = Scalar(features, 8, 1000.0).double()
    kept = []
    scalar.up.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
    scalar(torch.tensor([0.25, 0.75], dtype=torch.float64))
    waves = kept[0]
    assert waves.shape == (2, features)
    torch.testing.assert_close(waves.mean(1), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(waves.var(1, correction=0), torch.ones(2, dtype=torch.float64))
    rates = 1e4 ** (-torch.arange(features // 2, dtype=torch.float64) * 2 / features)
    plain = torch.cat(((250 * rates).sin(), (250 * rates).cos()))
    torch.testing.assert_close(waves[0], (plain - plain.mean()) / plain.std(correction=0))


def test_a_new_model_ignores_the_step_before():
    """The norm behind the state starts at 0."""
    model = RIN(**TINY)
    x, gamma = torch.randn(2, 3, 8, 12), torch.rand(2)
    torch.testing.assert_close(model(x, gamma).image, model(x, gamma, latents=torch.randn(2, 6, 24)).image, rtol=0, atol=0)


def test_a_block_without_layers_only_reads():
    model = RIN(**TINY | dict(layers=(1, 0)))
    assert model.blocks[1].write is None and model.blocks[1].write_mlp is None
    x, z = torch.randn(1, 24, 16), torch.randn(1, 6, 24)
    read, same = model.blocks[1](z, x, None)
    assert same is x
    torch.testing.assert_close(read, model.blocks[1].read_mlp(model.blocks[1].read(z, x)))


def test_initial_values():
    """Keras' fans: 16 * 2 and 16 * 8 for a query kernel (16, 2 heads, 8), 16 and 48 for a dense kernel."""
    torch.manual_seed(0)
    model = RIN(**TINY | dict(latent_dim=16, latent_heads=2, mlp_ratio=3))
    block = model.blocks[0]
    for weight, bound in ((block.read.query.weight, (6 / (16 * 10)) ** 0.5), (block.write_mlp.up.weight, (6 / 64) ** 0.5),
                          (model.stem.proj.weight, (6 / (8 * 19)) ** 0.5)):
        assert 0.9 * bound < weight.abs().max() <= bound
    assert not block.read.query.bias.any() and model.position.std().item() == pytest.approx(0.0176, rel=0.2)
    assert model.norm.eps == EPS and not model.previous_latents.norm.weight.any()


def test_stochastic_depth_is_for_training():
    torch.manual_seed(0)
    model, x = RIN(**TINY | dict(drop_path=0.5, dropout=0.5)), (torch.randn(2, 3, 8, 12), torch.rand(2))
    assert not torch.equal(model(*x).image, model(*x).image)
    model.eval()
    assert torch.equal(model(*x).image, model(*x).image)
    layer = model.blocks[0].layers[0].train()
    dropped = torch.stack([layer._drop(torch.ones(8, 1, 1)) for _ in range(200)])
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and dropped.mean() == pytest.approx(1.0, abs=0.1)


def test_refusals(golden):
    model, x, gamma = RIN(**TINY, classes=2), torch.randn(2, 3, 8, 12), torch.rand(2)
    with pytest.raises(ValueError, match=r"RIN: image wants \(2, 3, 8, 12\), got \(2, 3, 12, 8\)"):
        model(x.mT, gamma)
    with pytest.raises(ValueError, match=r"RIN: latents wants \(2, 6, 24\), got \(2, 5, 24\)"):
        model(x, gamma, latents=torch.zeros(2, 5, 24))
    with pytest.raises(ValueError, match=r"RIN: label wants \(2,\) or \(2, 2\), got \(2, 3\)"):
        model(x, gamma, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="RIN: interface wants None where previous is 'latents'"):
        model(x, gamma, interface=torch.zeros(2, 12, 16))
    with pytest.raises(ValueError, match="RIN: tokens wants 'latents' or 'interface', got 'tape'"):
        RIN(**TINY, tokens="tape")
    with pytest.raises(ValueError, match=r"RIN: patch wants divisors of the size \(8, 12\), got \(4, 5\)"):
        RIN(**TINY | dict(patch=(4, 5)))
    with pytest.raises(ValueError, match="RIN: latent_dim wants a multiple of 8, for the time token, got 20"):
        RIN(**TINY | dict(latent_dim=20))
    with pytest.raises(ValueError, match=r"from_config: name wants one of base, cifar-10, .*, got 'imagenet'"):
        RIN.from_config("imagenet")
    file = golden("rin")
    weights = file.under("official/")
    with pytest.raises(ValueError, match=r"from_pix2seq: stem/kernel wants \(4, 4, 3, 32\), got nothing"):
        RIN.from_pix2seq({k: x for k, x in weights.items() if k != "stem/kernel"}, **options(file))
    with pytest.raises(ValueError, match="from_pix2seq: the model has no place for extra"):
        RIN.from_pix2seq(weights | {"extra": torch.zeros(1)}, **options(file))
    with pytest.raises(ValueError, match=r"from_pix2seq: tape_pos_emb wants \(8, 32\), got \(16, 32\)"):
        RIN.from_pix2seq(weights, **options(file) | {"size": (8, 16)})
