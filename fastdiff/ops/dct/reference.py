"""Discrete cosine transforms as products with dense orthonormal matrices, and gains between a transform and its inverse."""

import torch


def matrix(n, like):
    """D of the DCT-II of n elements, made in float64: D[k, i] = c_k cos(pi (2 i + 1) k / (2 n)), in the dtype of `like`."""
    k = torch.arange(n, device=like.device)
    angles = (2 * k + 1) * k.unsqueeze(1) % (4 * n) if n else k.unsqueeze(1) * k
    scale = torch.where(k > 0, 2.0, 1.0).double() / n
    return (torch.cos(angles.double() * (torch.pi / 2) / n) * scale.sqrt().unsqueeze(1)).to(like.dtype)


def dct(x, dims, inverse):
    with torch.autocast(x.device.type, enabled=False):
        columns = matrix(x.shape[-1], x)
        x = x @ (columns if inverse else columns.T)
        if dims == 1:
            return x
        rows = matrix(x.shape[-2], x)
        return (rows.T if inverse else rows) @ x


def frequency_mix(x, gain, eps, gain_eps, noise, gain_noise, dims):
    total = gain * dct(x, dims, False)
    if eps is not None:
        total = total + gain_eps * dct(eps, dims, False)
    if noise is not None:
        total = total + gain_noise * noise
    return dct(total.to(x.dtype), dims, True)


def separable_gain(x, rows, columns, base, noise, sigma):
    gain = rows.unsqueeze(2) * columns.unsqueeze(1) + base.view(-1, 1, 1)
    y = frequency_mix(x, gain.unsqueeze(1), None, None, None, None, 2)
    return y if noise is None else (y + sigma.view(-1, 1, 1, 1) * noise).to(x.dtype)


def frequency_mix_backward(dy, x, gain, dims):
    """The gradient in x of gain's frequency_mix, and DCT(dy) DCT(x), which is the gain's before it is summed to its shape."""
    return frequency_mix(dy, gain, None, None, None, None, dims), (dct(dy, dims, False).to(gain.dtype) * dct(x, dims, False)).to(gain.dtype)


def separable_gain_backward(dy, x, rows, columns, base):
    dx, dgain = frequency_mix_backward(dy, x, (rows.unsqueeze(2) * columns.unsqueeze(1) + base.view(-1, 1, 1)).unsqueeze(1), 2)
    dgain = dgain.sum(1)
    return dx, (dgain * columns.unsqueeze(1)).sum(2), (dgain * rows.unsqueeze(2)).sum(1), dgain.sum((1, 2))
