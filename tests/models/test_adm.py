"""ADM and its classifier against guided-diffusion's results, and the sheet's sizes."""

import pytest
import torch

from fastdiff.models import ADM, Classifier, adm

# name -> the program's own errors in float32: of outputs, of gradients
PUBLISHED = {"adm_scale_shift": (8.0e-7, 1.7e-6), "adm_conv_resample": (6.4e-7, 7.2e-6), "adm_classifier": (3.6e-7, 1.8e-6)}
# name -> millions of parameters, milliards of multiply-adds of a pass over one image
SIZES = {"imagenet-64": (295.9, 109.7), "imagenet-128": (421.5, 306.9), "imagenet-256": (553.8, 1119.8),
         "imagenet-256-unconditional": (552.8, 1119.8), "imagenet-512": (559.0, 1982.3), "lsun-256": (552.8, 1119.8),
         "upsample-64-256": (311.8, 631.6), "upsample-128-512": (308.8, 2504.8)}
CLASSIFIER_SIZES = {"imagenet-64": (65.4, 19.1), "imagenet-128": (42.6, 21.0), "imagenet-256": (54.1, 73.3), "imagenet-512": (54.4, 112.8)}
TINY = dict(image_size=8, width=32, multipliers=(1, 2), blocks=1, attention=(4,), heads=2)


def load(file, dtype):
    """The model of a golden file, and whether its attention's rows are ordered by head."""
    c, heads_first = file.config, not file.config["use_new_attention_order"]
    fixed = c["num_head_channels"] == -1
    options = dict(image_size=c["image_size"], width=c["model_channels"], multipliers=c["channel_mult"], blocks=c["num_res_blocks"],
                   attention=[c["image_size"] // rate for rate in c["attention_resolutions"]], in_channels=c["in_channels"],
                   heads=c["num_heads"] if fixed else None, head_dim=None if fixed else c["num_head_channels"],
                   resample="residual" if c["resblock_updown"] else "conv", additive=not c["use_scale_shift_norm"])
    if "pool" in c:
        model = Classifier(**options, classes=c["out_channels"])
    else:
        model = ADM(**options, classes=c["num_classes"], out_channels=c["out_channels"])
    model.load_guided_diffusion(file.weights, heads_first=heads_first)
    return model.to(dtype).eval(), heads_first


def gradients(model, file, x, heads_first):
    wanted = adm.renamed(model, file.under("grad/main/weights/"), adm.NAMES, heads_first)
    return {"x": (x.grad, file["grad/main/x"])} | {name: (model.get_parameter(name).grad, value) for name, value in wanted.items()}


@pytest.mark.parametrize("name", ["adm_scale_shift", "adm_conv_resample"])
def test_equals_guided_diffusion(golden, held, name):
    file = golden(name)
    model, heads_first = load(file, held.dtype)
    x = file["in/x"].to(held.dtype).requires_grad_()
    out = model(x, file["in/t"], file.tensors.get("in/y"))
    (out * file["cot/main/out"].to(held.dtype)).sum().backward()
    held.outputs(PUBLISHED[name][0], out=(out, file["out/main/out"]))
    held.gradients(PUBLISHED[name][1], gradients(model, file, x, heads_first))


def test_classifier_equals_guided_diffusion(golden, held):
    file, (outputs, grads) = golden("adm_classifier"), PUBLISHED["adm_classifier"]
    model, heads_first = load(file, held.dtype)
    x, t, y = file["in/x"].to(held.dtype).requires_grad_(), file["in/t"], file["in/y"]
    logits = model(x, t)
    (logits * file["cot/main/logits"].to(held.dtype)).sum().backward()
    log_probs = logits.log_softmax(1)
    held.outputs(outputs, logits=(logits, file["out/main/logits"]), log_probs=(log_probs, file["out/main/log_probs"]),
                 log_prob_y=(log_probs.gather(1, y.unsqueeze(1)).squeeze(1), file["out/main/log_prob_y"]))
    held.gradients(grads, gradients(model, file, x, heads_first))
    with torch.no_grad():
        held.gradients(grads, {"guidance": (model.guidance(x, t, y), file["grad/guidance/x"])})


@pytest.mark.parametrize("name", ADM.CONFIGS)
def test_size(size, name):
    options = ADM.CONFIGS[name]
    image = (3, options["image_size"], options["image_size"])
    labels, low_res = [None] * (options["classes"] is not None), [(3, 64, 64)] * options.get("low_res", False)
    assert size(lambda: ADM.from_config(name), image, None, *labels, *low_res) == pytest.approx(SIZES[name], abs=0.051)


@pytest.mark.parametrize("name", Classifier.CONFIGS)
def test_size_of_classifier(size, name):
    """Here the pool has one query, so a little less is multiplied."""
    pixels = Classifier.CONFIGS[name]["image_size"]
    millions, milliards = size(lambda: Classifier.from_config(name), (3, pixels, pixels), None)
    assert millions == pytest.approx(CLASSIFIER_SIZES[name][0], abs=0.051)
    assert milliards == pytest.approx(CLASSIFIER_SIZES[name][1] - 0.04, abs=0.06)


def perturbed(model):
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.1)
    return model


def test_channels_last_is_the_same():
    model, x, t = perturbed(ADM(**TINY)), torch.randn(2, 3, 8, 16), torch.tensor([3.5, 500.0])
    plain = model(x, t)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last), t), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("resample", ["residual", "conv", "same", "pool"])
def test_begins_with_zero(resample):
    assert not ADM(**TINY, resample=resample)(torch.randn(1, 3, 8, 8), torch.tensor([7])).any()


def test_upsampler_reads_the_low_resolution():
    model = perturbed(ADM(**TINY, low_res=True))
    plain = ADM(**TINY, in_channels=6)
    plain.load_state_dict(model.state_dict())
    x, low, t = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 4), torch.tensor([7])
    larger = torch.nn.functional.interpolate(low, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(model(x, t, low_res=low), plain(torch.cat((x, larger), 1), t))


def test_compiles_whole():
    model, x, t, y = perturbed(ADM(**TINY, classes=5)), torch.randn(2, 3, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 4])
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, t, y), model(x, t, y), rtol=1e-4, atol=1e-4)


def test_refusals():
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])
    plain, labelled = ADM(**TINY), ADM(**TINY, classes=3)
    for call, why in ((lambda: plain(x, t, y), "ADM: y wants None for this model, got a tensor"),
                      (lambda: labelled(x, t), "ADM: y wants a tensor, got None"),
                      (lambda: labelled(x, t, y[:1]), r"ADM: y wants the shape \(B,\) = \(2,\), got \(1,\)"),
                      (lambda: plain(x, t[:1]), r"ADM: t wants the shape \(B,\) = \(2,\), got \(1,\)"),
                      (lambda: plain(x, t, low_res=x), "ADM: low_res wants None for this model, got a tensor"),
                      (lambda: plain(x[..., 1:], t), r"ADM: x wants a grid that 2 divides, got \(8, 7\)"),
                      (lambda: ADM(**TINY, head_dim=8), "ADM: heads and head_dim: wants one of them, got heads=2, head_dim=8"),
                      (lambda: ADM(**TINY, resample="fir"), "ADM: resample wants 'residual', 'conv', 'same' or 'pool', got 'fir'"),
                      (lambda: ADM(**TINY | dict(multipliers=None)), "ADM: multipliers wants to be given for image_size = 8"),
                      (lambda: ADM.from_config("imagenet-32"), "ADM: from_config: name wants one of imagenet-64, .*, got 'imagenet-32'"),
                      (lambda: Classifier(**TINY, head_dim=None)(torch.randn(2, 3, 16, 8), t), "Classifier: x wants 16 pixels")):
        with pytest.raises(ValueError, match=why):
            call()
