"""Refusals of bad input: every message names op, argument, what was wanted and what was given."""

import torch

_LIMIT = 1 << 31  # products of a few stay within int64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op, text):
    raise ValueError(f"{op}: {text}")


def tensor(op, name, x):
    """x, if it is a tensor; TypeError otherwise."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} wants a torch.Tensor, got {type(x).__name__}")
    return x


def per_sample(op, x, **vectors):
    """Refuses a `name=vector` that is not one number for each sample of x."""
    for name, vector in vectors.items():
        if tensor(op, name, vector).shape != tensor(op, "x", x).shape[:1]:
            fail(op, f"{name} wants the shape (B,) = ({x.shape[0]},), got {tuple(vector.shape)}")


def dims(op, **arrays):
    """Sizes by axis letter of `name=(tensor, "B N D")` arguments that must agree; None tensors are skipped.

    All must be strided floating tensors of one dtype on one device. Raises ValueError (TypeError for a non-tensor).
    """
    sizes, owner = {}, {}
    first = None
    for name, (x, layout) in arrays.items():
        if x is None:
            continue
        if not isinstance(x, torch.Tensor):
            tensor(op, name, x)
        shape, axes = x.shape, layout.split()
        if len(shape) != len(axes):
            fail(op, f"{name} wants {len(axes)} dimensions ({', '.join(axes)}), got {len(shape)}: {tuple(shape)}")
        if first is None:
            first, first_name, dtype, device = x, name, x.dtype, x.device
            if dtype not in DTYPES:
                fail(op, f"{name} wants float32, bfloat16, float16 or float64, got {dtype}")
            _strided(op, name, x)
        elif x is not first:
            if x.dtype is not dtype:
                fail(op, f"{name} has dtype {x.dtype}, but {first_name} has {dtype}")
            if x.device != device:
                fail(op, f"{name} is on {x.device}, but {first_name} is on {device}")
            _strided(op, name, x)
        for axis, size in zip(axes, shape, strict=True):
            known = sizes.get(axis)
            if known is None:
                sizes[axis], owner[axis] = size, name
            elif known != size:
                fail(op, f"{name} has {axis} = {size}, but {owner[axis]} has {axis} = {known}")
    return sizes


def beside(op, x, sizes, **arrays):
    """Refuses `name=(tensor, layout, ...)` unless of one of the layouts ("B D") with these sizes, x's dtype or float32, and x's device.

    None tensors are skipped; float32 stands beside narrower x alone.
    """
    for name, (given, *layouts) in arrays.items():
        if given is None:
            continue
        layout = next((axes for axes in map(str.split, layouts) if len(axes) == tensor(op, name, given).dim()), None)
        if layout is None:
            wanted = " or ".join(f"({axes.replace(' ', ', ')})" for axes in layouts)
            fail(op, f"{name} wants {wanted}, got {tuple(given.shape)}")
        for axis, size in zip(layout, given.shape, strict=True):
            if size != sizes[axis]:
                fail(op, f"{name} has {axis} = {size}, but x has {axis} = {sizes[axis]}")
        if given.dtype != x.dtype and (given.dtype != torch.float32 or x.dtype == torch.float64):
            wanted = x.dtype if x.dtype in (torch.float32, torch.float64) else f"{x.dtype} or torch.float32"
            fail(op, f"{name} wants {wanted} beside x of {x.dtype}, got {given.dtype}")
        if given.device != x.device:
            fail(op, f"{name} is on {given.device}, but x is on {x.device}")
        _strided(op, name, given)


def _strided(op, name, x):
    if x.layout is not torch.strided:
        fail(op, f"{name} wants a strided (dense) tensor, got {x.layout}")


def lengths(op, key_lengths, x):
    """Refuses key_lengths unless None or int64 (B,) beside x (B, ...)."""
    if key_lengths is None:
        return
    if tensor(op, "key_lengths", key_lengths).dtype != torch.int64 or key_lengths.shape != x.shape[:1]:
        fail(op, f"key_lengths wants int64 of shape (B,) = ({x.shape[0]},), got {key_lengths.dtype} of {tuple(key_lengths.shape)}")
    if key_lengths.device != x.device:
        fail(op, f"key_lengths is on {key_lengths.device}, but the other tensors are on {x.device}")


def lengths_within(op, key_lengths, N):
    """Refuses values of key_lengths outside [0, N]; asked on the device of a GPU, so that the host need not wait."""
    if key_lengths is None or not key_lengths.numel():
        return
    if key_lengths.is_cuda:
        torch._assert_async(((key_lengths >= 0) & (key_lengths <= N)).all(), f"{op}: key_lengths wants values in [0, N = {N}]")
    else:
        low, high = torch.aminmax(key_lengths)
        if low < 0 or high > N:
            fail(op, f"key_lengths wants values in [0, N = {N}], got [{low}, {high}]")


def pair(op, name, value, of="(weight, bias)"):
    """The two tensors of `value`, or (None, None) for None; `of` names them."""
    if value is None:
        return None, None
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(isinstance(x, torch.Tensor) for x in value):
        given = type(value).__name__
        if isinstance(value, tuple | list):
            given += f" of {', '.join(f'{name}[{i}] {type(x).__name__}' for i, x in enumerate(value))}"
        raise TypeError(f"{op}: {name} wants {of}, two tensors, or None, got {given}")
    return tuple(value)


def option(op, name, value, choices):
    """value, if it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        fail(op, f"{name} wants one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def flag(op, name, value):
    """value, if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} wants a bool, got {value!r}")
    return value


def number(op, name, value, *, least=-float("inf")):
    """value, if it is a number, at least `least` and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} wants a float, got {value!r}")
    if not least <= value < float("inf"):
        fail(op, f"{name} wants a finite number{'' if least == -float('inf') else f', at least {least}'}, got {value!r}")
    return float(value)


def integers(op, name, value, length=None, *, least=1):
    """A tuple of ints in [least, 2^31), of the given length; an int stands for itself repeated (length 1 if none is given)."""
    if type(value) is int and least <= value < _LIMIT:
        return (value,) * (1 if length is None else length)
    if type(value) is tuple and length in (None, len(value)):
        for v in value:
            if type(v) is not int or not least <= v < _LIMIT:
                break
        else:
            return value
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        value = (value,) * (1 if length is None else length)
    if not isinstance(value, tuple | list) or not all(isinstance(v, int | torch.SymInt) and not isinstance(v, bool) for v in value):
        raise TypeError(f"{op}: {name} wants an int or a tuple of ints, got {value!r}")
    if length is not None and len(value) != length:
        fail(op, f"{name} wants {length} ints, got {len(value)}: {tuple(value)}")
    for v in value:
        if v < least or v >= _LIMIT:
            fail(op, f"{name} wants values in [{least}, 2**31), got {tuple(value)}")
    return tuple(value)
