"""Noise added to data, guidance, and one step of a sampler, in plain PyTorch."""

import torch


def spread(coefficient, x):
    """(B,) beside x (B, ...)."""
    return coefficient.view(-1, *(1,) * (x.dim() - 1))


def add_noise(x, noise, signal, sigma):
    return (spread(signal, x) * x + spread(sigma, x) * noise).to(x.dtype)


def guide(cond, uncond, weight, rescale):
    wide = spread(weight, cond).dtype
    cond, uncond, dtype = cond.to(wide), uncond.to(wide), cond.dtype
    guided = uncond + spread(weight, cond) * (cond - uncond)
    if rescale:
        guided = guided * (rescale * spread(_std(cond) / _std(guided), cond) + (1 - rescale))
    return guided.to(dtype)


def _std(x):
    """Per sample, over n - 1."""
    return x.unsqueeze(-1).flatten(1).std(1)


def denoise_step_with_x0(x, pred, signal, sigma, to_x0, to_eps, to_noise, noise, v, log_ratio, prediction, clip, rederive):
    dtype = x.dtype
    signal, sigma, to_x0, to_eps = (spread(c, x) for c in (signal, sigma, to_x0, to_eps))
    x, pred = x.to(signal.dtype), pred.to(signal.dtype)
    if prediction == "eps":
        x0, eps = (x - sigma * pred) / signal, pred
    elif prediction == "x0":
        x0, eps = pred, (x - signal * pred) / sigma
    else:
        power = signal.square() + sigma.square()
        x0, eps = (signal * x - sigma * pred) / power, (signal * pred + sigma * x) / power
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
        if rederive:
            eps = (x - signal * x0) / sigma
    y = to_x0 * x0 + to_eps * eps
    if noise is not None:
        scale = spread(to_noise, x)
        if v is not None:
            scale = scale * torch.exp((v.to(scale.dtype) + 1) / 4 * spread(log_ratio, x))
        y = y + scale * noise
    return y.to(dtype), x0.to(dtype)


def denoise_step(*args):
    return denoise_step_with_x0(*args)[0]
