"""Discrete processes against vectors of the public improved-diffusion program, in float64."""

import pytest
import torch

from fastdiff import ops
from fastdiff.diffusion import (
    Discrete,
    LossAwareSteps,
    bits_per_dim,
    cosine_betas,
    ddim,
    ddpm,
    hybrid_loss,
    linear_betas,
    prior_bits,
    spaced,
    variational_bound,
)
from fastdiff.diffusion.losses import gaussian_kl, grid_log_likelihood, reverse

TOLERANCE = 1e-9  # ten times the program's agreement with a second one: 1/gamma is huge in the last steps
PROCESSES = {"linear": Discrete(linear_betas(1000)), "cosine": Discrete(cosine_betas(4000), torch.arange(4000) * (1000 / 4000))}
VARIANCES = dict(fixed_small="small", fixed_large="large", learned_range="learned")


@pytest.fixture(scope="module")
def file(golden):
    return golden("improved_diffusion")


@pytest.fixture(params=PROCESSES)
def case(request, file):
    """(name, process, t, x, noise, z, {head: prediction}, v)"""
    process, t = PROCESSES[request.param], file[f"in/{request.param}/t"]
    x, noise = file["in/x_start"], file["in/noise"]
    heads = dict(eps=file["in/model_eps"], x0=file["in/model_x0"])
    return request.param, process, t, x, noise, process.diffuse(x, noise, t), heads, file["in/model_v"]


def _row(plan, process, t):
    """A plan's columns at the steps t, one per sample."""
    row = len(process.betas) - 1 - t
    return dict(signal=plan.signal[row], sigma=plan.sigma[row], to_x0=plan.to_x0[row], to_eps=plan.to_eps[row],
                to_noise=None if plan.to_noise is None else plan.to_noise[row], prediction=plan.prediction, clip=plan.clip)


def test_process(case, file, near):
    name, process, t, x, _, z, *_ = case
    near(process.betas, file[f"const/{name}/betas"])
    near(process.gamma, file[f"const/{name}/alphas_cumprod"], TOLERANCE)
    near(z, file[f"out/{name}/q_sample"])
    near(process.told(t).double(), file[f"out/{name}/timesteps_seen_by_network"])
    near(prior_bits(process, x), file[f"out/{name}/prior_bpd"], TOLERANCE)
    near(process.marginal(t)[1].square(), file[f"out/{name}/q_variance"], TOLERANCE)
    plan = ddpm(process.steps(), prediction="x0")
    near(ops.denoise_step(z, x, **{**_row(plan, process, t), "to_noise": None}), file[f"out/{name}/q_posterior_mean"], TOLERANCE)
    near(plan.to_noise.flip(0).square(), file[f"const/{name}/posterior_variance"], TOLERANCE)


def test_means_and_variances(case, file, near):
    name, process, t, _, _, z, heads, v = case
    for head, pred in heads.items():
        for clip, ending in ((1.0, "clip"), (None, "noclip")):
            plan = ddpm(process.steps(), prediction=head, clip=clip)
            got = ops.denoise_step_with_x0(z, pred, **{**_row(plan, process, t), "to_noise": None})
            for y, what in zip(got, ("mean", "pred_xstart"), strict=True):
                near(y, file[f"out/{name}/p_mean/{head}_{ending}/{what}"], TOLERANCE)
    for kind, variance in VARIANCES.items():
        mean, log_variance = reverse(process, z, t, heads["eps"], v if variance == "learned" else None, variance=variance)
        near(mean, file[f"out/{name}/p_mean/eps_noclip/mean"], TOLERANCE)
        want = file[f"out/{name}/p_variance/{kind}/log_variance"]
        near(log_variance.view(want.shape), want, TOLERANCE)


def test_steps(case, file, near):
    name, process, t, _, _, z, heads, v = case
    noise = file["in/step_noise"]
    for key in (k for k in file if k.startswith(f"out/{name}/p_sample/")):
        head, *kind, ending = key.split("/")[-1].split("_")
        plan = ddpm(process.steps(), prediction=head, variance=VARIANCES["_".join(kind)], clip=1.0 if ending == "clip" else None)
        variance = (v, plan.log_ratio[len(process.betas) - 1 - t]) if kind[0] == "learned" else None
        near(ops.denoise_step(z, heads[head], **_row(plan, process, t), noise=noise, variance=variance), file[key], TOLERANCE)
    for key in (k for k in file if k.startswith(f"out/{name}/ddim/")):
        head, ending, eta = key.split("/")[-1].split("_")
        plan = ddim(process.steps(), prediction=head, eta=float(eta[3:]), clip=1.0 if ending == "clip" else None)
        row = _row(plan, process, t)
        near(ops.denoise_step(z, heads[head], **row, noise=None if row["to_noise"] is None else noise), file[key], TOLERANCE)
    steps = process.steps(inverse=True)
    for ending in ("clip", "noclip"):
        row = dict(zip(("signal", "sigma", "to_x0", "to_eps"), (c[t] for c in ddim(steps)[1:5]), strict=True))
        y = ops.denoise_step(z, heads["eps"], **row, clip=1.0 if ending == "clip" else None)
        near(y, file[f"out/{name}/ddim_reverse/eps_{ending}"], TOLERANCE)


def test_variational_bound(case, file, near):
    name, process, t, x, _, z, heads, v = case
    for head, pred in heads.items():
        for kind, variance in VARIANCES.items():
            for clip, ending in ((1.0, "clip"), (None, "noclip")):
                got = variational_bound(process, x, z, t, pred, v if variance == "learned" else None, prediction=head, variance=variance,
                                        clip=clip)
                near(got, file[f"out/{name}/vb_bpd/{head}_{kind}_{ending}"], TOLERANCE)


def test_losses(case, file, near):
    name, process, t, x, noise, z, heads, v = case
    for head, pred in heads.items():
        for kind, weight in (("mse", 1.0), ("rescaled_mse", None)):
            output = torch.cat([pred, v], 1).requires_grad_()
            loss, mse, bound = hybrid_loss(process, x, z, t, noise, output, prediction=head, weight=weight)
            where = f"out/{name}/loss/{kind}_{head}_learned_range"
            near(loss, file[f"{where}/loss"], TOLERANCE)
            near(mse, file[f"{where}/mse"], TOLERANCE)
            near(bound * (len(process.betas) / 1000 if weight is None else 1), file[f"{where}/vb"], TOLERANCE)
        (grad,) = torch.autograd.grad((loss * file["in/loss_weight"]).sum(), output)
        near(grad, file[f"grad/{name}/loss/rescaled_mse_{head}_learned_range/model_output"], TOLERANCE)
        bound = variational_bound(process, x, z, t, *output.chunk(2, 1), prediction=head)
        near(bound, file[f"out/{name}/loss/kl_{head}_learned_range/loss"], TOLERANCE)
        (grad,) = torch.autograd.grad((len(process.betas) * bound * file["in/loss_weight"]).sum(), output)
        near(grad, file[f"grad/{name}/loss/rescaled_kl_{head}_learned_range/model_output"], TOLERANCE)


def test_likelihoods(file, near):
    moments = (file[f"in/kl/{key}"] for key in ("mean1", "logvar1", "mean2", "logvar2"))
    near(gaussian_kl(*moments), file["out/kl/nats"])
    mean, log_std = file["in/decoder/means"].requires_grad_(), file["in/decoder/log_scales"].requires_grad_()
    got = grid_log_likelihood(file["in/decoder/x"], mean, log_std)
    near(got, file["out/decoder/log_probs_nats"])
    for grad, key in zip(torch.autograd.grad(got.sum(), (mean, log_std)), ("means", "log_scales"), strict=True):
        near(grad, file[f"grad/decoder/{key}"], TOLERANCE)


def test_spacing(file):
    for key in (k for k in file if k.startswith("const/space_timesteps/")):
        steps, counts = key.split("/")[-1].split("_")
        assert torch.equal(spaced(int(steps), counts if counts[0] == "d" else [int(c) for c in counts.split(",")]), file[key])


@pytest.mark.parametrize("spacing", ["25", "ddim50", "10,10,10"])
def test_respaced(file, near, spacing):
    where, k = f"linear_1000_{spacing}", file["in/spaced/k"]
    process = PROCESSES["linear"].respaced(spacing if spacing[0] == "d" else [int(c) for c in spacing.split(",")])
    near(process.betas, file[f"const/spaced/{where}/betas"])
    near(process.gamma, file[f"const/spaced/{where}/alphas_cumprod"])
    assert torch.equal(process.time, file[f"const/spaced/{where}/timestep_map"])
    near(process.told(k).double(), file[f"out/spaced/{where}/timesteps_seen_by_network"])
    x, noise, pred, v = (file[f"in/{key}"] for key in ("x_start", "noise", "model_eps", "model_v"))
    z = process.diffuse(x, noise, k)
    near(z, file[f"out/spaced/{where}/q_sample"])
    mean, log_variance = reverse(process, z, k, pred, v, clip=1.0)
    near(mean, file[f"out/spaced/{where}/mean"], TOLERANCE)
    near(log_variance, file[f"out/spaced/{where}/log_variance"], TOLERANCE)
    plan = ddpm(process.steps(), variance="learned", clip=1.0)
    got = ops.denoise_step(z, pred, **_row(plan, process, k), noise=file["in/step_noise"],
                           variance=(v, plan.log_ratio[len(process.betas) - 1 - k]))
    near(got, file[f"out/spaced/{where}/p_sample"], TOLERANCE)
    near(ops.denoise_step(z, pred, **_row(ddim(process.steps(), clip=1.0), process, k)), file[f"out/spaced/{where}/ddim_eta0"], TOLERANCE)
    loss, _, bound = hybrid_loss(process, x, z, k, noise, torch.cat([pred, v], 1))
    near(loss, file[f"out/spaced/{where}/hybrid_loss"], TOLERANCE)
    near(bound * len(process.betas) / 1000, file[f"out/spaced/{where}/hybrid_vb"], TOLERANCE)


def test_bits_per_dim(file, near, monkeypatch):
    process = PROCESSES["cosine"].respaced(6)
    assert torch.equal(process.time, file["const/bpd_loop/timestep_map"] * 0.25)
    noises, outputs = iter(file["in/bpd_loop/noise"]), iter(torch.cat([file["in/bpd_loop/model_eps"], file["in/bpd_loop/model_v"]], 2))
    monkeypatch.setattr("fastdiff.diffusion.sampling.normal", lambda z, generator: next(noises))
    total, bounds, errors = bits_per_dim(process, lambda z, time: next(outputs), file["in/x_start"])
    near(total, file["out/bpd_loop/total_bpd"], TOLERANCE)
    near(bounds, file["out/bpd_loop/vb"], TOLERANCE)
    near(errors, file["out/bpd_loop/xstart_mse"], TOLERANCE)


def test_loss_aware_steps(file, near):
    single, batched = LossAwareSteps(7), LossAwareSteps(7)
    t, loss, snapshots = file["in/resampler/t"], file["in/resampler/loss"], file["in/resampler/snapshot_after"].tolist()
    done = 0
    for row, snapshot in enumerate(snapshots):
        for i in range(done, snapshot):
            single.update(t[i : i + 1], loss[i : i + 1])
        batched.update(t[done:snapshot], loss[done:snapshot])
        want = file["out/resampler/weights"][row]
        for sampler in (single, batched):
            near(sampler.probabilities(), want / want.sum())
        done = snapshot
    _, weight = single.sample(1000, torch.Generator().manual_seed(0))
    assert (weight.unsqueeze(1) - file["out/resampler/importance_weight"]).abs().min(1).values.max() < 1e-9
