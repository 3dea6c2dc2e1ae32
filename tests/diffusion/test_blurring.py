"""A blurring diffusion's process, posterior and sampler, and inverse heat dissipation, in float64."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fastdiff import demo, ops
from fastdiff.diffusion import BlurringDiffusion, Continuous, InverseHeat, ddim, sample

PROCESS = BlurringDiffusion()
GRID = (6, 9)
GOLDEN = Path(__file__).parent.parent / "golden" / "ihdm.safetensors"


def _times(*values):
    return torch.tensor(values, dtype=torch.float64)


def _randn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def _sigma(t):
    return PROCESS.scales(t)[1].view(-1, 1, 1, 1)


def test_schedule():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    signal, sigma, width = PROCESS.scales(t)
    torch.testing.assert_close(signal.square() + sigma.square(), torch.ones_like(t))
    logsnr = 2 * (signal / sigma).log()
    assert logsnr[0] == pytest.approx(10) and logsnr[-1] == pytest.approx(-10) and (logsnr.diff() < 0).all()
    assert width[0] == 0 and width[-1] == pytest.approx(20) and (width.diff() > 0).all()


def test_forward_process_is_diagonal():
    x, noise, t = _randn(3, 2, *GRID), _randn(3, 2, *GRID), _times(0.05, 0.5, 0.95)
    meant = ops.idct(PROCESS.alpha(t, GRID) * ops.dct(x)) + _sigma(t) * noise
    torch.testing.assert_close(PROCESS.diffuse(x, noise, t), meant)


def test_steps_compose_to_the_forward_process():
    """With the true eps, z_s has the mean alpha_s and the variance sigma_s^2 of the forward process at every frequency."""
    t, s = _times(0.2, 0.7, 1.0, 0.5), _times(0.1, 0.3, 0.99, 0.5)
    gain_z, gain_eps, gain_noise = PROCESS.gains(t, s, GRID)
    alpha_t, alpha_s = PROCESS.alpha(t, GRID), PROCESS.alpha(s, GRID)
    torch.testing.assert_close(gain_z * alpha_t, alpha_s)
    of_eps = gain_z * _sigma(t) + gain_eps
    torch.testing.assert_close(of_eps.square() + gain_noise.square(), _sigma(s).square().expand_as(alpha_s))


STEPS = dict(t=st.floats(0.02, 1), part=st.floats(0, 0.98), grid=st.tuples(st.integers(1, 9), st.integers(1, 9)))


def _step(t, part, grid):
    """Times t > s, and z, x, noise with the eps that leads from x to z."""
    t, s = _times(t), _times(t * part)
    z, x, noise = (_randn(1, channels, *grid)[:, :1] for channels in (1, 2, 3))
    return t, s, z, x, noise, ops.idct(ops.dct(z) - PROCESS.alpha(t, grid) * ops.dct(x)) / _sigma(t)


@settings(max_examples=40, deadline=None)
@given(**STEPS)
def test_one_inverse_transform_is_the_papers_three(t, part, grid):
    t, s, z, _, noise, eps = _step(t, part, grid)
    alpha_t, alpha_s = PROCESS.alpha(t, grid), PROCESS.alpha(s, grid)
    ratio = alpha_t / alpha_s
    added = _sigma(t).square() - ratio.square() * _sigma(s).square()
    variance = 1 / (1 / _sigma(s).square() + 1 / (_sigma(t).square() / ratio.square() - _sigma(s).square()))
    one = ops.idct(ratio * variance / added * ops.dct(z))
    two = ops.idct(variance / (ratio * _sigma(s).square()) * (ops.dct(z) - _sigma(t) * ops.dct(eps)))
    torch.testing.assert_close(PROCESS.denoise(z, eps, noise, t, s), one + two + ops.idct(variance.sqrt() * noise), rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(**STEPS)
def test_steps_from_eps_and_from_x_are_one(t, part, grid):
    t, s, z, x, noise, eps = _step(t, part, grid)
    torch.testing.assert_close(PROCESS.denoise(z, x, noise, t, s, prediction="x"), PROCESS.denoise(z, eps, noise, t, s),
                               rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(**STEPS)
def test_noise_is_coloured(t, part, grid):
    """By the posterior's standard deviation, frequency by frequency."""
    t, s, z, _, noise, _ = _step(t, part, grid)
    seen = ops.dct(PROCESS.denoise(0 * z, 0 * z, noise, t, s))
    ratio = PROCESS.alpha(t, grid) / PROCESS.alpha(s, grid)
    variance = 1 / (1 / _sigma(s).square() + 1 / (_sigma(t).square() / ratio.square() - _sigma(s).square()))
    torch.testing.assert_close(seen, variance.sqrt() * noise, rtol=1e-9, atol=1e-12)


def _cosines(n):
    k = torch.arange(n, dtype=torch.float64)
    rows = (torch.pi * (k + 0.5) * k.unsqueeze(1) / n).cos() * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


@settings(max_examples=20, deadline=None)
@given(t=st.floats(0.05, 1), part=st.floats(0.05, 0.95), grid=st.tuples(st.integers(1, 4), st.integers(1, 5)))
def test_posterior_is_a_product_of_gaussians_over_pixels(t, part, grid):
    """Covariances as whole matrices over the pixels: N(z_s; A_s x, sigma_s^2) N(z_t; R z_s, sigma_t^2 - sigma_s^2 R R^T)."""
    t, s, z, x, _, eps = _step(t, part, grid)
    h, w = grid
    C, pixels = torch.kron(_cosines(h), _cosines(w)), h * w
    lam = (torch.pi * torch.arange(h).double() / h).square().unsqueeze(1) + (torch.pi * torch.arange(w).double() / w).square()

    def forward_matrix(time):
        signal, sigma, width = PROCESS.scales(time)
        decay = torch.exp(-lam.flatten() * width.square() / 2)
        return signal * (C.T @ ((0.999 * decay + 0.001).unsqueeze(1) * C)), sigma.square()

    (A_t, var_t), (A_s, var_s), eye = forward_matrix(t), forward_matrix(s), torch.eye(pixels, dtype=torch.float64)
    R = torch.linalg.solve(A_s, A_t, left=False)
    added = var_t * eye - var_s * R @ R.T
    pull = torch.linalg.solve(added, R).T
    covariance = torch.linalg.inv(eye / var_s + pull @ R)
    mean = covariance @ (A_s @ x.flatten() / var_s + pull @ z.flatten())
    none = torch.zeros_like(z)
    for predicted, prediction in ((eps, "eps"), (x, "x")):
        torch.testing.assert_close(PROCESS.denoise(z, predicted, none, t, s, prediction=prediction).flatten(), mean, rtol=1e-7, atol=1e-7)
    units = eye.view(pixels, 1, h, w)
    root = PROCESS.denoise(none.expand_as(units), none.expand_as(units), units, t.expand(pixels), s.expand(pixels)).flatten(1)
    torch.testing.assert_close(root.T @ root, covariance, rtol=1e-7, atol=1e-9)


def test_gains_of_the_papers_listing():
    """Its 1e-8 beside every divisor moves the coefficients by less than one in a hundred on the paper's 1000 steps."""
    t = torch.linspace(1, 0, 1001, dtype=torch.float64)
    t, s, tiny = t[:-1], t[1:], 1e-8
    gain_z, gain_eps, gain_noise = PROCESS.gains(t, s, GRID)
    ratio = PROCESS.alpha(t, GRID) / PROCESS.alpha(s, GRID)
    var_t, var_s = _sigma(t).square(), _sigma(s).square()
    variance = 1 / (1 / var_s.clamp(min=tiny) + 1 / (var_t / ratio.square() - var_s).clamp(min=tiny)).clamp(min=tiny)
    c1 = ratio * variance / (var_t - ratio.square() * var_s + tiny)
    c2 = variance / (ratio * var_s.clamp(min=tiny))
    for got, want in ((gain_z, c1 + c2), (gain_eps, -c2 * _sigma(t)), (gain_noise, variance.sqrt())):
        assert ((got - want).abs() <= 0.01 * want.abs()).all()


def test_without_blur_it_is_ancestral_sampling():
    """Ho et al. 2020, equations 6 and 7, for abar = signal^2."""
    plain = BlurringDiffusion(max_width=0.0)
    t, s, z, x, noise, _ = _step(0.8, 0.9, GRID)
    (signal_t, sigma_t, _), (signal_s, sigma_s, _) = plain.scales(t), plain.scales(s)
    alpha = (signal_t / signal_s).square()
    mean = signal_s * (1 - alpha) / sigma_t.square() * x + alpha.sqrt() * sigma_s.square() / sigma_t.square() * z
    spread = ((1 - alpha) * sigma_s.square() / sigma_t.square()).sqrt()
    torch.testing.assert_close(plain.denoise(z, x, noise, t, s, prediction="x"), mean + spread * ops.idct(noise))


def _denoiser(x, prediction):
    """What a perfect network says where x (B, C, h, w) are the data."""

    def denoiser(z, t):
        return x if prediction == "x" else (z - ops.idct(PROCESS.alpha(t, GRID) * ops.dct(x))) / _sigma(t)

    return denoiser


@pytest.mark.parametrize("prediction", ["eps", "x"])
@pytest.mark.parametrize("steps", [50, _times(1.0, 0.9, 0.35, 0.2, 0.0)], ids=["steps", "times"])
def test_sampler_finds_the_only_image(prediction, steps):
    """Where the data are one image, the true eps is known, and a sample is that image and the noise of t = 0."""
    x, seen = _randn(2, 3, *GRID), []
    right = _denoiser(x, prediction)

    def denoiser(z, t):
        seen.append(t[0].item())
        assert t.shape == (2,) and t.dtype is torch.float64
        return right(z, t)

    found = PROCESS.sample(denoiser, _randn(2, 3, *GRID), steps, prediction=prediction, generator=torch.Generator().manual_seed(0))
    assert (found - x).abs().max() < 6 * _sigma(_times(0.0)).item()
    assert seen == pytest.approx([1 - i / 50 for i in range(50)] if isinstance(steps, int) else steps[:-1].tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_denoisers_alone(dtype):
    """State and gains stay in float32: rounded, the gains of small steps would be 1."""
    torch.manual_seed(0)
    z, seed = torch.randn(2, 3, *GRID).to(dtype), lambda: torch.Generator().manual_seed(0)
    for process, steps in ((PROCESS, (20,)), (InverseHeat(levels=20), ())):
        half = process.sample(lambda z, t: 0.3 * z, z, *steps, generator=seed())
        wide = process.sample(lambda z, t: (0.3 * z.to(dtype)).float(), z.float(), *steps, generator=seed())
        assert half.dtype is dtype and wide.dtype is torch.float32 and half.isfinite().all() and torch.equal(half, wide.to(dtype))
    t, s, noise = _times(0.9, 0.5), _times(0.89, 0.49), torch.randn(2, 3, *GRID).to(dtype)
    assert torch.equal(PROCESS.denoise(z, z, noise, t, s), PROCESS.denoise(z.float(), z.float(), noise.float(), t, s).to(dtype))


def test_sample_repeats_with_its_seed():
    x = torch.randn(2, 3, *GRID)
    first, again, other = (PROCESS.sample(lambda z, t: 0.5 * z, x, 3, generator=torch.Generator().manual_seed(n)) for n in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.dtype is torch.float32


def test_training_pair():
    x = _randn(4000, 1, 2, 3)
    seed = lambda: torch.Generator().manual_seed(0)
    z, t, eps = PROCESS.training_pair(x, generator=seed())
    torch.testing.assert_close(z, PROCESS.diffuse(x, eps, t))
    assert t.min() >= 0 and t.max() <= 1 and abs(t.mean() - 0.5) < 0.02 and abs(t.var() - 1 / 12) < 0.005
    assert abs(eps.mean()) < 0.02 and abs(eps.var() - 1) < 0.03
    assert torch.equal(PROCESS.training_pair(x, generator=seed())[0], z)
    counts = (PROCESS.training_pair(x, steps=4, generator=seed())[1] * 4).long().bincount()
    assert len(counts) == 5 and counts[0] == 0 and counts[1:].min() > 900
    z, t, eps = PROCESS.training_pair(x[:2], _times(0.1, 0.2), x[2:4])
    assert torch.equal(z, PROCESS.diffuse(x[:2], x[2:4], _times(0.1, 0.2))) and torch.equal(eps, x[2:4])


@pytest.fixture(scope="module")
def golden():
    tensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed").load_file(GOLDEN)
    return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}


SMALL = InverseHeat(levels=20, max_width=20.0)


def _near(got, want, relative=1e-12):
    assert got.dtype is torch.float64 and got.shape == want.shape
    assert (got - want).abs().max() <= relative * want.abs().max()


def test_widths_of_the_authors(golden):
    _near(SMALL.widths(), golden["const/blur_schedule"])
    for name, process in dict(mnist=InverseHeat(100, 20.0), cifar10=InverseHeat(), lsun_church=InverseHeat(400, 64.0)).items():
        _near(process.widths(), golden[f"const/schedules/{name}"])


def _by_scipy(x, widths):
    fft = pytest.importorskip("scipy.fft", reason="scipy is not installed")
    squares = [(torch.pi * torch.arange(n, dtype=x.dtype) / n).square() for n in x.shape[2:]]
    gain = torch.exp((squares[0].unsqueeze(1) + squares[1]) * (widths.view(-1, 1, 1, 1).square() / -2)).numpy()
    return torch.from_numpy(fft.idctn(gain * fft.dctn(x.numpy(), axes=(2, 3), norm="ortho"), axes=(2, 3), norm="ortho"))


@pytest.mark.parametrize("n", [15, 16])
def test_transforms_of_the_authors(golden, n):
    x = golden[f"in/{n}/random"]
    _near(ops.dct(x), golden[f"out/{n}/dct"])
    _near(ops.idct(x), golden[f"out/{n}/idct_of_input"])


@pytest.mark.parametrize("n", [15, 16])
def test_blur_of_the_authors(golden, n):
    for name in ("random", "smooth"):
        x = golden[f"in/{n}/{name}"].clone().requires_grad_()
        y = SMALL.blur(x, golden["in/levels"])
        _near(y, golden[f"out/{n}/{name}_blurred"])
        if name == "random":
            (y * golden[f"in/{n}/cotangent"]).sum().backward()
            _near(x.grad, golden[f"grad/{n}/random_blurred/x"])
        x = x.detach().float()
        ours, scipys = SMALL.blur(x, golden["in/levels"]), _by_scipy(x, SMALL.widths()[golden["in/levels"]].float())
        off, limit = ((found.double() - golden[f"out/{n}/{name}_blurred"]).abs().max() for found in (ours, scipys))
        assert off <= 2 * limit
    levels = golden[f"const/{n}/level_sweep"]
    plane = golden[f"in/{n}/random"][:1, :1].expand(len(levels), 1, n, n)
    _near(SMALL.blur(plane, levels)[:, 0], golden[f"out/{n}/level_sweep_blurred"])


def test_training_pair_of_the_authors(golden):
    y, k, residual = SMALL.training_pair(golden["in/16/random"], golden["in/loss_steps"], golden["in/loss_noise"])
    assert torch.equal(k, golden["in/loss_steps"])
    _near(y, golden["out/loss/more_blurred"] + 0.01 * golden["in/loss_noise"])
    _near(y + residual, golden["out/loss/less_blurred"])
    net = golden["in/loss_network_output"].clone().requires_grad_()
    loss = (residual - net).square().sum((1, 2, 3))
    _near(loss, golden["out/loss/per_sample"])
    loss.mean().backward()
    _near(net.grad, golden["grad/loss/network_output"])


def test_sampler_of_the_authors(golden, monkeypatch):
    noise, levels = iter(golden["in/sample_noise"]), []
    network = iter(golden["in/sample_network_output"])
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(noise))

    def denoiser(u, k):
        _near(u, golden["out/sample/states"][len(levels)])
        levels.append(k)
        return next(network)

    found = InverseHeat(levels=4).sample(denoiser, golden["out/sample/states"][0].clone(), delta=0.0125)
    _near(found, golden["out/sample/final_mean"])
    assert torch.equal(torch.stack(levels), golden["out/sample/levels_seen"])


def test_heat_pairs_drawn():
    heat, x = InverseHeat(levels=5), _randn(3000, 1, 2, 3)
    y, k, residual = heat.training_pair(x, generator=torch.Generator().manual_seed(0))
    counts = k.bincount()
    assert len(counts) == 5 and counts[0] == 0 and counts[1:].min() > 650
    torch.testing.assert_close(y + residual, heat.blur(x, k - 1))
    spread = y - heat.blur(x, k)
    assert abs(spread.std() - 0.01) < 5e-4 and abs(spread.mean()) < 5e-4


def test_heat_is_undone_by_a_network_that_knows():
    heat, x = InverseHeat(levels=6), _randn(2, 3, *GRID)
    found = heat.sample(lambda u, k: heat.blur(x, k - 1) - u, heat.blur(x, torch.tensor([6, 6])), generator=torch.Generator())
    torch.testing.assert_close(found, x)


def test_blur_of_a_photograph():
    """Against scipy in float64, at the widths of a 256-pixel model."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    x = demo.photograph(217)[..., :100, :].double().repeat(4, 1, 1, 1) / 2 + 0.5
    heat, k = InverseHeat(200, 128.0), torch.tensor([1, 50, 120, 200])
    _near(heat.blur(x, k), _by_scipy(x, heat.widths()[k]), 1e-13)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_alone(monkeypatch, capsys, terminal):
    monkeypatch.setattr(Console, "is_terminal", terminal)
    x = _randn(1, 1, 2, 2)
    for progress in (True, False):
        PROCESS.sample(lambda z, t: z, x, 2, progress=progress)
        InverseHeat(levels=2).sample(lambda u, k: u, x, progress=progress)
        sample(lambda z, t: z, x, ddim(Continuous().steps(7)), progress=progress)
        out = capsys.readouterr()
        assert not out.out and ("sampling" in out.err) == (terminal and progress)


def test_refusals():
    x, heat = _randn(2, 3, *GRID), InverseHeat(levels=5)
    for call, words in (
            (lambda: PROCESS.diffuse(x, x, _times(0.5)), "t wants the shape"),
            (lambda: PROCESS.sample(lambda z, t: z, x, 0), r"steps wants values in \[1, 2"),
            (lambda: PROCESS.sample(lambda z, t: z, x, _times(0.5, 0.7)), "steps wants falling times"),
            (lambda: PROCESS.sample(lambda z, t: z, x, _times(1.5, 0.7)), "steps wants falling times"),
            (lambda: PROCESS.sample(lambda z, t: z, x, _times(float("nan"), 0.7)), "steps wants falling times"),
            (lambda: PROCESS.gains(_times(0.5), _times(0.2), GRID, prediction="v"), "prediction wants one of 'eps', 'x', got 'v'"),
            (lambda: PROCESS.training_pair(x, steps=0), "steps wants"),
            (lambda: heat.blur(x, torch.tensor([1, 6])), r"k wants levels in \[0, 5\], got \[1, 6\]"),
            (lambda: heat.training_pair(x, torch.tensor([1, 0])), r"k wants levels in \[1, 5\], got \[0, 1\]"),
            (lambda: heat.blur(x, torch.tensor([1])), "k wants the shape"),
            (lambda: heat.blur(x, _times(1, 2)), "k wants int64"),
            (lambda: InverseHeat(levels=0), "levels wants"), (lambda: InverseHeat(min_width=0.0), "min_width wants")):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="z wants a torch"):
        PROCESS.sample(lambda z, t: z, None, 2)
    with pytest.raises(TypeError, match="steps wants an int"):
        PROCESS.sample(lambda z, t: z, x, True)
