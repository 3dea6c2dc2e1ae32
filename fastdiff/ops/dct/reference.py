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


def frequencies(n, like):
    return torch.arange(n, device=like.device).to(like.dtype) * (torch.pi / max(n, 1))


def blur_factors(x, width, signal, floor):
    """rows (B, h), columns (B, w) and base (B,) of separable_gain, whose gain is signal ((1 - floor) exp(-lambda width^2 / 2) + floor)."""
    time = (width.square() / -2).unsqueeze(1)
    rows, columns = (torch.exp(frequencies(n, width).square() * time) for n in x.shape[2:])
    rows = (1 - floor) * rows
    if signal is None:
        return rows, columns, torch.full_like(width, floor)
    return signal.unsqueeze(1) * rows, columns, signal * floor


def blur_diffuse(x, width, signal, floor, noise, sigma):
    return separable_gain(x, *blur_factors(x, width, signal, floor), noise, sigma)


def blur_gradients(product, width, signal, floor):
    """The gradients of a blur in width and signal (in a signal of 1 where there is none), from the gain's, DCT(dy) DCT(x)."""
    rows, columns, _ = blur_factors(product, width, None, floor)
    product, decay = product.sum(1), rows.unsqueeze(2) * columns.unsqueeze(1)
    squared = frequencies(product.shape[1], width).square().unsqueeze(1) + frequencies(product.shape[2], width).square()
    dwidth = -width * (decay * squared * product).sum((1, 2))
    return dwidth if signal is None else signal * dwidth, ((decay + floor) * product).sum((1, 2))


def blur_diffuse_backward(dy, x, width, signal, floor):
    product = dct(dy, 2, False).to(width.dtype) * dct(x, 2, False)
    return blur_diffuse(dy, width, signal, floor, None, None), *blur_gradients(product, width, signal, floor)
