"""Schedules, steps and complete sampling loops of analog bits against vectors of the public pix2seq program, in float64."""

from functools import partial

import pytest
import torch

from fastdiff import ops
from fastdiff.diffusion import (
    Continuous,
    classifier_free,
    cosine_gamma,
    ddim,
    ddpm,
    estimate,
    sample,
    sigmoid_gamma,
    simple_cosine_gamma,
    simple_linear_gamma,
)
from fastdiff.diffusion.processes import Steps

# sampling that starts at a gamma near 1e-9 multiplies rounding
LOOPS = 1e-9


def _schedule(name):
    name, _, arguments = name.partition("@")
    if not arguments:
        return dict(simple_linear=simple_linear_gamma, cosine=simple_cosine_gamma)[name]
    start, end, tau = map(float, arguments.split(","))
    return partial(dict(cosine=cosine_gamma, sigmoid=sigmoid_gamma)[name], start=start, end=end, tau=tau)


@pytest.fixture(scope="module")
def file(golden):
    """Images there are channels last: here they are (B, C, h, w)."""
    images = ("in/generate", "in/step/", "in/guidance", "in/self_cond/", "in/add_noise/noise", "out/generate", "out/step", "out/convert",
              "out/guidance", "out/self_cond", "out/add_noise/x_t", "out/encode/uint8")
    return {key: x.movedim(-1, -3) if key.startswith(images) and x.dim() > 3 else x for key, x in golden("bits").items()}


@pytest.mark.parametrize("name", ["simple_linear", "cosine", "cosine@0,1,1", "cosine@0.2,1,1", "cosine@0.2,1,2", "sigmoid@-3,3,1",
                                  "sigmoid@0,3,0.3", "sigmoid@-3,3,0.9"])
def test_schedules(file, near, name):
    near(_schedule(name)(file["in/t33"]), file[f"out/schedule/{name}"])


def test_process(file, near):
    process, t = Continuous(), file["in/add_noise/t"]
    near(process.told(t), file["out/add_noise/gamma"])
    near(process.diffuse(file["out/encode/uint8"], file["in/add_noise/noise"], t), file["out/add_noise/x_t"])


def _steps(gammas):
    now, after = gammas.unbind(1)
    return Steps(now, now.sqrt(), (1 - now).sqrt(), after.sqrt(), (1 - after).sqrt())


@pytest.mark.parametrize("prediction", ["eps", "x", "v"])
def test_conversions_and_steps(file, near, prediction):
    steps, pred, z = _steps(file["in/step/gammas"]), file["in/step/network_output"], file["in/step/x_t"]
    kind = "x0" if prediction == "x" else prediction
    for clip, ending in ((1.0, "clip"), (None, "noclip")):
        for rederive in (False, True):
            where = f"out/convert/{prediction}_{ending}_{'truncated' if rederive else 'plain'}"
            for weights, what in (((1.0, 0.0), "x0"), ((0.0, 1.0), "eps")):
                if f"{where}/{what}" in file:
                    got = ops.denoise_step(z, pred, steps.signal, steps.sigma, *weights, prediction=kind, clip=clip, rederive=rederive)
                    near(got, file[f"{where}/{what}"])
    for sampler, make in (("ddim", ddim), ("ddpm@small", ddpm), ("ddpm@large", partial(ddpm, variance="large"))):
        plan = make(Steps(*(torch.cat([c, c[:1]]) for c in steps)), prediction=kind, clip=1.0)  # one more: the last is silent
        row = {key: None if (c := getattr(plan, key)) is None else c[:-1] for key in ("signal", "sigma", "to_x0", "to_eps", "to_noise")}
        noise = None if plan.to_noise is None else file["in/step/noise"]
        near(ops.denoise_step(z, pred, **row, prediction=kind, clip=1.0, noise=noise), file[f"out/step/{prediction}_{sampler}"])


def _run(file, draws, i, plan, feed, **kwargs):
    """sample() on the file's network outputs; feed(z, gamma, output, *carried) -> (network input, what the network gives)."""
    draws(file[f"in/generate{i}/step_noise"])
    outputs, inputs, gammas = iter(file[f"in/generate{i}/network_outputs"]), [], []

    def net(z, gamma, *carried):
        given, result = feed(z, gamma, next(outputs), *carried)
        inputs.append(given)
        gammas.append(gamma)
        return result

    got = sample(net, file[f"in/generate{i}/start"], plan, result="x0", **kwargs)
    return got, torch.stack(inputs), torch.stack(gammas)


def _eps_fed_back(z, gamma, pred, state):
    """The eps of the clipped x0 is carried."""
    signal, sigma = gamma.sqrt(), (1 - gamma).sqrt()
    eps = ops.denoise_step(z, pred, signal, sigma, 0.0, 1.0, clip=1.0)
    return torch.cat([z, torch.zeros_like(z) if state is None else state], 1), (pred, eps)


def _x0_averaged(z, gamma, pred, state):
    """The average of clipped x0 is carried, with a decay of 0.25."""
    state = torch.zeros_like(z) if state is None else state
    x0 = ops.denoise_step(z, pred, gamma.sqrt(), (1 - gamma).sqrt(), 1.0, 0.0, prediction="v", clip=1.0)
    return torch.cat([z, state], 1), (pred, 0.25 * state + 0.75 * x0)


@pytest.mark.parametrize("i, schedule, make, steps, shift, prediction, feed, condition", [
    (0, "cosine", ddim, 4, 0, "x0", lambda z, gamma, pred, x0: (torch.cat([z, x0], 1), pred), "x0"),
    (1, "sigmoid@-3,3,0.9", ddim, 5, 1, "x0", lambda z, gamma, pred: (z, pred), None),
    (2, "cosine", partial(ddpm, variance="large"), 4, 0, "eps", _eps_fed_back, "state"),
    (3, "simple_linear", ddpm, 4, 2, "v", _x0_averaged, "state"),
])
def test_loops(file, near, draws, i, schedule, make, steps, shift, prediction, feed, condition):
    plan = make(Continuous(_schedule(schedule)).steps(steps, shift=shift), prediction=prediction, clip=1.0)
    got, inputs, gammas = _run(file, draws, i, plan, feed, self_condition=condition)
    near(gammas, file[f"out/generate{i}/gammas"])
    near(inputs, file[f"out/generate{i}/network_inputs"], LOOPS)
    near(got, file[f"out/generate{i}/result"], LOOPS)


def test_guidance(file, near):
    cond, uncond = (iter(file[f"in/guidance/{kind}conditional_outputs"]) for kind in ("", "un"))
    denoiser = classifier_free(lambda z, gamma: next(cond), lambda z, gamma: next(uncond), 1 + 1.5)
    plan = ddim(Continuous().steps(3), clip=1.0)
    near(sample(denoiser, file["in/guidance/start"], plan, result="x0"), file["out/guidance/result"], LOOPS)


def test_estimate(file, near):
    z, gamma, output = (file[f"in/self_cond/{key}"] for key in ("x_noised", "gamma", "network_output"))
    gamma = gamma.flatten()
    got = estimate(lambda z, time, none: output, z, gamma, Continuous(lambda t: t), prediction="x0", clip=1.0)
    near(torch.cat([z, got], 1), file["out/self_cond/x"])
