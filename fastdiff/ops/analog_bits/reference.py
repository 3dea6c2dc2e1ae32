"""Integers as analog bits along the channels, and back, in plain PyTorch."""

import torch


def _shifts(bits, order, x):
    shifts = torch.arange(bits, device=x.device)
    return shifts if order == "lsb" else shifts.flip(0)


def to_bits(x, bits, scale, order, dtype):
    """Channel bits * c + i has bit i (least significant first) or bits - 1 - i of channel c."""
    B, C, *space = x.shape
    shifts = _shifts(bits, order, x).view(-1, *(1,) * len(space))
    ones = (x.long().unsqueeze(2) >> shifts) & 1
    return torch.where(ones > 0, scale, -scale).to(dtype).reshape(B, C * bits, *space)


def from_bits(x, bits, order, dtype):
    B, C, *space = x.shape
    ones = (x > 0).long().reshape(B, C // bits, bits, *space)
    return (ones << _shifts(bits, order, x).view(-1, *(1,) * len(space))).sum(2).to(dtype)
