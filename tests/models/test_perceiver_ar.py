"""Perceiver AR against what the original computes: forward, loss, gradients, decoding with a cache."""

from itertools import pairwise

import pytest
import torch

from fastdiff.models import PerceiverAR, perceiver_ar

PUBLISHED = 1.5e-6  # the original's own error in float32, of outputs and of gradients
MILLIONS = {"imagenet-64": 770.1, "copy-131072": 89.8, "copy-32": 26.8, "default": 165.3}
TINY = dict(vocabulary=11, context=12, latents=4, layers=2, dim=16, heads=2, cross_heads=1)
LENGTHS = torch.tensor([14, 11, 4])


def load(file, name, dtype):
    c = file.config
    m = c["models"][name]
    assert m["activation_name"] == "sq_relu" and m["cross_attend_widening_factor"] == m["transformer_widening_factor"] == 4
    where = (dict(rotated=m["fraction_to_rotate"], wavelength=m["max_wavelength"]) if name == "rotary" else
             dict(positions="sinusoidal", sizes=(file[f"weights/{name}/perceiver_ar/~/embed_1/embeddings"].shape[0],)))
    weights = {path: x.to(dtype) for path, x in file.under(f"weights/{name}/").items()}
    return PerceiverAR.from_haiku(
        weights, vocabulary=c["V"], context=c["M"], latents=c["N"], layers=m["num_transformers_per_block"], dim=m["num_z_channels"],
        heads=m["num_transformer_heads"], cross_heads=m["num_cross_attend_heads"], **where)


def positions(file, name):
    return None if name == "rotary" else file["in/positions"]


@pytest.mark.parametrize("name", ["rotary", "absolute"])
def test_equals_the_original(golden, held, name):
    file = golden("perceiver_ar")
    model, kept = load(file, name, held.dtype), []
    for module in (model.cross, *model.layers):
        module.register_forward_hook(lambda m, args, out: kept.append(out))
    logits = model(file["in/tokens"], positions(file, name), lengths=LENGTHS)
    places = model.places(file["in/tokens"], 6, LENGTHS)
    assert torch.equal(places, file["out/latent_positions"])
    scalar = (logits * file["in/logits_cotangent"] * (places >= 0).unsqueeze(-1)).sum()
    scalar.backward()
    after = ("after_cross_attention", "after_self_attention", "after_self_attention_1")
    held.outputs(PUBLISHED, **{key: (x, file[f"out/{name}/{key}"]) for key, x in
                               zip((*after, "logits", "scalar"), (*kept, logits, scalar), strict=True)})
    wanted = file.under(f"grad/{name}/perceiver_ar/")
    mine = {perceiver_ar.haiku_path(key): p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert len(wanted) == 7
    held.gradients(PUBLISHED, {path: (mine[path].T if path.endswith("/w") else mine[path], x) for path, x in wanted.items()})


@pytest.mark.parametrize("name", ["rotary", "absolute"])
def test_loss_equals_the_original(golden, held, name):
    file = golden("perceiver_ar")
    model, logits = load(file, name, held.dtype), file[f"out/{name}/logits"].to(held.dtype).requires_grad_()
    z_loss = file.config["z_loss"]
    loss = model.loss(logits, file["in/targets"], LENGTHS, z_loss)
    loss.sum().backward()
    without = model.loss(logits, file["in/targets"], LENGTHS, 0.0)
    held.outputs(PUBLISHED, per_position=(loss, file[f"out/{name}/loss_per_position"]), total=(loss.sum(), file[f"out/{name}/loss_total"]))
    held.close("z_loss", loss - without, file[f"out/{name}/z_loss_per_position"], 1e-4, 1e-11, 0.0)
    held.gradients(PUBLISHED, {"logits": (logits.grad, file[f"grad/{name}/loss_total/logits"])})


def test_masks_equal_the_original(golden):
    file = golden("perceiver_ar")
    model, tokens = load(file, "rotary", torch.float64), file["in/tokens"]
    cross, own = model._biases(model.embedding(tokens), model.places(tokens, 6, LENGTHS), LENGTHS)
    assert torch.equal(cross[:, 0] == 0, file["out/cross_mask"]) and torch.equal(own[:, 0] == 0, file["out/self_mask"])


def test_decoding_equals_the_original(golden, held):
    file = golden("perceiver_ar")
    model, tokens, places = load(file, "absolute", held.dtype), file["in/tokens"][:1], file["in/positions"][:1]
    with torch.no_grad():
        memory = model.memory()
        rolled = [model(tokens[:, i:i + 1], places[:, i:i + 1], latents=1, memory=memory)[0, -1] for i in range(14)]
        memory, reset, filled = model.memory(), [], []
        for i in range(14):
            reset.append(model.next_logits(tokens[:, :i + 1], memory, places[:, :i + 1])[0])
            filled.append(memory.held)
    held.outputs(PUBLISHED, rolled=(torch.stack(rolled), file["out/absolute/cached_logits_row0"]),
                 reset=(torch.stack(reset), file["out/absolute/forced_cached_with_resets_logits_row0"]))
    assert [b <= a for a, b in pairwise(filled)] == file["out/absolute/forced_reset_steps"].tolist()[1:]
    prefix = tokens[:, :file.config["prefix"]]
    for cached, key in ((False, "greedy_uncached"), (True, "greedy_cached_with_resets")):
        wanted = file[f"out/absolute/{key}"]
        steps = wanted.shape[1] - prefix.shape[1]
        assert torch.equal(model.sample(prefix, steps, positions=places, temperature=0, cached=cached), wanted)


def test_nucleus_equals_the_original(golden):
    file = golden("perceiver_ar")
    for key, wanted in file.under("out/nucleus/").items():
        top_p, temperature = (float(x.strip("topemrau")) for x in key.removeprefix("top_p").split("_temperature"))
        torch.testing.assert_close(perceiver_ar.nucleus(file["in/nucleus_logits"].double(), top_p, temperature), wanted, rtol=1e-15, atol=0)


@pytest.mark.parametrize("kind", ["rotary", "sinusoidal", "learned"])
def test_a_memory_holds_what_a_run_with_as_many_latents_has(kind):
    """Whatever the way it was filled: at once, token by token, over resets, and with distances for positions."""
    torch.manual_seed(0)
    model = PerceiverAR(**TINY, positions=kind).double()
    torch.nn.init.normal_(model.out.weight)
    tokens, memory = torch.randint(1, 11, (2, 12)), model.memory()
    model.next_logits(tokens[:, :2], memory)
    counts = []
    for n in range(3, 13):
        logits = model.next_logits(tokens[:, :n], memory)
        counts.append(memory.held)
        torch.testing.assert_close(logits, model(tokens[:, :n], latents=memory.held)[:, -1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logits, model.next_logits(tokens[:, :n], model.memory()), rtol=1e-12, atol=1e-12)
    assert counts == [3, 4, 2, 3, 4, 2, 3, 4, 2, 3]


def test_padding_is_not_seen():
    torch.manual_seed(0)
    model = PerceiverAR(**TINY).double()
    torch.nn.init.normal_(model.out.weight)
    tokens = torch.randint(1, 11, (2, 9))
    out = model(torch.nn.functional.pad(tokens, (0, 3)), lengths=torch.tensor([9, 9]))
    torch.testing.assert_close(out, model(tokens), rtol=1e-12, atol=1e-12)


def test_hidden_inputs():
    """Everything hidden but a coin's choice: the logits depend on no hidden input except through the latents' own."""
    torch.manual_seed(0)
    model = PerceiverAR(**TINY, input_dropout=0.5)
    torch.nn.init.normal_(model.out.weight)
    tokens = torch.randint(1, 11, (1, 12))
    embedded = []
    model.embedding.register_forward_hook(lambda m, args, out: embedded.append(out.detach().requires_grad_()) or embedded[-1])
    assert model.training
    model(tokens)[0, -1].sum().backward()
    seen = embedded[-1].grad[0].abs().sum(1) > 0
    assert seen[-1] and 0 < seen[:8].sum() < 8
    model.eval()(tokens)[0, -1].sum().backward()
    assert (embedded[-1].grad[0].abs().sum(1) > 0).all()


def test_samples_follow_their_probabilities():
    model = PerceiverAR(**TINY)
    with torch.no_grad():
        model.out.bias.copy_(torch.tensor([0.5, 0.3, 0.15, 0.05, *[1e-9] * 7]).log())
    tokens = model.sample(torch.ones(4000, 1, dtype=torch.int64), 1, generator=torch.Generator().manual_seed(0))[:, 1]
    assert (tokens == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    kept = model.sample(torch.ones(4000, 1, dtype=torch.int64), 2, top_p=0.7, generator=torch.Generator().manual_seed(0))[:, 1:]
    assert set(kept.unique().tolist()) == {0, 1}


def _millions(make):
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters()) / 1e6


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters(name):
    def trained():
        model = PerceiverAR.from_config(name)
        for table in model.tables if name.startswith("copy") else ():
            assert not table.weight.requires_grad
            del table.weight
        return model

    assert _millions(trained) == pytest.approx(MILLIONS[name], abs=0.05)


def test_initial_values():
    torch.manual_seed(0)
    model = PerceiverAR(**TINY | dict(dim=128), positions="sinusoidal")
    assert not model.out.weight.any() and not model(torch.ones(1, 3, dtype=torch.int64)).any()
    weight = model.cross.mlp.up.weight
    assert weight.std().item() == pytest.approx(128**-0.5, rel=0.05) and weight.abs().max() <= 2.3 * 128**-0.5
    table = model.tables[0].weight
    torch.testing.assert_close(table[3, [0, 63, 64, 127]], torch.tensor([3.0, 3e-4, 3.0, 3e-4]).mul(1.0).sin().where(
        torch.tensor([True, True, False, False]), torch.tensor([3.0, 3e-4, 3.0, 3e-4]).cos()))


def test_refusals(golden):
    model, tokens = PerceiverAR(**TINY), torch.ones(1, 13, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"PerceiverAR: tokens wants 1 <= latents <= M <= context = 12, got latents = 4, M = 13"):
        model(tokens)
    with pytest.raises(ValueError, match=r"steps wants at most context \+ 1 - M = 3, got 4"):
        model.sample(tokens[:, :10], 4)
    with pytest.raises(ValueError, match=r"positions wants \(1, 5\) or \(1, 5, 1\), got \(1, 4, 1\)"):
        model(tokens[:, :5], tokens[:, :4])
    with pytest.raises(ValueError, match=r"positions wants \(B, M, 2\), got none"):
        PerceiverAR(**TINY, positions="learned", sizes=(3, 4))(tokens[:, :5])
    with pytest.raises(ValueError, match="positions wants 'rotary', 'sinusoidal' or 'learned', got 'absolute'"):
        PerceiverAR(**TINY, positions="absolute")
    file = golden("perceiver_ar")
    weights, path = file.under("weights/rotary/"), "perceiver_ar/~/logits/b"
    options = dict(vocabulary=19, context=14, latents=6, layers=2, dim=24, heads=3, cross_heads=2)
    with pytest.raises(ValueError, match=r"from_haiku: ~/logits/b wants \(19,\), got nothing"):
        PerceiverAR.from_haiku({k: x for k, x in weights.items() if k != path}, **options)
    with pytest.raises(ValueError, match=r"from_haiku: ~/logits/b wants \(19,\), got \(18,\)"):
        PerceiverAR.from_haiku(weights | {path: torch.zeros(18)}, **options)
    with pytest.raises(ValueError, match="from_haiku: the model has no place for extra"):
        PerceiverAR.from_haiku(weights | {"extra": torch.zeros(18)}, **options)
