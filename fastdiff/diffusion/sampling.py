"""The one loop that runs every sampler, with its corrector, guidance and self-conditioning."""

from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.progress import track

from ..core.check import fail, option, tensor
from ..ops import add_noise, denoise_step, denoise_step_with_x0
from .guidance import dynamic_threshold
from .processes import wide


@dataclass(frozen=True)
class Langevin:
    """`steps` moves z + a score + sqrt(2 a) noise before each step of a sampler.

    a = 2 trust (snr |noise| / |score|)^2 with norms per sample, averaged over the batch; annealed: 2 trust (snr sigma)^2.

    Source   Song et al. 2021 (score SDEs), algorithms 4 and 5; Song & Ermon 2019 (annealed)
    """

    snr: float = 0.16
    steps: int = 1
    annealed: bool = False

    def __call__(self, z, pred, noise, sigma, to_score, trust):
        if self.annealed:
            size = 2 * trust * (self.snr * sigma).square()
        else:
            of_noise, of_pred = (torch.linalg.vector_norm(y.flatten(1).to(sigma.dtype), dim=1) for y in (noise, pred))
            size = 2 * trust * (self.snr * of_noise.mean() / (of_pred * to_score.abs()).mean()).square()
        one = torch.ones_like(size)
        return denoise_step(z, pred, one, torch.zeros_like(one), one, size * to_score, (2 * size).sqrt(), noise=noise)


@torch.no_grad()
def sample(denoiser, z, plan, *, corrector=None, gradient=None, self_condition=None, constrain=None, result="z", generator=None,
           progress=False, graph=False):
    """Runs a plan (`ddpm`, `ddim`, `euler_maruyama`, `reverse_diffusion`, `ancestral`, `from_diffusers`) from z (B, C, ...) to data.

    denoiser        called as denoiser(z, time (B,)), gives the plan's prediction; for a learned variance, in the first half of channels
    corrector       a Langevin, or any function of (z, pred, noise, sigma, to_score, trust) with an int `steps`
    gradient        function of (z, time): the gradient of a classifier's log-probability, scaled (`guidance.classifier`)
    self_condition  "x0": the denoiser takes the bounded x0 of the step before as third argument, at first zeros; "state": it takes
                    what it returned beside its prediction in the step before, at first None
    constrain       function of z, applied after every step: what is known of an image is pasted here
    result          "z", or "x0": what the last step thought the data was
    generator       a torch.Generator: one seed, one result
    progress        a bar, on a terminal or in a notebook
    graph           on a GPU: the step, denoiser included, is captured once and replayed; it must not change shapes or wait for the host

    Shapes   z (B, C, ...), any strides -> as z
    Dtypes   float32, float16, bfloat16, float64; coefficients are made in float64 and used in float32 (float64 beside float64)
    Grads    none: it runs under no_grad
    Raises   ValueError naming the argument, what was wanted and what was given
    """
    if tensor("sample", "z", z).dim() < 2:
        fail("sample", f"z wants at least 2 dimensions (B, C, ...), got {tuple(z.shape)}")
    option("sample", "result", result, ("z", "x0"))
    if self_condition is not None:
        option("sample", "self_condition", self_condition, ("x0", "state"))
    if plan.prediction == "score" and (result == "x0" or self_condition == "x0"):
        fail("sample", "x0 is not known with a prediction of 'score'; wants 'eps', 'x0' or 'v'")
    if corrector is not None and plan.prediction not in ("eps", "score"):
        fail("sample", f"corrector wants a prediction of 'eps' or 'score', got {plan.prediction!r}")
    if graph and not z.is_cuda:
        fail("sample", f"graph wants z on a CUDA device, got {z.device}")
    step = partial(advance, denoiser, plan, corrector, gradient, self_condition, constrain, result == "x0")
    times, tables = rows(plan, z)
    draws, last = 0 if corrector is None else corrector.steps, len(times) - 1
    noisy = last if plan.to_noise is None or plan.to_noise[-1] == 0 else last + 1  # steps before this one draw noise
    carried, x0 = torch.zeros_like(z) if self_condition == "x0" else None, None
    for k, (time, table) in enumerate(shown(zip(times, tables, strict=True), len(times), progress)):
        noises = [normal(z, generator) for _ in range(draws + (plan.to_noise is not None and k < noisy))]
        if graph and k == 1 and last > 1:
            step = _captured(step, z, time, table, carried, *noises)
        if graph and k == last and last > 1:
            step = step.eager
        z, x0, carried = step(z, time, table, carried, *noises)
    return z if result == "z" else x0


def source(z, generator):
    """The device on which randomness for z is drawn: the generator's."""
    return z.device if generator is None else generator.device


def normal(z, generator):
    """Standard normal noise like z."""
    return torch.randn(z.shape, generator=generator, dtype=z.dtype, device=source(z, generator)).to(z.device)


def shown(steps, total, progress):
    """The steps, with a bar on a terminal's standard error, or in a notebook, if progress."""
    console = Console(stderr=True)
    seen = progress and (console.is_terminal or console.is_jupyter)
    return track(steps, "sampling", total=total, console=console, transient=True) if seen else steps


def rows(plan, z):
    """(times, tables), one each for every step, on z's device: (B,) and (columns, B)."""
    signal, sigma = plan.signal, plan.sigma
    zeros, ones, score = torch.zeros_like(sigma), torch.ones_like(sigma), plan.prediction == "score"
    # a score is taken for the eps of a z with signal 1 and sigma 0
    to_pred = dict(eps=-sigma, x0=sigma.square() / signal, v=-sigma * (signal.square() + sigma.square()) / signal, score=ones)
    columns = (ones if score else signal, zeros if score else sigma, plan.to_x0, plan.to_eps,
               zeros if plan.to_noise is None else plan.to_noise, zeros if plan.log_ratio is None else plan.log_ratio,
               to_pred[plan.prediction], sigma, ones if score else -1 / sigma, ones if plan.trust is None else plan.trust)
    tables = torch.stack(columns, 1).to(z.device, wide(z)).unsqueeze(-1).repeat(1, 1, z.shape[0])
    times = plan.time.to(z.device, wide(z)) if plan.time.is_floating_point() else plan.time.to(z.device)
    return times.unsqueeze(1).repeat(1, z.shape[0]).unbind(0), tables.unbind(0)


def advance(denoiser, plan, corrector, gradient, self_condition, constrain, wants_x0, z, time, table, carried, *noises):
    """(z, x0, carried) of the next level: everything on the device, nothing asked of it."""
    signal, sigma, to_x0, to_eps, to_noise, log_ratio, to_pred, std, to_score, trust = table.unbind(0)
    prediction = "eps" if plan.prediction == "score" else plan.prediction
    v = None

    def predict():
        nonlocal carried, v
        pred = denoiser(z, time) if self_condition is None else denoiser(z, time, carried)
        if self_condition == "state":
            pred, carried = pred
        if plan.log_ratio is not None:
            pred, v = pred.chunk(2, 1)
        if gradient is not None and plan.guided == "pred":
            pred = add_noise(pred, gradient(z, time), torch.ones_like(to_pred), to_pred)
        return pred

    moves = 0 if corrector is None else corrector.steps
    for noise in noises[:moves]:
        z = corrector(z, predict(), noise, std, to_score, trust)
    noise = noises[moves] if len(noises) > moves else None
    pred = predict()
    if gradient is not None and plan.guided == "mean" and noise is not None:
        # to_noise (noise + to_noise g): the mean moves by the variance times g
        g, scale = gradient(z, time), to_noise.view(-1, *(1,) * (z.dim() - 1))
        noise = noise + (scale if v is None else scale * torch.exp(log_ratio.view_as(scale) * (v + 1) / 4)).to(g.dtype) * g
    drawn = {} if noise is None else dict(noise=noise, variance=None if v is None else (v, log_ratio))
    to_noise = None if noise is None else to_noise
    x0 = None
    if plan.of_z or plan.threshold is not None:
        one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
        x0 = denoise_step(z, pred, signal, sigma, one, zero, prediction=prediction, clip=plan.clip)
        if plan.threshold is not None:
            x0 = dynamic_threshold(x0, *plan.threshold)
        if plan.of_z:
            other = z
        elif plan.rederive:
            other = add_noise(z, x0, 1 / sigma, -signal / sigma)
        else:
            other = denoise_step(z, pred, signal, sigma, zero, one, prediction=prediction)
        # with signal 1 and sigma 0 a step takes what it is given for its x0 and eps
        z = denoise_step(x0, other, one, zero, to_x0, to_eps, to_noise, **drawn)
    elif wants_x0 or self_condition == "x0":
        z, x0 = denoise_step_with_x0(z, pred, signal, sigma, to_x0, to_eps, to_noise, prediction=prediction, clip=plan.clip,
                                     rederive=plan.rederive, **drawn)
    else:
        z = denoise_step(z, pred, signal, sigma, to_x0, to_eps, to_noise, prediction=prediction, clip=plan.clip, rederive=plan.rederive,
                         **drawn)
    if constrain is not None:
        z = constrain(z)
    return z, x0, x0 if self_condition == "x0" else carried


class _captured:
    """A CUDA graph of step(*inputs), inputs being tensors or None; its outputs are overwritten by the next replay."""

    def __init__(self, step, *inputs):
        if not all(x is None or isinstance(x, torch.Tensor) for x in inputs):
            fail("sample", "graph wants a carried state that is one tensor")
        self.eager, self.inputs = step, [x if x is None else x.clone() for x in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose their kernels before the capture
            for _ in range(2):
                step(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = step(*self.inputs)

    def __call__(self, *inputs):
        for mine, x in zip(self.inputs, inputs, strict=True):
            if x is not None:
                mine.copy_(x)
        self.graph.replay()
        return self.outputs


def estimate(denoiser, z, t, process, *, prediction="x0", clip=None, share=0.5):
    """What self-conditioned training feeds: x0 as first seen without an estimate, for the first `share` of the batch; zeros for the rest.

    denoiser is called as in `sample`, with zeros as its third argument; no gradient flows.
    Source   Chen et al. 2023 (analog bits), algorithm 1
    """
    count = int(z.shape[0] * share)
    with torch.no_grad():
        first = z[:count]
        pred = denoiser(first, process.told(t[:count]), torch.zeros_like(first))
        x0, _ = process.x0_and_eps(first, pred, t[:count], prediction=prediction, clip=clip)
        return torch.cat([x0, torch.zeros_like(z[count:])])


def warm_state(denoiser, z, time, keep):
    """The state for latent self-conditioned training: of one pass without, zeroed where keep (B,) is False; no gradient flows.

    Source   Jabri et al. 2023, section 3.2
    """
    with torch.no_grad():
        _, state = denoiser(z, time, None)
        return state * keep.view(-1, *(1,) * (state.dim() - 1))
