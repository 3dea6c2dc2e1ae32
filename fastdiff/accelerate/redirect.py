"""PyTorch's scaled_dot_product_attention, redirected to `fastdiff.ops.attention` within a block."""

import sys
import threading
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor

from ..core.backend import FLOATS
from ..ops import attention

_ORIGINAL = F.scaled_dot_product_attention
_TENSORS = (torch.Tensor, torch.nn.Parameter, FakeTensor)
_LOCK = threading.Lock()


class _Here(threading.local):
    depth = 0


_HERE = _Here()  # blocks this thread is in
_BLOCKS = 0  # blocks any thread is in
_NAMES = []  # (module globals, name, what it held) of the names that hold _redirected meanwhile


def _takes(q, k, v, mask, enable_gqa):
    """Whether these are dense tensors whose sizes `attention` takes; anything else, faults included, is the original's."""
    if not all(type(x) in _TENSORS and x.layout is torch.strided and x.dtype is q.dtype and x.device == q.device for x in (q, k, v)):
        return False
    if q.dtype not in FLOATS or q.device.type not in ("cpu", "cuda") or q.dim() < 2 or not q.dim() == k.dim() == v.dim():
        return False
    if not q.shape[-1] == k.shape[-1] == v.shape[-1] > 0 or k.shape[-2] != v.shape[-2]:
        return False
    if enable_gqa:
        if q.dim() < 3 or any(x.shape[-3] < 1 or q.shape[-3] % x.shape[-3] or x.shape[:-3] != q.shape[:-3] for x in (k, v)):
            return False
    elif not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        return False
    if mask is None:
        return True
    full = (*q.shape[:-1], k.shape[-2])
    return (type(mask) in _TENSORS and mask.layout is torch.strided and mask.device == q.device and mask.dtype in (torch.bool, q.dtype)
            and 2 <= mask.dim() <= q.dim() and all(m in (1, n) for m, n in zip(mask.shape, full[-mask.dim():], strict=True)))


def _fold(x, lead):
    """(*lead, S, E) -> (B, H, S, E)."""
    if len(lead) < 2:
        return x[None, None] if not lead else x.unsqueeze(1)
    return x.flatten(0, -4) if len(lead) > 2 else x


def _redirected(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    q, k, v, mask = query, key, value, attn_mask
    if not _HERE.depth or dropout_p > 0 or (is_causal and mask is not None) or not _takes(q, k, v, mask, enable_gqa):
        return _ORIGINAL(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    lead, M, N = q.shape[:-2], q.shape[-2], k.shape[-2]
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    # PyTorch's causal mask aligns the first query with the first key, ours the last with the last.
    if is_causal and M < N:
        k, v = k[..., :M, :], v[..., :M, :]
    elif is_causal and M > N:
        mask, is_causal = torch.ones((M, N), dtype=torch.bool, device=q.device).tril(), False
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    if mask is not None and mask.dim() > 2:
        mask = _fold(mask if len(lead) < 3 else mask.expand(*lead, *mask.shape[-2:]), lead)
    q, k, v = (_fold(x, lead) for x in (q, k, v))
    return attention(q, k, v, bias=mask, causal=is_causal, scale=scale).reshape(query.shape)


def _holders():
    """(globals, name, value) of F's own name and of every other under which a module outside torch holds the original."""
    found = [(vars(F), "scaled_dot_product_attention", F.scaled_dot_product_attention)]
    for module, holder in list(sys.modules.items()):
        names = getattr(holder, "__dict__", None)
        if isinstance(names, dict) and names is not globals() and module.partition(".")[0] != "torch":
            found += [(names, name, value) for name, value in list(names.items()) if value is _ORIGINAL]
    return found


@contextmanager
def sdpa():
    """Within the block, calls of torch.nn.functional.scaled_dot_product_attention in this thread run `fastdiff.ops.attention`.

    Taken are float32, float16 and bfloat16 tensors of two or more dimensions with bool or additive masks, is_causal, scale and
    enable_gqa; calls with dropout, float64, tensor subclasses or sizes that broadcast go to PyTorch as before. Modules that imported
    the function by name are reached as well. Blocks nest, and other threads see PyTorch's own function.
    """
    global _BLOCKS
    with _LOCK:
        if not _BLOCKS:
            _NAMES[:] = _holders()
            for names, name, _ in _NAMES:
                names[name] = _redirected
        _BLOCKS += 1
    _HERE.depth += 1
    try:
        yield
    finally:
        _HERE.depth -= 1
        with _LOCK:
            _BLOCKS -= 1
            if not _BLOCKS:
                for names, name, value in _NAMES:
                    names[name] = value
                _NAMES.clear()
