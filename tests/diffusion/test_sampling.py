"""Identities of processes and plans, and what the sampling loop promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from fastdiff import diffusion as D
from fastdiff import ops
from fastdiff.demo import define_torchvision_operators
from fastdiff.diffusion.sampling import advance, rows

LINEAR = D.Discrete(D.linear_betas(50))
PLANS = {"ddpm": D.ddpm(LINEAR.steps(), clip=1.0), "ddim": D.ddim(LINEAR.steps(), eta=0.5),
         "learned": D.ddpm(LINEAR.steps(), variance="learned"), "pc": D.reverse_diffusion(D.VE(), 20, prediction="score"),
         "euler": D.euler_maruyama(D.SubVP(), 20),
         "threshold": D.ddim(LINEAR.steps(), eta=1.0, threshold=(0.9,)),
         "bits": D.ddpm(D.Continuous().steps(10, shift=1.5), prediction="x0")}
EXAMPLES = settings(max_examples=25, deadline=None)
LEVELS = st.floats(0.01, 0.99).map(lambda g: torch.tensor([g], dtype=torch.float64))


def _randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _network(plan):
    """Any smooth function of z and time, with as many channels as the plan wants."""

    def network(z, time, *carried):
        y = torch.tanh(z.roll(1, -1) + time.to(z.dtype).view(-1, 1, 1, 1) / 100)
        return torch.cat([y, z.sin()], 1) if plan.log_ratio is not None else y

    return network


def _close(got, want, **kwargs):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, **kwargs)


@EXAMPLES
@given(LEVELS)
def test_predictions_agree(gamma):
    """eps, x0, v and the score of one (x0, eps) mean it again."""
    process, x0, eps = D.Continuous(lambda t: t), _randn(1, 3, 4), _randn(1, 3, 4, seed=1)
    z = process.diffuse(x0, eps, gamma)
    for prediction in ("eps", "x0", "v"):
        _close(process.x0_and_eps(z, process.target(x0, eps, gamma, prediction), gamma, prediction=prediction), (x0, eps))
    _close(process.target(x0, eps, gamma, "score"), -eps / (1 - gamma).sqrt())


@EXAMPLES
@given(LEVELS, LEVELS, st.floats(0.1, 3.0), st.floats(0.1, 3.0))
def test_posterior_is_a_product_of_gaussians(gamma, other, scale, scale_next):
    """ddpm's mean and variance are those of q(z_t | z_s) q(z_s | x0), also where signal^2 + sigma^2 is not 1."""
    gamma, after = torch.minimum(gamma, other * 0.999), torch.maximum(gamma, other)
    signal, next_signal = gamma.sqrt() * scale, after.sqrt() * scale_next
    sigma, next_sigma = (1 - gamma).sqrt() * scale, (1 - after).sqrt() * scale_next
    steps = D.Steps(*(torch.cat([c, c]) for c in (gamma, signal, sigma, next_signal, next_sigma)))
    small, large = (D.ddpm(steps, variance=variance) for variance in ("small", "large"))
    ratio = signal / next_signal
    added = sigma.square() - (ratio * next_sigma).square()
    variance = 1 / (ratio.square() / added + 1 / next_sigma.square())
    x0, eps = _randn(1, 5), _randn(1, 5, seed=1)
    z = signal * x0 + sigma * eps
    mean = variance * (ratio / added * z + next_signal / next_sigma.square() * x0)
    _close(small.to_x0[:1] * x0 + small.to_eps[:1] * eps, mean)
    _close(small.to_noise[:1], variance.sqrt())
    _close(large.to_noise[:1], added.sqrt())
    _close(D.ddim(steps, eta=1.0).to_eps, small.to_eps)
    _close(D.ddim(steps, eta=1.0).to_noise, small.to_noise)


@EXAMPLES
@given(st.integers(2, 60), st.data())
def test_respacing(steps, data):
    process = D.Discrete(D.cosine_betas(steps))
    _close(process.respaced(steps).betas, process.betas)
    assert torch.equal(process.respaced(steps).time, process.time)
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, steps - 1), min_size=1))))
    fewer = process.respaced(kept)
    _close(fewer.gamma, process.gamma[kept])
    again = torch.arange(len(kept))[:: data.draw(st.integers(1, 4))]
    _close(fewer.respaced(again).betas, process.respaced(kept[again]).betas)
    sections = data.draw(st.integers(1, min(4, steps)))
    counts = [data.draw(st.integers(0, steps // sections)) for _ in range(sections)]
    found = D.spaced(steps, counts)
    assert len(found) == sum(counts) and (found.diff() > 0).all() and ((found >= 0) & (found < steps)).all()


@EXAMPLES
@given(st.integers(1, 40), st.floats(0, 3))
def test_asymmetric_steps(count, shift):
    steps = D.Continuous(D.simple_linear_gamma, tells="t").steps(count, shift=shift)
    k = torch.arange(count, dtype=torch.float64)
    _close(steps.time, 1 - k / count)
    _close(steps.next_signal.square(), 1 - ((count - 1 - shift - k) / count).clamp(0, 1 - 1e-9))
    assert steps.next_signal[-1] == 1 and steps.next_sigma[-1] == 0


@pytest.mark.parametrize("process", [LINEAR, D.Continuous(), D.VP()], ids=["discrete", "continuous", "vp"])
def test_exact_denoiser_samples_the_data(process):
    """For data N(0, 0.25) the best eps is a multiple of z: each step is linear, and the last z's variance follows exactly."""
    if process is LINEAR:
        plan = D.ddpm(D.Discrete(D.linear_betas(1000)).steps())
    else:
        plan = D.ddpm(process.steps(1000)) if isinstance(process, D.Continuous) else D.euler_maruyama(process, 2000, last=1e-4)
    power = plan.signal.square() * 0.25 + plan.sigma.square()
    # E[eps | z] = sigma z / power, E[x0 | z] = 0.25 signal z / power
    gain = plan.to_x0 * 0.25 * plan.signal / power + plan.to_eps * plan.sigma / power
    variance = torch.ones((), dtype=torch.float64)
    for g, std in zip(gain, plan.to_noise, strict=True):
        variance = variance * g.square() + std.square()
    assert variance.item() == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("name", PLANS)
def test_seed_repeats(name):
    plan, z = PLANS[name], torch.randn(2, 3, 4, 4)
    kwargs = dict(corrector=D.Langevin(steps=2)) if name == "pc" else {}
    run = lambda seed: D.sample(_network(plan), z, plan, generator=torch.Generator().manual_seed(seed), **kwargs)
    before = z.clone()
    first = run(1)
    assert torch.equal(first, run(1)) and torch.equal(z, before)
    assert not torch.equal(first, run(2))


@pytest.mark.parametrize("name", PLANS)
def test_step_never_waits_for_the_device(name):
    """On a fake GPU whatever asks for a value raises: the step can be captured in a CUDA graph."""
    plan = PLANS[name]
    corrector = D.Langevin() if name == "pc" else None
    (time, *_), (table, *_) = rows(plan, torch.zeros(2, 3, 4, 4))
    with FakeTensorMode():
        time, table = (torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in (time, table))
        z, *noises = (torch.randn(2, 3, 4, 4, device="cuda") for _ in range(3 if name == "pc" else 2))
        new, _, _ = advance(_network(plan), plan, corrector, None, None, None, name == "bits", z, time, table, None, *noises)
    assert new.shape == z.shape and new.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@pytest.mark.parametrize("name", PLANS)
def test_graph_replays_the_loop(name):
    plan, z = PLANS[name], torch.randn(2, 3, 4, 4, device="cuda")
    kwargs = dict(corrector=D.Langevin(steps=2)) if name == "pc" else {}
    run = lambda graph: D.sample(_network(plan), z, plan, generator=torch.Generator("cuda").manual_seed(0), graph=graph, **kwargs)
    torch.testing.assert_close(run(True), run(False))


def test_self_condition_on_x0():
    plan, seen = D.ddim(LINEAR.steps(), prediction="x0", clip=0.5), []

    def network(z, time, x0):
        seen.append(x0)
        return z * 0.9

    z = torch.randn(2, 3, 4, 4)
    got = D.sample(network, z, plan, self_condition="x0", result="x0")
    assert torch.equal(seen[0], torch.zeros_like(z)) and torch.equal(seen[1], (z * 0.9).clamp(-0.5, 0.5))
    assert len(seen) == 50 and got.abs().max() <= 0.5 and seen[-1].abs().max() <= 0.5


def test_carried_state():
    plan, seen = D.ddim(LINEAR.steps()), []

    def network(z, time, state):
        seen.append(state)
        return z.tanh(), time + (0 if state is None else state)

    both = D.classifier_free(network, lambda z, time, state: (z * 0, time * 100), 2.0)
    D.sample(both, torch.randn(2, 3, 4, 4), plan, self_condition="state")
    assert seen[0] is None and seen[1][0] == 49 and seen[2][0] == 49 + 48


def test_training_estimates():
    process, z, t = D.Continuous(), torch.randn(4, 3, 2, 2), torch.rand(4)
    weight = torch.ones((), requires_grad=True)
    got = D.estimate(lambda z, gamma, none: weight * z + none, z, t, process, clip=0.3, share=0.5)
    assert torch.equal(got, torch.cat([z[:2].clamp(-0.3, 0.3), torch.zeros(2, 3, 2, 2)])) and not got.requires_grad
    state = D.warm_state(lambda z, time, none: (z, weight * z.flatten(2)), z, t, torch.tensor([True, False, True, False]))
    assert torch.equal(state[1::2], torch.zeros(2, 3, 4)) and torch.equal(state[::2], z[::2].flatten(2)) and not state.requires_grad


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_classifier_guidance_of_ddim(prediction):
    """A linear log-probability's gradient moves eps by -sigma times it, whatever is predicted."""
    plan, push = D.ddim(LINEAR.steps(), prediction=prediction), _randn(1, 3, 4)
    gradient = D.classifier(lambda z, time: (z * push).flatten(1).sum(1), 0.7)
    table, time, z, pred = rows(plan, _randn(2, 3, 4))[1][10], torch.zeros(2), _randn(2, 3, 4, seed=1), _randn(2, 3, 4, seed=2)
    got, _, _ = advance(lambda z, time: pred, plan, None, gradient, None, None, False, z, time, table, None)
    signal, sigma, to_x0, to_eps = (column[10] for column in plan[1:5])
    eps = ops.denoise_step(z, pred, signal.expand(2), sigma.expand(2), 0.0, 1.0, prediction=prediction) - 0.7 * sigma * push
    _close(got, to_x0 * (z - sigma * eps) / signal + to_eps * eps)


@pytest.mark.parametrize("prediction", ["eps", "score"])
def test_correctors_are_guided(prediction):
    """With a classifier's gradient, predictor and corrector follow the sum of both scores: as a denoiser that adds it up itself."""
    plan, pull = D.reverse_diffusion(D.VP(), 40, prediction=prediction), _randn(1, 3, 4)
    network = lambda z, time: torch.tanh(z + time.view(-1, 1, 1) / 999)
    gradient = D.classifier(lambda z, time: -(z - pull).square().flatten(1).sum(1), 0.1)

    def summed(z, time):
        sigma = D.VP().marginal(time / 999)[1].view(-1, 1, 1)
        return network(z, time) + gradient(z, time) * (1 if prediction == "score" else -sigma)

    run = lambda net, **kwargs: D.sample(net, _randn(2, 3, 4, seed=1), plan, corrector=D.Langevin(),
                                         generator=torch.Generator().manual_seed(0), **kwargs)
    _close(run(network, gradient=gradient), run(summed))


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_classifier_guidance_of_ddpm(variance):
    """The mean moves by the step's variance times the gradient."""
    plan, push = D.ddpm(LINEAR.steps(), variance=variance), _randn(1, 2, 4)
    table, time, z, noise = rows(plan, _randn(2, 2, 4))[1][10], torch.zeros(2), _randn(2, 2, 4, seed=1), _randn(2, 2, 4, seed=2)
    pred, v = _randn(2, 2, 4, seed=3), _randn(2, 2, 4, seed=4)
    output = torch.cat([pred, v], 1) if variance == "learned" else pred
    step = lambda gradient: advance(lambda z, time: output, plan, None, gradient, None, None, False, z, time, table, None, noise)[0]
    std = plan.to_noise[10] * (torch.exp(plan.log_ratio[10] * (v + 1) / 4) if variance == "learned" else 1)
    _close(step(D.classifier(lambda z, time: (z * push).flatten(1).sum(1), 0.7)) - step(None), 0.7 * std**2 * push.expand(2, 2, 4))


def test_classifier_free():
    cond, uncond, z, time = _randn(2, 4, 5, seed=1), _randn(2, 4, 5, seed=2), _randn(2, 4, 5), torch.zeros(2)
    meant = uncond + 1.5 * (cond - uncond)
    _close(D.classifier_free(lambda z, t: cond, lambda z, t: uncond, 1.5)(z, time), meant)
    _close(D.classifier_free(lambda z, t: torch.cat([cond, uncond]), None, 1.5)(z, time), meant)
    some = D.classifier_free(lambda z, t: cond, lambda z, t: uncond, 1.5, channels=3)(z, time)
    _close(some, torch.cat([meant[:, :3], cond[:, 3:]], 1))
    scaled = D.classifier_free(lambda z, t: cond, lambda z, t: uncond, 1.5, rescale=1.0)(z, time)
    _close(scaled.flatten(1).std(1), cond.flatten(1).std(1))
    with pytest.raises(ValueError, match=r"classifier_free: cond wants to give 2 B = 4 samples"):
        D.classifier_free(lambda z, t: cond, None, 1.5)(z, time)


def test_dynamic_threshold():
    x = torch.linspace(-4, 4, 101).expand(2, 101) * torch.tensor([[1.0], [0.1]])
    got = D.dynamic_threshold(x, 0.5)
    _close(got[0], x[0].clamp(-2, 2) / 2)
    assert torch.equal(got[1], x[1])
    assert D.dynamic_threshold(x, 0.9, 1.5).abs().max() == 1


def test_constrain_pastes_what_is_known():
    known, mask = torch.randn(1, 3, 4, 4), torch.rand(1, 1, 4, 4) < 0.5
    seen = []
    network = lambda z, time: (seen.append(z), z.tanh())[1]
    got = D.sample(network, torch.randn(2, 3, 4, 4), PLANS["ddpm"], constrain=lambda z: torch.where(mask, known, z))
    hole = mask.expand_as(got)
    assert all(torch.equal(z[hole], known.expand_as(z)[hole]) for z in (*seen[1:], got))


def test_learned_range_ends():
    """v = -1 is the small variance, v = 1 the large one."""
    z, noise = _randn(2, 3, 4), _randn(2, 3, 4, seed=1)
    plans = {v: D.ddpm(LINEAR.steps(), variance=v) for v in ("small", "large", "learned")}
    pred = z.tanh()

    def step(plan, output):
        table = rows(plan, z)[1][7]
        return advance(lambda z, time: output, plan, None, None, None, None, False, z, torch.zeros(2), table, None, noise)[0]

    for v, fixed in ((-1.0, "small"), (1.0, "large")):
        _close(step(plans["learned"], torch.cat([pred, torch.full_like(z, v)], 1)), step(plans[fixed], pred))


def test_inverse_steps_encode():
    """With the true eps, DDIM's encoding and its sampling are each other's inverses."""
    x0, eps = _randn(1, 3, 4), _randn(1, 3, 4, seed=1)
    up, down = D.ddim(LINEAR.steps(inverse=True)), D.ddim(LINEAR.steps())
    z = LINEAR.diffuse(x0, eps, torch.tensor([0]))
    _close(D.sample(lambda z, time: eps, z, up), eps)
    _close(D.sample(lambda z, time: eps, LINEAR.diffuse(x0, eps, torch.tensor([49])), down), x0)
    levels = LINEAR.between(torch.tensor([0, 7]), torch.tensor([0.0, 1.0], dtype=torch.float64))
    _close(levels, torch.stack([torch.ones((), dtype=torch.float64), LINEAR.gamma[7]]))


@pytest.mark.parametrize("ddim", [False, True], ids=["ddpm", "ddim"])
@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_bit_diffusion(monkeypatch, ddim, delay):
    """The sampling loops of the package bit-diffusion, which tells its network log-SNR and feeds x0 back."""
    define_torchvision_operators()
    package = pytest.importorskip("bit_diffusion.bit_diffusion", reason="bit-diffusion is not installed")

    class Network(torch.nn.Module):
        channels = 24

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(1.3))

        def forward(self, z, logsnr, x0=None):
            return torch.tanh(self.weight * z + z.roll(1, -1) / 3 + logsnr.view(-1, 1, 1, 1) / 20 + (0 if x0 is None else x0 / 4))

    network, steps = Network(), 10
    theirs = package.BitDiffusion(network, image_size=4, timesteps=steps, use_ddim=ddim, noise_schedule="linear", time_difference=delay)
    images = {}
    monkeypatch.setattr(package, "bits_to_decimal", lambda z: images.setdefault("bits", z))
    torch.manual_seed(0)
    theirs.sample(2)
    torch.manual_seed(0)
    process = D.Continuous(lambda t: torch.sigmoid(-torch.log(torch.expm1(1e-4 + 10 * t**2))), tells="logsnr")
    plan = (D.ddim if ddim else D.ddpm)(process.steps(steps, shift=delay * steps), prediction="x0", clip=1.0)
    got = D.sample(network, torch.randn(2, 24, 4, 4), plan, self_condition="x0")
    torch.testing.assert_close(got, images["bits"], rtol=0, atol=2e-5)


def test_half_precision_follows_float32():
    plan, z = PLANS["ddim"], torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plan = plan._replace(to_noise=None)
    want = D.sample(_network(plan), z, plan)
    got = D.sample(_network(plan), z.bfloat16(), plan)
    assert got.dtype is torch.bfloat16 and (got - want).abs().max() < 0.1 * want.abs().max()


@pytest.mark.parametrize("call, text", [
    (lambda z: D.sample(None, z[0, 0, 0], PLANS["ddim"]), r"sample: z wants at least 2 dimensions"),
    (lambda z: D.sample(None, z, PLANS["ddim"], result="x"), r"sample: result wants one of 'z', 'x0', got 'x'"),
    (lambda z: D.sample(None, z, PLANS["ddim"], self_condition="data"), r"sample: self_condition wants one of"),
    (lambda z: D.sample(None, z, PLANS["pc"], result="x0"), r"sample: x0 is not known with a prediction of 'score'"),
    (lambda z: D.sample(None, z, PLANS["bits"], corrector=D.Langevin()),
     r"sample: corrector wants a prediction of 'eps' or 'score', got 'x0'"),
    (lambda z: D.sample(None, z, PLANS["ddim"], graph=True), r"sample: graph wants z on a CUDA device, got cpu"),
    (lambda z: D.Discrete(torch.tensor([0.1, 1.5])), r"Discrete: betas wants the shape \(T,\) and values in \(0, 1\]"),
    (lambda z: D.spaced(10, "ddim7"), r"spaced: counts wants 'ddimN' with N reached by a whole stride of 10 steps, got 'ddim7'"),
    (lambda z: D.spaced(10, [3, 6]), r"spaced: counts wants at most 5 of a section of 5 steps, got 6"),
    (lambda z: LINEAR.diffuse(z, z, torch.tensor([1])), r"process: t wants the shape \(B,\) = \(2,\), got \(1,\)"),
    (lambda z: D.ddpm(LINEAR.steps(), variance="fixed"), r"ddpm: variance wants one of 'small', 'large', 'learned', got 'fixed'"),
    (lambda z: D.ddpm(LINEAR.steps(), prediction="score"), r"ddpm: prediction wants one of 'eps', 'x0', 'v', got 'score'"),
    (lambda z: D.ddim(LINEAR.steps(), clip=1.0, threshold=(0.9,)), r"ddim: threshold wants clip to be None, got 1.0"),
    (lambda z: D.ddim(LINEAR.steps(), eta=1.5), r"ddim: eta wants a value in \[0, 1\], got 1.5"),
    (lambda z: D.ancestral(D.SubVP(), 5), r"ancestral: sde wants a VE or a VP, got SubVP"),
    (lambda z: D.euler_maruyama(D.VP(), 5, last=0.0), r"times: last wants a value in \(0, 1\], got 0.0"),
    (lambda z: D.Continuous().steps(4, shift=-1.0), r"steps: shift wants a value of at least 0, got -1.0"),
    (lambda z: D.dynamic_threshold(z, 1.5), r"dynamic_threshold: wants a quantile in \[0, 1\] and most of at least 1, got 1.5 and inf"),
    (lambda z: D.linear_betas(0), r"linear_betas: steps wants values in \[1, 2\*\*31\), got \(0,\)"),
    (lambda z: D.variational_bound(LINEAR, z, z, torch.tensor([1, 2]), z), r"reverse: v wants to be given with the variance 'learned'"),
])
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.randn(2, 3, 4, 4))


def test_losses_without_a_network_output_of_interest():
    """The bound of the true posterior is 0 beyond the first step, and the prior's bits vanish where nothing of the data is left."""
    x, noise, t = _randn(2, 3, 4), _randn(2, 3, 4, seed=1), torch.tensor([1, 40])
    z = LINEAR.diffuse(x, noise, t)
    _close(D.variational_bound(LINEAR, x, z, t, noise, variance="small"), torch.zeros(2, dtype=torch.float64))
    assert D.prior_bits(D.Discrete(torch.tensor([0.5, 1.0])), x).abs().max() < 1e-12
    loss, mse, bound = D.hybrid_loss(LINEAR, x, z, t, noise, noise, variance="large", weight=math.pi)
    _close(loss, mse + math.pi * bound)
