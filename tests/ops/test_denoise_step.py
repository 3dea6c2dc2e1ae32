"""What is peculiar to the sampling ops: the published samplers are this step with their coefficients; memory orders; refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdiff.core.case import Dim, OneOf
from fastdiff.ops import add_noise, denoise_step, denoise_step_with_x0, guide
from fastdiff.ops.denoise_step import GUIDE, STEP
from fastdiff.testing.check import run
from fastdiff.testing.properties import registered, subjects

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "bits.safetensors"


@pytest.fixture(scope="module")
def golden():
    return pytest.importorskip("safetensors.torch").load_file(GOLDEN)


def draw(count, *shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def levels(g, next_g, sampler):
    """to_x0, to_eps, to_noise of the docstring, from float64 signal powers."""
    if sampler == "ddim":
        return next_g.sqrt(), (1 - next_g).sqrt(), None
    ratio = g / next_g
    large = 1 - ratio
    noise = large if sampler == "ddpm@large" else large * (1 - next_g) / (1 - g)
    return next_g.sqrt(), ratio.sqrt() * (1 - next_g) / (1 - g).sqrt(), noise.sqrt()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm@large", "ddpm@small"])
@pytest.mark.parametrize("prediction", ["eps", "x", "v"])
def test_published_steps(golden, prediction, sampler, dtype):
    """pix2seq's samplers, which clip x0 and derive eps anew; its DDPM takes the noise of the clipped x0."""
    g, next_g = golden["in/step/gammas"].double().unbind(1)
    to_x0, to_eps, to_noise = levels(g, next_g, sampler)
    c = [k if k is None else k.to(dtype) for k in (g.sqrt(), (1 - g).sqrt(), to_x0, to_eps, to_noise)]
    x, pred, noise = (golden[f"in/step/{name}"].to(dtype) for name in ("x_t", "network_output", "noise"))
    given = dict(prediction={"x": "x0"}.get(prediction, prediction), clip=1.0, noise=None if to_noise is None else noise)
    y, x0 = denoise_step_with_x0(x, pred, *c, **given)
    exact = golden[f"out/step/{prediction}_{sampler}"]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert (y - exact).abs().max() <= tolerance * exact.abs().max()
    assert torch.equal(denoise_step(x, pred, *c, **given), y)
    clean = golden[f"out/convert/{prediction}_clip_truncated/x0"]
    assert (x0 - clean).abs().max() <= tolerance * clean.abs().max()


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_predictions_own_noise(golden, prediction):
    """rederive=False: to_x0 = 0, to_eps = 1 returns the eps that the prediction means, clipped or not."""
    g = golden["in/step/gammas"].double()[:, 0]
    x, pred = golden["in/step/x_t"].double(), golden["in/step/network_output"].double()
    eps = denoise_step(x, pred, g.sqrt(), (1 - g).sqrt(), 0.0, 1.0, prediction=prediction, clip=1.0, rederive=False)
    torch.testing.assert_close(eps, golden[f"out/convert/{prediction}_clip_plain/eps"], atol=1e-12, rtol=1e-12)


def test_learned_variance():
    """log variance interpolated between log b and log a, as in improved DDPM."""
    x, pred, noise, v = draw(4, 3, 2, 5, 5)
    v = v.tanh()
    a, b = torch.tensor([0.3, 0.2, 0.1]), torch.tensor([0.1, 0.19, 1e-4])
    c = (torch.full((3,), 0.8), torch.full((3,), 0.6), torch.full((3,), 0.85), torch.full((3,), 0.5))
    share = (v + 1) / 2
    spread = lambda s: s.view(3, 1, 1, 1)
    std = torch.exp(0.5 * (share * spread(a.log()) + (1 - share) * spread(b.log())))
    mean = denoise_step(x, pred, *c, clip=1.0)
    y = denoise_step(x, pred, *c, b.sqrt(), clip=1.0, noise=noise, variance=(v, (a / b).log()))
    torch.testing.assert_close(y, mean + std * noise, atol=1e-6, rtol=1e-5)


def test_score_step():
    """x + a score + b noise, score = -eps / sigma, is the step of the docstring."""
    x, eps, noise = draw(3, 2, 3, 6, 6)
    signal, sigma, a, b = torch.tensor([1.0, 0.7]), torch.tensor([20.0, 0.7]), torch.tensor([9.0, 0.02]), torch.tensor([3.0, 0.1])
    spread = lambda s: s.view(2, 1, 1, 1)
    y = denoise_step(x, eps, signal, sigma, signal, sigma - a / sigma, b, noise=noise)
    torch.testing.assert_close(y, x - spread(a / sigma) * eps + spread(b) * noise, atol=2e-6, rtol=1e-5)


def test_forward_process(golden):
    g, x = golden["out/add_noise/gamma"], golden["out/encode/uint8"].double()
    z = add_noise(x, golden["in/add_noise/noise"].double(), g.sqrt(), (1 - g).sqrt())
    torch.testing.assert_close(z, golden["out/add_noise/x_t"], atol=1e-12, rtol=1e-12)


def test_rescaled_guidance_keeps_the_deviation():
    cond, uncond = draw(2, 3, 4, 50, 50) * 0.1 + 30
    y = guide(cond, uncond, 7.5, rescale=1.0)
    torch.testing.assert_close(y.flatten(1).std(1), cond.flatten(1).std(1))
    assert torch.equal(guide(cond, uncond, torch.full((3,), 7.5)), guide(cond, uncond, 7.5))


@pytest.mark.parametrize("shape", [(2, 3, 8, 9), (1, 3, 8, 8), (2, 3, 4, 5, 6)])
def test_memory_order(shape):
    """Channels-last in, channels-last out; chunks of one network output, or another order, give the same numbers."""
    order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x, pred, v, noise = draw(4, *shape)
    c = [torch.full(shape[:1], k) for k in (0.8, 0.6, 0.9, 0.3, 0.2)]
    step = lambda x, pred, v, noise: denoise_step(x, pred, *c, clip=1.0, noise=noise, variance=(v, c[0]))
    y = step(x, pred, v, noise)
    last = step(*(t.to(memory_format=order) for t in (x, pred, v, noise)))
    assert last.is_contiguous(memory_format=order) and torch.equal(last, y)
    assert torch.equal(step(x, *torch.cat([pred, v], 1).chunk(2, 1), noise.to(memory_format=order)), y)


def test_refusals():
    x, c = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="denoise_step: noise wants to_noise beside it"):
        denoise_step(x, x, c, c, c, c, noise=x)
    with pytest.raises(ValueError, match="denoise_step: variance wants noise beside it"):
        denoise_step(x, x, c, c, c, c, variance=(x, c))
    with pytest.raises(ValueError, match="denoise_step: clip wants a value above 0, got -1"):
        denoise_step(x, x, c, c, c, c, clip=-1)
    with pytest.raises(ValueError, match=r"guide: rescale wants a value in \[0, 1\], got 1.5"):
        guide(x, x, 2.0, rescale=1.5)
    with pytest.raises(ValueError, match="add_noise: signal has B = 3, but x has B = 2"):
        add_noise(x, x, torch.ones(3), c)


def test_no_samples_of_no_channels():
    """torch's opcheck cannot copy a tensor with two empty axes by its usual strides."""
    (subject, _), = subjects("cpu", ["denoise_step"], ["cpu"])
    sizes = dict(B=Dim(0, 0), C=Dim(0, 0), h=Dim(56, 56), w=Dim(2, 2), form=OneOf("image"))
    empty = replace(subject, case=replace(subject.case, dims=subject.case.dims | sizes))
    assert run(registered, empty, count=1).failure is None


def test_a_trajectory_rounds_as_plain_pytorch():
    """At a signal of 0.006 a rounding of the state moves x0 by 4e-5: only the same roundings give the same trajectory."""
    x, eps = draw(2, 1, 3, 16, 16)
    g = torch.cat([torch.linspace(0.006, 0.99, 30, dtype=torch.float64).square(), torch.ones(1, dtype=torch.float64)])
    signal, sigma = g.sqrt().float(), (1 - g).sqrt().float()
    y = plain = x
    for i in range(30):
        now, after = (signal[i : i + 1], sigma[i : i + 1]), (signal[i + 1 : i + 2], sigma[i + 1 : i + 2])
        y = denoise_step(y, eps, *now, *after, clip=1.0, rederive=False)
        plain = after[0] * ((plain - now[1] * eps) / now[0]).clamp(-1, 1) + after[1] * eps
    assert (y - plain).abs().max() <= 1e-6 * plain.abs().max()


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_linear_derivatives(prediction, monkeypatch):
    """Unclipped, a step is linear in its images: its tangent is a step of the tangents, and no derivative runs the reference."""
    for made in (STEP, GUIDE):
        monkeypatch.setattr(made, "reference", None)
    x, pred, noise, *tangents = draw(6, 2, 3, 5)
    c = [torch.tensor(v) for v in ([0.8, 0.3], [0.6, 0.9], [0.9, 0.5], [0.3, 0.2], [0.1, 0.2])]
    step = lambda x, pred, noise: denoise_step(x, pred, *c, prediction=prediction, noise=noise)
    _, dot = torch.func.jvp(step, (x, pred, noise), tuple(tangents))
    assert torch.equal(dot, step(*tangents))
    _, dot = torch.func.jvp(lambda x: step(x, pred, noise), (x,), (tangents[0],))
    zero = torch.zeros_like(x)
    torch.testing.assert_close(dot, step(tangents[0], zero, zero))
    _, pull = torch.func.vjp(step, x, pred, noise)
    for gradient, tangent, others in zip(pull(tangents[0]), tangents, range(3), strict=True):
        alone = step(*(tangent if i == others else zero for i in range(3)))
        torch.testing.assert_close((gradient * tangent).sum(), (tangents[0] * alone).sum(), rtol=1e-4, atol=1e-4)
    _, dot = torch.func.jvp(lambda x, pred: guide(x, pred, 3.0), (x, pred), tuple(tangents[:2]))
    assert torch.equal(dot, guide(*tangents[:2], 3.0))
