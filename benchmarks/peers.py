"""What the ops are measured against: op -> {peer name: callable with the op's keyword arguments}.

The only place optional libraries are imported: one that is missing is named in MISSING, and its peers are left out.
"""

import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LARGEST = 2 << 30  # bytes that a peer may take for intermediate results


@dataclass(frozen=True)
class Peer:
    """refuse(**arguments): a sentence when it does not apply to these, else None. default: whether it runs when nobody asks for it."""

    run: Callable
    refuse: Callable | None = None
    default: bool = True

    def __call__(self, **arguments):
        return self.run(**arguments)


PEERS, MISSING, VERSIONS = {}, {}, {}


def _optional(name):
    package = name.partition(".")[0]
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        MISSING[package] = str(error)
        return None
    VERSIONS[package] = importlib.metadata.version(package)
    return module


def _add(op, name, run, refuse=None, default=True):
    PEERS.setdefault(op, {})[name] = Peer(run, refuse, default)


@lru_cache(None)
def _compiled(run, mode):
    return torch.compile(run, dynamic=False, mode=mode)


def _eager(op, run, refuse=None):
    """Plain PyTorch, and the same compiled."""

    def refuse_compile(**arguments):
        on_cpu = not any(x.is_cuda for x in arguments.values() if isinstance(x, torch.Tensor))
        if on_cpu and not (shutil.which("g++") or shutil.which("clang++")):
            return "torch.compile needs a C++ compiler"
        return refuse(**arguments) if refuse else None

    _add(op, "eager", run, refuse)
    for name, mode in (("compile", "default"), ("compile-max", "max-autotune-no-cudagraphs")):
        _add(op, name, lambda mode=mode, **arguments: _compiled(run, mode)(**arguments), refuse_compile, default=False)


# patchify, unpatchify

def _eager_patchify(x, patch, order):
    B, C, *space = x.shape
    axes = range(len(space))
    split = x.reshape(B, C, *(n for size, p in zip(space, patch, strict=True) for n in (size // p, p)))
    inner = [3 + 2 * i for i in axes]
    tokens = split.permute(0, *(2 + 2 * i for i in axes), *((*inner, 1) if order == "pqc" else (1, *inner))).contiguous()
    return tokens.view(B, prod(size // p for size, p in zip(space, patch, strict=True)), prod(patch) * C)


def _eager_unpatchify(tokens, patch, grid, order):
    B, _, D = tokens.shape
    n, C = len(grid), D // prod(patch)
    split = tokens.reshape(B, *grid, *((*patch, C) if order == "pqc" else (C, *patch)))
    channel, first = (1 + 2 * n, 1 + n) if order == "pqc" else (1 + n, 2 + n)
    image = split.permute(0, channel, *(a for i in range(n) for a in (1 + i, first + i))).contiguous()
    return image.view(B, C, *(g * p for g, p in zip(grid, patch, strict=True)))


def _planar(patch, **_):
    return None if len(patch) == 2 else "takes two-dimensional images only"


def _square(patch, **_):
    return _planar(patch) or (None if patch[0] == patch[1] else "takes square patches only")


def _tokens(columns, patch, order):
    """(B, C p q, N) in the order of convolution weights -> contiguous tokens."""
    if order == "cpq":
        return columns.transpose(1, 2).contiguous()
    B, D, N = columns.shape
    return columns.view(B, D // prod(patch), prod(patch), N).permute(0, 3, 2, 1).reshape(B, N, D)


def _columns(tokens, patch, order):
    if order == "cpq":
        return tokens.transpose(1, 2)
    B, N, D = tokens.shape
    return tokens.view(B, N, prod(patch), D // prod(patch)).permute(0, 3, 2, 1).reshape(B, D, N)


def _unfold(x, patch, order):
    return _tokens(F.unfold(x, patch, stride=patch), patch, order)


def _fold(tokens, patch, grid, order):
    return F.fold(_columns(tokens, patch, order), [g * p for g, p in zip(grid, patch, strict=True)], patch, stride=patch)


def _pixel_unshuffle(x, patch, order):
    return _tokens(F.pixel_unshuffle(x, patch[0]).flatten(2), patch, order)


def _pixel_shuffle(tokens, patch, grid, order):
    return F.pixel_shuffle(_columns(tokens, patch, order).unflatten(2, grid), patch[0]).contiguous()


@lru_cache(None)
def _pattern(space, order):
    g, p = [f"g{i}" for i in range(space)], [f"p{i}" for i in range(space)]
    image = "b c " + " ".join(f"({a} {b})" for a, b in zip(g, p, strict=True))
    tokens = f"b ({' '.join(g)}) ({' '.join([*p, 'c'] if order == 'pqc' else ['c', *p])})"
    return image, tokens


def _einops_patchify(x, patch, order):
    image, tokens = _pattern(len(patch), order)
    return einops.rearrange(x, f"{image} -> {tokens}", **{f"p{i}": p for i, p in enumerate(patch)}).contiguous()


def _einops_unpatchify(tokens, patch, grid, order):
    image, rows = _pattern(len(patch), order)
    sizes = {f"p{i}": p for i, p in enumerate(patch)} | {f"g{i}": g for i, g in enumerate(grid)}
    return einops.rearrange(tokens, f"{rows} -> {image}", **sizes).contiguous()


einops = _optional("einops")
_eager("patchify", _eager_patchify)
_eager("unpatchify", _eager_unpatchify)
if einops:
    _add("patchify", "einops", _einops_patchify)
    _add("unpatchify", "einops", _einops_unpatchify)
_add("patchify", "unfold", _unfold, _planar)
_add("unpatchify", "fold", _fold, _planar)
_add("patchify", "pixel_unshuffle", _pixel_unshuffle, _square)
_add("unpatchify", "pixel_shuffle", _pixel_shuffle, _square)


# space_to_depth, depth_to_space

def _eager_space_to_depth(x, patch, order):
    B, C, *space = x.shape
    axes, grid = range(len(space)), [size // p for size, p in zip(space, patch, strict=True)]
    split = x.reshape(B, C, *(n for pair in zip(grid, patch, strict=True) for n in pair))
    inner = [3 + 2 * i for i in axes]
    depth = split.permute(0, *((*inner, 1) if order == "pqc" else (1, *inner)), *(2 + 2 * i for i in axes)).contiguous()
    return depth.view(B, prod(patch) * C, *grid)


def _eager_depth_to_space(x, patch, order):
    (B, K, *grid), n = x.shape, len(patch)
    split = x.reshape(B, *((*patch, K // prod(patch)) if order == "pqc" else (K // prod(patch), *patch)), *grid)
    channel, first = (1 + n, 1) if order == "pqc" else (1, 2)
    space = split.permute(0, channel, *(a for i in range(n) for a in (2 + n + i, first + i))).contiguous()
    return space.view(B, K // prod(patch), *(g * p for g, p in zip(grid, patch, strict=True)))


def _convolutional(patch, order):
    return _square(patch) or (None if order == "cpq" else "takes order cpq only")


_eager("space_to_depth", _eager_space_to_depth)
_eager("depth_to_space", _eager_depth_to_space)
_add("space_to_depth", "pixel_unshuffle", lambda x, patch, order: F.pixel_unshuffle(x, patch[0]), lambda x, **o: _convolutional(**o))
_add("depth_to_space", "pixel_shuffle", lambda x, patch, order: F.pixel_shuffle(x, patch[0]), lambda x, **o: _convolutional(**o))


# patch_embed, unpatch_project: a rearrangement and a linear layer, or a convolution with the weight in its order, made outside the times

def _placed(y, position):
    return y if position is None else y + position


def _by_patches(rearrange):
    return lambda x, weight, bias, position, patch, order: _placed(F.linear(rearrange(x, patch, order), weight, bias), position)


def _to_image(rearrange):
    return lambda tokens, weight, bias, patch, grid, order: rearrange(F.linear(tokens, weight, bias), patch, grid, order)


_KERNELS = {}


def _kernel(weight, patch, order):
    """The weight as a convolution's."""
    if weight.requires_grad or _KERNELS.get("of") is not weight:
        C = weight.shape[1] // prod(patch)
        made = weight.unflatten(1, (C, *patch)) if order == "cpq" else weight.unflatten(1, (*patch, C)).movedim(-1, 1).contiguous()
        if weight.requires_grad:
            return made
        _KERNELS.update(of=weight, kernel=made)
    return _KERNELS["kernel"]


def _strided_convolution(x, weight, bias, position, patch, order):
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(patch)]
    y = convolution(x, _kernel(weight, patch, order), bias, stride=patch)
    return _placed(y.flatten(2).transpose(1, 2), position).contiguous()


_eager("patch_embed", _by_patches(_eager_patchify))
_eager("unpatch_project", _to_image(_eager_unpatchify))
_add("patch_embed", "convolution", _strided_convolution)
_add("patch_embed", "unfold", _by_patches(_unfold), _planar)
_add("patch_embed", "pixel_unshuffle", _by_patches(_pixel_unshuffle), _square)
_add("unpatch_project", "fold", _to_image(_fold), _planar)
_add("unpatch_project", "pixel_shuffle", _to_image(_pixel_shuffle), _square)
if einops:
    _add("patch_embed", "einops", _by_patches(_einops_patchify))
    _add("unpatch_project", "einops", _to_image(_einops_unpatchify))


# attention

@lru_cache(8)
def _causal(M, N, device):
    """The last query is aligned with the last key, where SDPA's own flag aligns the first with the first. Made once, outside the times."""
    return torch.ones(M, N, dtype=torch.bool, device=device).tril(N - M)


def _mask(q, k, bias, key_lengths, causal):
    """(attn_mask, is_causal) of scaled_dot_product_attention."""
    M, N = q.shape[2], k.shape[2]
    if causal and M == N and bias is None and key_lengths is None:
        return None, True
    keep = _causal(M, N, q.device) if causal else None
    if key_lengths is not None:
        valid = torch.arange(N, device=q.device) < key_lengths.view(-1, 1, 1, 1)
        keep = valid if keep is None else keep & valid
    if bias is None:
        return keep, False
    return bias if keep is None else torch.where(keep, bias, -torch.inf), False


def _sdpa(q, k, v, bias=None, key_lengths=None, causal=False, scale=None):
    mask, is_causal = _mask(q, k, bias, key_lengths, causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)


def _sdpa_by(backend):
    def run(**arguments):
        with sdpa_kernel(backend):
            return _sdpa(**arguments)

    return run


def _scores(q, k, bias, key_lengths, causal, scale):
    scores = (q @ k.transpose(-2, -1)) * (q.shape[3] ** -0.5 if scale is None else scale)
    mask, is_causal = _mask(q, k, bias, key_lengths, causal)
    if is_causal:
        mask = _causal(q.shape[2], k.shape[2], q.device)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _eager_attention(q, k, v, bias=None, key_lengths=None, causal=False, scale=None):
    return torch.softmax(_scores(q, k, bias, key_lengths, causal, scale), -1) @ v


def _eager_with_lse(q, k, v, bias=None, key_lengths=None, causal=False, scale=None):
    scores = _scores(q, k, bias, key_lengths, causal, scale)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return torch.softmax(scores, -1) @ v, torch.logsumexp(wide, -1)


def _flash_with_lse(q, k, v, bias=None, key_lengths=None, causal=False, scale=None):
    mask, is_causal = _mask(q, k, bias, key_lengths, causal)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        mask = mask[(None,) * (4 - mask.dim())]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)


def _scores_fit(q, k, **_):
    """Scores, masked scores and probabilities of a plain softmax."""
    size = 3 * q.element_size() * prod(q.shape[:3]) * k.shape[2]
    return f"its scores would take {size / 1e9:.1f} GB" if size > LARGEST else None


def _gpu(q, **_):
    return None if q.is_cuda else "runs on a GPU only"


def _flash_forward(q, bias=None, **_):
    if q.is_cuda:
        return "runs on a CPU only"
    return "has no derivative through the log-sum-exp" if q.requires_grad else None


_eager("attention", _eager_attention, _scores_fit)
_add("attention", "sdpa", _sdpa)
_add("attention", "sdpa-flash", _sdpa_by(SDPBackend.FLASH_ATTENTION), default=False)
_add("attention", "sdpa-math", _sdpa_by(SDPBackend.MATH), _scores_fit, default=False)
_add("attention", "sdpa-efficient", _sdpa_by(SDPBackend.EFFICIENT_ATTENTION), _gpu, default=False)
_add("attention", "sdpa-cudnn", _sdpa_by(SDPBackend.CUDNN_ATTENTION), _gpu, default=False)
_eager("attention_with_lse", _eager_with_lse, _scores_fit)
_add("attention_with_lse", "aten-flash", _flash_with_lse, _flash_forward)


# merge_attention

def _eager_merge(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    a, b = (torch.exp(part - lse).unsqueeze(-1).to(out_a.dtype) for part in (lse_a, lse_b))
    return a * out_a + b * out_b, lse


_eager("merge_attention", _eager_merge)


# linear

_eager("linear", F.linear)


# fourier_cross_attend: the features made once, outside the times, as a user would

def _axis_features(n, bands, max_freq, like):
    places = torch.linspace(-1, 1, n, dtype=torch.float64)
    angles = torch.pi * places[:, None] * torch.linspace(1, max_freq / 2, bands, dtype=torch.float64)
    return [x.to(like) for x in (places[:, None], angles.sin(), angles.cos())]


@lru_cache(4)
def _positions(grid, bands, max_freq, order, device, dtype):
    like, parts = torch.empty(0, device=device, dtype=dtype), []
    for axis, n in enumerate(grid):
        shape = [n if i == axis else 1 for i in range(len(grid))]
        parts.append([x.view(*shape, x.shape[1]).expand(*grid, -1) for x in _axis_features(n, bands, max_freq, like)])
    if order == "axis":
        found = [x for position, sine, cosine in parts for x in (sine, cosine, position)]
    else:
        found = [x for kind in zip(*parts, strict=True) for x in kind]
    return torch.cat(found, -1).flatten(0, -2)


def _normed(x, name, eps, norms):
    gain, shift = norms[f"{name}_0"], norms[f"{name}_1"]
    return x if gain is None else F.layer_norm(x, x.shape[-1:], gain, shift, eps)


def _perceiver_read(latents, image, q_weight, k_weight, v_weight, out_weight, bands, max_freq, order, heads, q_bias, k_bias, v_bias,
                    out_bias, eps, residual, **norms):
    positions = _positions(tuple(image.shape[2:]), bands, max_freq, order, image.device, image.dtype)
    x = torch.cat((image.flatten(2).transpose(1, 2), positions.expand(image.shape[0], -1, -1)), -1)
    z, x = _normed(latents, "target_norm", eps, norms), _normed(x, "source_norm", eps, norms)
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)
    y = F.scaled_dot_product_attention(split(F.linear(z, q_weight, q_bias)), split(F.linear(x, k_weight, k_bias)),
                                       split(F.linear(x, v_weight, v_bias)))
    y = F.linear(y.transpose(1, 2).flatten(2), out_weight, out_bias)
    return latents + y if residual else y


_eager("fourier_cross_attend", _perceiver_read)


# cross_attend

def _cross_attention_layer(target, source, q_weight, k_weight, v_weight, out_weight, heads, q_bias, k_bias, v_bias, out_bias, eps, residual,
                           key_lengths=None, **norms):
    z, x = _normed(target, "target_norm", eps, norms), _normed(source, "source_norm", eps, norms)
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)
    y = _sdpa(split(F.linear(z, q_weight, q_bias)), split(F.linear(x, k_weight, k_bias)), split(F.linear(x, v_weight, v_bias)),
              key_lengths=key_lengths)
    y = F.linear(y.transpose(1, 2).flatten(2), out_weight, out_bias)
    return target + y if residual else y


_eager("cross_attend", _cross_attention_layer)


# dct, idct and what is made of them. scipy is given torch's number of threads, and dense products their matrices, made outside the times.

@lru_cache(32)
def _cosines(n, device, dtype):
    k = torch.arange(n, device=device, dtype=torch.float64)
    D = torch.cos(torch.pi / n * (k + 0.5) * k.unsqueeze(1)) * (2 / n) ** 0.5
    D[0] *= 0.5 ** 0.5
    return D.to(dtype)


def _dense_dct(x, dims):
    rows, columns = (_cosines(n, x.device, x.dtype) for n in x.shape[-2:])
    y = x @ columns.T
    return rows @ y if dims == 2 else y


def _dense_idct(x, dims):
    rows, columns = (_cosines(n, x.device, x.dtype) for n in x.shape[-2:])
    y = x @ columns
    return rows.T @ y if dims == 2 else y


class _Scipy(torch.autograd.Function):
    """scipy has no derivative: that of an orthonormal transform is its inverse."""

    @staticmethod
    def forward(ctx, x, dims, inverse):
        ctx.dims, ctx.inverse = dims, inverse
        transform = scipy.fft.idctn if inverse else scipy.fft.dctn
        return torch.from_numpy(transform(x.numpy(), axes=tuple(range(-dims, 0)), norm="ortho", workers=torch.get_num_threads()))

    @staticmethod
    def backward(ctx, dy):
        return _Scipy.apply(dy, ctx.dims, not ctx.inverse), None, None


def _scipy(inverse):
    return lambda x, dims: _Scipy.apply(x, dims, inverse)


def _scipy_takes(x, **_):
    return "takes float32 and float64 on a CPU only" if x.is_cuda or x.dtype not in (torch.float32, torch.float64) else None


def _torch_dct(name):
    return lambda x, dims: getattr(torch_dct, name if dims == 1 else f"{name}_2d")(x, norm="ortho")


def _torch_dct_takes(x, **_):
    return None if x.dtype in (torch.float32, torch.float64) else "takes float32 and float64 only"


def _dctorch(name):
    return lambda x, dims: getattr(dctorch, name)(x)


def _dctorch_takes(x, dims=2, **_):
    return None if dims == 2 else "takes the last two axes only"


def _by_transforms(dct, idct):
    """frequency_gain, blur, blur_diffuse and blur_denoise by a transform of one's own."""

    def gain(x, gain, dims):
        return idct(gain * dct(x, dims), dims)

    def blur(x, width, floor):
        h, w = x.shape[2:]
        i, j = (torch.arange(n, device=x.device) * (torch.pi / n) for n in (h, w))
        time = width.square().view(-1, 1, 1, 1) / 2
        return gain(x, ((1 - floor) * torch.exp(-(i.square().unsqueeze(1) + j.square()) * time) + floor).to(x.dtype), 2)

    def blur_diffuse(x, noise, signal, sigma, width, floor):
        scalar = lambda s: s.view(-1, 1, 1, 1).to(x.dtype)
        return scalar(signal) * blur(x, width, floor) + scalar(sigma) * noise

    def blur_denoise(z, eps, noise, gain_z, gain_eps, gain_noise):
        return idct(gain_z * dct(z, 2) + gain_eps * dct(eps, 2) + gain_noise * noise, 2)

    return {"frequency_gain": gain, "blur": blur, "blur_diffuse": blur_diffuse, "blur_denoise": blur_denoise}


def _kernels(x, width, floor):
    """The blur along each axis as a matrix per sample."""
    made = []
    for n in x.shape[2:]:
        D, k = _cosines(n, x.device, torch.float32), torch.arange(n, device=x.device) * (torch.pi / n)
        g = torch.exp(-k.square() * width.square().unsqueeze(1) / 2)
        made.append((D.T @ (g.unsqueeze(2) * D)).unsqueeze(1).to(x.dtype))
    return made


def _separable_blur(x, width, floor):
    rows, columns = _kernels(x, width, floor)
    y = rows @ x @ columns
    return (1 - floor) * y + floor * x if floor else y


def _separable_diffuse(x, noise, signal, sigma, width, floor):
    scalar = lambda s: s.view(-1, 1, 1, 1).to(x.dtype)
    return scalar(signal) * _separable_blur(x, width, floor) + scalar(sigma) * noise


_eager("dct", _dense_dct)
_eager("idct", _dense_idct)
for _op, _run in _by_transforms(_dense_dct, _dense_idct).items():
    _eager(_op, _run)
_add("blur", "separable", _separable_blur)
_add("blur_diffuse", "separable", _separable_diffuse)
scipy = _optional("scipy")
torch_dct = _optional("torch_dct")
dctorch = _optional("dctorch.functional")
for _name, _there, _dct, _idct, _takes in (
        ("scipy", scipy, _scipy(False), _scipy(True), _scipy_takes),
        ("torch-dct", torch_dct, _torch_dct("dct"), _torch_dct("idct"), _torch_dct_takes),
        ("dctorch", dctorch, _dctorch("dct2"), _dctorch("idct2"), _dctorch_takes)):
    if _there:
        for _op, _run in {"dct": _dct, "idct": _idct, **_by_transforms(_dct, _idct)}.items():
            _add(_op, _name, _run, lambda x=None, z=None, _takes=_takes, **o: _takes(z if x is None else x, **o))


# add_noise, guide, denoise_step, to_bits, from_bits

def _beside(c, x):
    return c.view(-1, *(1,) * (x.dim() - 1)).to(x.dtype)


def _eager_add_noise(x, noise, signal, sigma):
    return _beside(signal, x) * x + _beside(sigma, x) * noise


def _eager_guide(cond, uncond, weight, rescale):
    guided = uncond + _beside(weight, cond) * (cond - uncond)
    if not rescale:
        return guided
    axes = tuple(range(1, cond.dim()))
    scaled = guided * (cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
    return rescale * scaled + (1 - rescale) * guided


def _eager_denoise_step_with_x0(x, pred, signal, sigma, to_x0, to_eps, prediction, clip, rederive, variance_0, variance_1, to_noise=None,
                                noise=None):
    signal, sigma = _beside(signal, x), _beside(sigma, x)
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
    y = _beside(to_x0, x) * x0 + _beside(to_eps, x) * eps
    if noise is not None:
        scale = _beside(to_noise, x)
        if variance_0 is not None:
            scale = scale * torch.exp(0.25 * (variance_0 + 1) * _beside(variance_1, x))
        y = y + scale * noise
    return y, x0


def _eager_to_bits(x, bits, scale, order):
    masks = 2 ** torch.arange(bits, device=x.device)
    masks = (masks if order == "lsb" else masks.flip(0)).view(-1, *(1,) * (x.dim() - 2))
    return (((x.long().unsqueeze(2) & masks) != 0).float() * 2 - 1).mul(scale).flatten(1, 2)


def _eager_from_bits(x, bits, order):
    masks = 2 ** torch.arange(bits, device=x.device, dtype=torch.int32 if bits < 32 else torch.int64)
    masks = (masks if order == "lsb" else masks.flip(0)).view(-1, *(1,) * (x.dim() - 2))
    whole = ((x > 0).unflatten(1, (-1, bits)) * masks).sum(2)
    return whole.to(torch.uint8 if bits <= 8 else torch.int32 if bits < 32 else torch.int64)


for _op, _run in {"add_noise": _eager_add_noise, "guide": _eager_guide, "denoise_step_with_x0": _eager_denoise_step_with_x0,
                  "denoise_step": lambda **arguments: _eager_denoise_step_with_x0(**arguments)[0], "to_bits": _eager_to_bits,
                  "from_bits": _eager_from_bits}.items():
    _eager(_op, _run)


# layer_norm_modulate, gate_residual, gate_residual_norm_modulate, group_norm_modulate, geglu: as models write them

def _rows(x):
    return x.unsqueeze(1) if x.dim() == 2 else x


def _layer_norm(x, shift, scale, weight, bias, eps):
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = y if scale is None else y * (1 + _rows(scale))
    return (y if shift is None else y + _rows(shift)).to(x.dtype)


def _gated(x, y, gate):
    return (x + _rows(gate) * y).to(x.dtype)


def _gated_norm(x, y, gate, shift, scale, weight, bias, eps):
    out = _gated(x, y, gate)
    return out, _layer_norm(out, shift, scale, weight, bias, eps)


def _group_norm(x, groups, weight, bias, scale, shift, eps, silu):
    y, channels = F.group_norm(x, groups, weight, bias, eps), (..., *(None,) * (x.dim() - 2))
    y = y if scale is None else y * (1 + scale[channels])
    y = (y if shift is None else y + shift[channels]).to(x.dtype)
    return F.silu(y) if silu else y


def _geglu(x, approximate):
    a, b = x.chunk(2, -1)
    return a * F.gelu(b, approximate=approximate)


_eager("layer_norm_modulate", _layer_norm)
_eager("gate_residual", _gated)
_eager("gate_residual_norm_modulate", _gated_norm)
_eager("group_norm_modulate", _group_norm)
_eager("geglu", _geglu)
