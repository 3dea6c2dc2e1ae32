"""Whole trajectories of diffusers' schedulers, the same network and seed: the same steps, the same images."""


import pytest
import torch

from fastdiff.diffusion import VE, VP, Langevin, euler_maruyama, from_diffusers, reverse_diffusion, sample

SHAPE = (2, 3, 8, 8)


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed")


def _network(scheduler, prediction):
    """A smooth, time-dependent, not linear network near the best one for data of standard deviation 0.5. seen: what it was told."""
    gammas = scheduler.alphas_cumprod

    def network(z, time):
        network.seen.append(time)
        gamma = gammas[time].view(-1, 1, 1, 1)
        wobble = torch.tanh(z + z.roll(1, -1) + time.view(-1, 1, 1, 1) / 500) / 10
        x0 = z * (gamma.sqrt() * 0.25 / (0.25 * gamma + 1 - gamma)) + wobble
        eps = (z - gamma.sqrt() * x0) / (1 - gamma).sqrt()
        return {"epsilon": eps, "sample": x0, "v_prediction": gamma.sqrt() * eps - (1 - gamma).sqrt() * x0}[prediction]

    network.seen = []
    return network


def _trajectories(scheduler, steps, dtype, options, heads=lambda network: network, start=None):
    """(theirs, ours) in dtype; float64 with the scheduler's tables in float64, too."""
    if dtype is torch.float64:
        for table in {"alphas_cumprod", "final_alpha_cumprod"} & set(vars(scheduler)):
            setattr(scheduler, table, getattr(scheduler, table).double())
    scheduler.set_timesteps(**(dict(timesteps=steps) if isinstance(steps, list) else dict(num_inference_steps=steps)))
    network = _network(scheduler, scheduler.config.prediction_type)
    want, generator = _start(dtype) if start is None else (start, None)
    for t in scheduler.timesteps:
        want = scheduler.step(heads(network)(want, t.expand(len(want))), t, want, generator=generator, **options).prev_sample
    network.seen.clear()
    z, generator = _start(dtype) if start is None else (start, None)
    plan = from_diffusers(scheduler, eta=options.get("eta", 0.0), rederive=options.get("use_clipped_model_output", False))
    got = sample(heads(network), z, plan, generator=generator)
    assert torch.equal(torch.stack(network.seen)[:, 0], scheduler.timesteps)
    assert got.dtype is want.dtype is dtype
    return want, got


def _check(scheduler, steps, dtype, options, **heads):
    want, got = _trajectories(scheduler, steps, dtype, options, **heads)
    assert (got - want).abs().max() <= (1e-12 if dtype is torch.float64 else 1e-6) * want.abs().max()


def _start(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator, dtype=dtype), generator


LATENT = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
COSINE = dict(beta_schedule="squaredcos_cap_v2")
DDPM = {
    "all steps": (60, dict(num_train_timesteps=60)), "50": (50, {}), "cosine": (12, COSINE), "latent, unclipped": (12, LATENT),
    "trailing": (30, dict(timestep_spacing="trailing")), "linspace": (30, dict(timestep_spacing="linspace")),
    "offset": (20, dict(steps_offset=1, variance_type="fixed_large")), "large": (12, dict(variance_type="fixed_large")),
    "small_log": (12, dict(variance_type="fixed_small_log")), "sample": (12, dict(prediction_type="sample", clip_sample_range=0.7)),
    "v": (12, dict(prediction_type="v_prediction")),
    "zero snr": (12, dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")),
    "threshold": (12, dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5)),
    "given steps": ([999, 700, 300, 90, 20, 5, 0], {})}


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@DTYPES
@pytest.mark.parametrize("case", DDPM)
def test_ddpm(diffusers, case, dtype):
    steps, config = DDPM[case]
    _check(diffusers.DDPMScheduler(**config), steps, dtype, {})


@DTYPES
def test_ddpm_learned_range(diffusers, dtype):
    heads = lambda network: lambda z, time: torch.cat([network(z, time), torch.sin(3 * z)], 1)
    _check(diffusers.DDPMScheduler(variance_type="learned_range", **COSINE), 12, dtype, {}, heads=heads)


DDIM = {
    "50": (50, {}, {}), "all steps": (60, dict(num_train_timesteps=60), {}), "eta": (12, {}, dict(eta=0.7)),
    "eta 1": (12, {}, dict(eta=1.0)),
    "rederived": (12, {}, dict(eta=0.5, use_clipped_model_output=True)),
    "latent": (12, LATENT | dict(set_alpha_to_one=False, steps_offset=1), {}),
    "latent, eta": (12, LATENT | dict(set_alpha_to_one=False, steps_offset=1), dict(eta=1.0)),
    "linspace": (30, dict(timestep_spacing="linspace"), {}), "trailing": (30, dict(timestep_spacing="trailing"), {}),
    "cosine": (12, COSINE | dict(prediction_type="v_prediction"), {}), "sample": (12, dict(prediction_type="sample"), {}),
    "v": (12, dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"), {}),
    "threshold": (12, dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5), {}),
    "threshold, rederived": (12, dict(thresholding=True, dynamic_thresholding_ratio=0.9), dict(use_clipped_model_output=True, eta=0.3))}


@DTYPES
@pytest.mark.parametrize("case", DDIM)
def test_ddim(diffusers, case, dtype):
    steps, config, options = DDIM[case]
    _check(diffusers.DDIMScheduler(**config), steps, dtype, options)


@pytest.mark.parametrize("case", ["cosine", "sample", "v"])
def test_ddim_is_nearer_to_exact_arithmetic(diffusers, case):
    """Where the float32 results differ: x0's and eps' share in a step is folded into one coefficient, which spares roundings."""
    steps, config, options = DDIM[case]
    start = _start()[0]
    exact, _ = _trajectories(diffusers.DDIMScheduler(**config), steps, torch.float64, options, start=start.double())
    theirs, ours = _trajectories(diffusers.DDIMScheduler(**config), steps, torch.float32, options, start=start)
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max()


def test_ve(diffusers):
    """diffusers takes its noise levels from the sampler's grid in float32: it is given ours."""
    scheduler, sde, count = diffusers.ScoreSdeVeScheduler(sigma_max=50.0, snr=0.15, correct_steps=1), VE(high=50.0), 40
    scheduler.set_timesteps(count)
    scheduler.set_sigmas(count)
    score = lambda z, sigma: -z / (0.25 + sigma.view(-1, 1, 1, 1).square()) + torch.tanh(z) / (9 + 9 * sigma.view(-1, 1, 1, 1))
    z, generator = _start()
    z = z * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].expand(len(z))
        z = scheduler.step_correct(score(z, sigma), z, generator=generator).prev_sample
        step = scheduler.step_pred(score(z, sigma), t, z, generator=generator)
        z = step.prev_sample
    seen = []
    start, generator = _start()
    plan = reverse_diffusion(sde, count, last=1e-5, prediction="score")
    net = lambda x, sigma: (seen.append(sigma), score(x, sigma))[1]
    got = sample(net, start * sde.high, plan, corrector=Langevin(0.15), generator=generator)
    torch.testing.assert_close(torch.stack(seen)[::2, 0], scheduler.sigmas, rtol=2e-6, atol=0)
    assert (got - step.prev_sample_mean).abs().max() <= 1e-6 * step.prev_sample_mean.abs().max()


def test_vp(diffusers, draws):
    """Theirs in float64: in float32 its 1 - exp(2 c) loses three digits in the last steps. Ours in float32 is held to that too."""
    deprecated = pytest.importorskip("diffusers.schedulers.deprecated.scheduling_sde_vp")
    scheduler, count = deprecated.ScoreSdeVpScheduler(), 50
    scheduler.timesteps = torch.linspace(1, 1e-3, count, dtype=torch.float64)
    net = lambda z, time: torch.sin(z + time.view(-1, 1, 1, 1) / 999) * 0.3 + z / 2
    start, generator = _start()[0].double(), torch.Generator().manual_seed(1)
    noises = [torch.randn(SHAPE, dtype=torch.float64, generator=generator) for _ in range(count)]
    z, generator = start, generator.manual_seed(1)
    for t in scheduler.timesteps:
        z, mean = scheduler.step_pred(net(z, (t * 999).expand(len(z))), z, t, generator=generator)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        draws(noise.to(dtype) for noise in noises)
        got = sample(net, start.to(dtype), euler_maruyama(VP(), count, last=1e-3))
        assert got.dtype is dtype and (got - mean).abs().max() <= tolerance * mean.abs().max()


def test_refusals(diffusers):
    with pytest.raises(ValueError, match="scheduler wants a DDPMScheduler or a DDIMScheduler, got EulerDiscreteScheduler"):
        from_diffusers(diffusers.EulerDiscreteScheduler())
    with pytest.raises(ValueError, match="set_timesteps called"):
        from_diffusers(diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="variance_type wants"):
        from_diffusers(diffusers.DDPMScheduler(variance_type="learned"))
