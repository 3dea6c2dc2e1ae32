"""A row of the table, and what the replacements of several packages share."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rule:
    """module, name: the class. forward(plain) -> its replacement, given the class's own forward for the calls it does not take.

    options and inputs: the constructor's and forward's parameters the replacement accounts for; a version with others is left alone.
    refuse(m): a sentence when module m is not for it, else None. note(m): a sentence about calls that stay with the original, else None.
    leave: a sentence, for a class that is known and left alone. about(m): whether the rule has a word on module m at all.
    """

    module: str
    name: str
    forward: Callable | None = None
    options: frozenset = frozenset()
    inputs: frozenset = frozenset()
    refuse: Callable = lambda m: None
    note: Callable = lambda m: None
    leave: str | None = None
    about: Callable = lambda m: True

    @property
    def kind(self):
        return f"{self.module}.{self.name}"

    def why_not(self, m):
        """None when module m, whose class this rule names, can be replaced; otherwise the reason."""
        if self.leave:
            return self.leave
        if "forward" in vars(m):
            return "its forward was replaced on the instance"
        for function, known in ((type(m).__init__, self.options), (type(m).forward, self.inputs)):
            unknown = set(inspect.signature(function).parameters) - known - {"self"}
            if unknown:
                return f"this version takes {', '.join(sorted(unknown))}, which the rule does not know"
        return self.refuse(m)


class Replaced:
    """Marks the classes that `accelerate` gives to modules; the class they had is the first base."""

    __slots__ = ()


def hidden(q, mask):
    """(q, bias) that give queries (B, H, M, E) the softmax of scores whose hidden places hold the dtype's lowest number.

    mask (B or 1, H or 1, M or 1, N), True where a key is seen. A query that sees no key then weighs all keys alike: its q becomes 0
    and its bias 0, so that all its scores are equal.
    """
    seen = mask.any(-1, keepdim=True)
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~(mask | ~seen), -torch.inf)
    return q * seen, bias


def added(mask, q):
    """The bias of `attention` that a mask of scaled_dot_product_attention is: True where a key is seen, or added to the scores."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return mask.to(q.dtype)


# Scores, B H M N, from which `attention` on a CPU is faster than scaled_dot_product_attention: without gradients, with them. Measured on
# one thread of an AVX-512 machine at 16 to 256 queries and keys.
SCORES = {False: 1 << 16, True: 1 << 18}


def many_scores(x, heads, N):
    """Whether `attention` of x's rows, x (B, M, D), to N keys gains on scaled_dot_product_attention."""
    return x.device.type != "cpu" or heads * N * x.shape[0] * x.shape[1] >= SCORES[torch.is_grad_enabled() and x.requires_grad]


# Elements of a CPU tensor from which an op is faster than the calls of PyTorch it stands for: without gradients, with them, where the way
# through autograd takes 0.1 ms. Measured on one thread of an AVX-512 machine at 2 ** 12 to 2 ** 20 elements, images of 4 to 64 pixels.
FROM = {"group norm": (1 << 14, 1 << 18), "modulated group norm": (0, 1 << 17), "layer norm": (0, 1 << 17), "gate": (0, 1 << 19),
        "gate and norm": (0, 1 << 17), "geglu": (0, 1 << 16)}


# What torch.compile fuses with its neighbours on a CPU, which gains more: a compiled DiT of 256 tokens took 6 % longer with these ops.
FUSED = frozenset(("layer norm", "gate", "gate and norm", "geglu"))


def pays(op, x):
    """Whether an op of FROM gains at x."""
    if x.device.type != "cpu":
        return True
    if op in FUSED and torch.compiler.is_compiling():
        return False
    return x.numel() >= FROM[op][torch.is_grad_enabled() and x.requires_grad]


def watched(*modules):
    """Whether modules that a replacement does not call have hooks, or a forward of their own, that it would leave out."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any("forward" in m.__dict__ or any(getattr(m, h) for h in hooks) for m in modules)


def dropout_note(*dropouts):
    p = max((d.p for d in dropouts), default=0)
    return f"dropout {p:g}: the original runs in training mode" if p > 0 else None


def own_dropout_note(m):
    found = getattr(m, "attn_dropout", getattr(m, "dropout", None))
    return dropout_note(*filter(None, [found]))
