"""Perceiver AR (Hawthorne et al. 2022): the last positions read a long past, causally, and think among themselves."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..core.check import fail
from ..nn import MLP, Linear
from ..ops import attention
from .model import Model, cut_normal, initialize_linear

EPS = 1e-5
HIDDEN = -1e30  # added to the score of a key that is not to be seen; a row of such scores weighs all keys alike, as the original's does


class Memory:
    """Keys and values that sampling keeps, of the inputs and of every layer's latents: rings of `context` and `latents` rows.

    seen: inputs so far; held: latents in the rings.
    """

    def __init__(self, context, latents, layers):
        self.sizes = (context, *(latents,) * layers)
        self.clear()

    def clear(self):
        self.rings, self.seen, self.held = [None] * len(self.sizes), 0, 0

    def add(self, ring, *pair):
        """The ring's keys and values with a pair (B, H, new rows, E) of them added, the oldest overwritten; in no order of time."""
        size, new = self.sizes[ring], pair[0].shape[2]
        before = self.held if ring else self.seen
        if self.rings[ring] is None:
            self.rings[ring] = [x.new_empty((*x.shape[:2], size, x.shape[3])) for x in pair]
        places = torch.arange(before, before + new, device=pair[0].device) % size
        for kept, x in zip(self.rings[ring], pair, strict=True):
            kept.index_copy_(2, places, x)
        return (kept[:, :, :min(before + new, size)] for kept in self.rings[ring])


class Layer(nn.Module):
    """z + attention(LN z, LN x), x the inputs of the first layer and z itself in the others; z + MLP(LN z)."""

    def __init__(self, dim, heads, hidden, dropout, cross):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm, self.source_norm = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS) if cross else None
        self.query, self.key, self.value, self.out = (Linear(dim, dim) for _ in range(4))
        self.mlp = MLP(dim, hidden, activation="squared_relu", residual=False, eps=EPS)

    def forward(self, z, x, turn, bias, memory, ring):
        """turn: (q, k) -> the two with positions in them. bias: of the scores, or None for all positions in order."""
        q = self.norm(z)
        x = q if self.source_norm is None else self.source_norm(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.query(q), self.key(x), self.value(x)))
        q, k = turn(q, k)
        if memory is not None:
            k, v = memory.add(ring, k, v)
        y = attention(q, k, v, bias=bias, causal=bias is None or bias.shape[2] == 1).transpose(1, 2).flatten(2)
        drop = lambda y: F.dropout(y, self.dropout, self.training)
        z = z + drop(self.out(y))
        return z + drop(self.mlp(z))


def _turned(x, cosine, sine):
    """The first channels of x (B, H, S, E) turned in pairs by angles (B or 1, 1, S, pairs)."""
    pairs = x[..., :2 * cosine.shape[-1]].unflatten(-1, (-1, 2))
    a, b = pairs.unbind(-1)
    return torch.cat((torch.stack((a * cosine - b * sine, b * cosine + a * sine), -1).flatten(-2), x[..., 2 * cosine.shape[-1]:]), -1)


def sinusoids(size, dim):
    """(size, dim): sines, then cosines, of wavelengths from 2 pi to 2 pi 10^4."""
    rates = 10000.0 ** -torch.linspace(0, 1, dim // 2, dtype=torch.float64)
    angles = torch.arange(size, dtype=torch.float64).unsqueeze(1) * rates
    return F.pad(torch.cat((angles.sin(), angles.cos()), 1), (0, dim % 2)).float()


class PerceiverAR(Model):
    """p(next token | tokens so far), at the last `latents` positions of up to `context` tokens.

    Shapes   tokens (B, M) int64, M <= context; positions (B, M) or (B, M, tables) int64; lengths (B,): tokens from there on are padding
             -> logits (B, latents, vocabulary) at positions lengths - latents to lengths - 1; of those below 0 the logits mean nothing
    Options  positions: "rotary", turning `rotated` of the channels of queries and keys, by `wavelength` at the longest (context unless
             given); "sinusoidal" or "learned", tables of `sizes` rows ((context + 1,) unless given) whose rows are added to the
             embeddings. heads, cross_heads: of the latents' layers, of the first. dropout: of branches; input_dropout: inputs hidden from
             all latents while training
    Positions unless given: rotary ones count from the first token, backwards (only distances matter: these are those of the original,
             which counts back from the last); tables' rows start at 1
    Raises   ValueError for tokens, positions or latents that do not fit
    Grads    not through a memory
    Source   Hawthorne et al. 2022, section 3; google-research/perceiver-ar, perceiver_ar_model.py
    """

    CONFIGS: ClassVar = {
        "imagenet-64": dict(vocabulary=259, context=12416, latents=1024, layers=60, positions="learned", sizes=(66, 66, 5), dropout=0.1),
        "copy-131072": dict(vocabulary=259, context=131072, latents=1024, layers=6, positions="sinusoidal", dropout=0.1),
        "copy-32": dict(vocabulary=259, context=32, latents=16, layers=1, positions="sinusoidal", dropout=0.1),
        "default": dict(vocabulary=259, context=1024, latents=1024, layers=12, dropout=0.1)}

    def __init__(self, vocabulary, *, context, latents, layers, dim=1024, heads=16, cross_heads=16, mlp_ratio=4, positions="rotary",
                 rotated=0.5, wavelength=None, sizes=None, dropout=0.0, input_dropout=0.0):
        super().__init__()
        if positions not in ("rotary", "sinusoidal", "learned"):
            fail("PerceiverAR", f"positions wants 'rotary', 'sinusoidal' or 'learned', got {positions!r}")
        self.context, self.latents, self.input_dropout = context, latents, input_dropout
        self.rotated, self.wavelength = rotated, context if wavelength is None else wavelength
        self.embedding = nn.Embedding(vocabulary, dim)
        sizes = () if positions == "rotary" else (context + 1,) if sizes is None else tuple(sizes)
        self.tables = nn.ModuleList(nn.Embedding(size, dim) for size in sizes)
        self.start = Linear(dim, dim)
        self.cross = Layer(dim, cross_heads, mlp_ratio * dim, dropout, True)
        self.layers = nn.ModuleList(Layer(dim, heads, mlp_ratio * dim, dropout, False) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(dim, EPS), Linear(dim, vocabulary)
        self._initialize(positions)

    def forward(self, tokens, positions=None, *, lengths=None, latents=None, memory=None):
        M = tokens.shape[1]
        latents = min(self.latents, M) if latents is None else latents
        if not 1 <= latents <= M <= self.context:
            fail("PerceiverAR", f"tokens wants 1 <= latents <= M <= context = {self.context}, got latents = {latents}, M = {M}")
        positions = self._positions(tokens, positions, memory)
        x = self.embedding(tokens)
        for i, table in enumerate(self.tables):
            x = x + table(positions[..., i])
        places = self.places(tokens, latents, lengths)
        at = places % M  # a missing position stands at the last
        z = x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        biases = self._biases(x, places, lengths)
        angles = None if self.tables else (positions[..., 0].gather(1, at), positions[..., 0])
        z = self.cross(self.start(z), x, self._turn(self.cross, angles), biases[0], memory, 0)
        if self.layers:
            turn = self._turn(self.layers[0], angles and (angles[0],) * 2)
        for i, layer in enumerate(self.layers, 1):
            z = layer(z, None, turn, biases[1], memory, i)
        if memory is not None:
            memory.seen, memory.held = memory.seen + M, memory.held + latents
        return self.out(self.norm(z))

    def places(self, tokens, latents, lengths=None):
        """(B, latents): the position in tokens (B, M) of each latent, -1 where there is none."""
        B, M = tokens.shape
        ends = tokens.new_full((B, 1), M) if lengths is None else lengths.view(-1, 1)
        return (ends - latents + torch.arange(latents, device=tokens.device)).clamp(min=-1)

    def _positions(self, tokens, positions, memory):
        """(B, M, 1 or tables)."""
        B, M = tokens.shape
        if positions is None:
            if len(self.tables) > 1:
                fail("PerceiverAR", f"positions wants (B, M, {len(self.tables)}), got none: there are as many tables")
            places = (0 if memory is None else memory.seen) + torch.arange(M, device=tokens.device)
            positions = (places + 1 if self.tables else -places).expand(B, M)
        positions = positions.unsqueeze(-1) if positions.dim() == 2 else positions
        if tuple(positions.shape) != (B, M, max(len(self.tables), 1)):
            fail("PerceiverAR", f"positions wants ({B}, {M}) or ({B}, {M}, {max(len(self.tables), 1)}), got {tuple(positions.shape)}")
        return positions

    def _biases(self, x, places, lengths):
        """Of the scores over inputs and over latents; None where all positions are there and in order."""
        B, M, _ = x.shape
        dropped = self.training and self.input_dropout > 0
        hidden = lambda seen: torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill_(~seen, HIDDEN).unsqueeze(1)
        keep = torch.rand((B, 1, M), device=x.device) >= self.input_dropout if dropped else None
        if lengths is None:
            return hidden(keep) if dropped else None, None
        p = places.unsqueeze(-1)
        cross = p >= torch.arange(M, device=x.device)
        own = (p >= places.unsqueeze(1)) & (places >= 0).unsqueeze(1) | torch.eye(places.shape[1], dtype=torch.bool, device=x.device)
        return hidden(cross & keep if dropped else cross), hidden(own)

    def _turn(self, layer, positions):
        """(q, k) -> (q, k) turned by their positions (B, S): wavelength^(-j / (pairs - 1)) radians a position for pair j."""
        width = layer.query.out_features // layer.heads
        pairs = int(width * self.rotated / 2)
        if positions is None or not pairs:
            return lambda q, k: (q, k)
        rates = float(self.wavelength) ** -torch.linspace(0, 1, pairs, dtype=torch.float64, device=positions[0].device)
        dtype = self.start.weight.dtype
        tables = [(angle.cos().to(dtype), angle.sin().to(dtype)) for angle in (p.double()[:, None, :, None] * rates for p in positions)]
        return lambda q, k: (_turned(q, *tables[0]), _turned(k, *tables[1]))

    def loss(self, logits, targets, lengths=None, z_loss=1e-4):
        """(B, latents): -log p(target) + z_loss (log sum exp logits)^2 at the latents' positions, 0 where there is none or target 0.

        Shapes   logits of `forward`, targets (B, M) int64: the next tokens of all positions
        """
        places = self.places(targets, logits.shape[1], lengths)
        labels = targets.gather(1, places % targets.shape[1])
        log_z = torch.logsumexp(logits, -1)
        loss = log_z - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) + z_loss * log_z.square()
        return loss * ((places >= 0) & (labels != 0))

    def memory(self):
        """An empty one, for `next_logits` or `forward`."""
        return Memory(self.context, self.latents, len(self.layers))

    @torch.no_grad()
    def next_logits(self, tokens, memory, positions=None):
        """(B, vocabulary): logits of the token after tokens (B, M), all there are so far.

        If memory knows all but the last of them and its latents are not full, one position is computed. Else memory is filled again, by
        as many latents as the original would hold after that many steps: all up to `latents` tokens, then half, growing to full again.
        """
        M, half = tokens.shape[1], max(self.latents // 2, 1)
        if memory.seen != M - 1 or memory.held >= self.latents or not memory.held:
            memory.clear()
            latents = M if M <= self.latents else half + (M - self.latents - 1) % (self.latents - half + 1)
            return self(tokens, positions, latents=latents, memory=memory)[:, -1]
        return self(tokens[:, -1:], None if positions is None else positions[:, -1:], latents=1, memory=memory)[:, -1]

    @torch.no_grad()
    def sample(self, tokens, steps, *, positions=None, temperature=1.0, top_p=1.0, cached=True, generator=None):
        """Tokens (B, M + steps) that go on from tokens (B, M), M >= 1.

        Options  positions: (B, M + steps - 1, ...) of all tokens that are read; temperature 0: the likeliest token; top_p: drawn among
                 the likeliest tokens of that probability together; cached: every step computes one position (next_logits), and not all
        Raises   ValueError when the tokens would not fit the context
        Source   Hawthorne et al. 2022, appendix; google-research/perceiver-ar, sample_utils.py
        """
        if tokens.shape[1] + steps - 1 > self.context:
            fail("PerceiverAR.sample", f"steps wants at most context + 1 - M = {self.context + 1 - tokens.shape[1]}, got {steps}")
        memory = self.memory()
        for _ in range(steps):
            given = None if positions is None else positions[:, :tokens.shape[1]]
            logits = self.next_logits(tokens, memory, given) if cached else self(tokens, given)[:, -1]
            if temperature > 0:
                p = torch.softmax(nucleus(logits, top_p, temperature), -1)
                token = torch.multinomial(p, 1, generator=generator)
            else:
                token = logits.argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, token), 1)
        return tokens

    @torch.no_grad()
    def _initialize(self, positions):
        """Matrices normal, cut at two standard deviations, of variance 1 / fan-in; embeddings of variance 1; the last layer 0."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                initialize_linear(m)
            elif isinstance(m, nn.Embedding):
                cut_normal(m.weight, 1.0)
        self.out.weight.zero_()
        for table in self.tables if positions == "sinusoidal" else ():
            table.weight.requires_grad_(False).copy_(sinusoids(*table.weight.shape))

    @classmethod
    @torch.no_grad()
    def from_haiku(cls, parameters, **options):
        """The original's weights: {Haiku's path: array or tensor}, such as "perceiver_ar/~/cross_attention/attention/linear/w".

        Options  of PerceiverAR
        Raises   ValueError for a parameter that is missing, too many, or of another shape
        """
        theirs = {path.removeprefix("perceiver_ar/"): torch.as_tensor(x) for path, x in parameters.items()}
        model = cls(**options).to(next(iter(theirs.values())).dtype)
        for name, mine in model.named_parameters():
            path = haiku_path(name)
            wanted = tuple(mine.shape[::-1] if path.endswith("/w") else mine.shape)
            if path not in theirs or tuple(theirs[path].shape) != wanted:
                given = tuple(theirs[path].shape) if path in theirs else "nothing"
                fail("from_haiku", f"{path} wants {wanted}, got {given}")
            mine.copy_(theirs.pop(path).T if path.endswith("/w") else theirs.pop(path))
        if theirs:
            fail("from_haiku", f"the model has no place for {', '.join(sorted(theirs))}")
        return model


def haiku_path(name):
    """The original's path, below "perceiver_ar", of a parameter here."""
    *module, kind = name.split(".")
    whole = {"embedding": "~/embed", "start": "~/linear", "norm": "layer_norm", "out": "~/logits"}
    parts = {"norm": "layer_norm", "query": "attention/linear", "key": "attention/linear_1", "value": "attention/linear_2",
             "out": "attention/linear_3", "mlp.up": "dense/linear", "mlp.down": "dense/linear_1"}
    if module[0] in whole:
        path = whole[module[0]]
    elif module[0] == "tables":
        path = f"~/embed_{int(module[1]) + 1}"
    else:
        cross = module[0] == "cross"
        layer = "cross_attention" if cross else "self_attention" + (f"_{module[1]}" if module[1] != "0" else "")
        norms = {"source_norm": "layer_norm_1", "mlp.norm": "layer_norm_2" if cross else "layer_norm_1"}
        path = f"~/{layer}/{(parts | norms)['.'.join(module[1 if cross else 2:])]}"
    kinds = {"weight": "scale", "bias": "offset"} if "norm" in path else {"weight": "embeddings" if "embed" in path else "w", "bias": "b"}
    return f"{path}/{kinds[kind]}"


def nucleus(logits, top_p, temperature=1.0):
    """logits / temperature with those outside the likeliest of probability top_p together at -1e30 / temperature."""
    if top_p < 1:
        ordered = logits.sort(-1).values
        first = (torch.softmax(ordered, -1).cumsum(-1) >= 1 - top_p).int().argmax(-1, keepdim=True)
        logits = torch.where(logits >= ordered.gather(-1, first), logits, HIDDEN)
    return logits / temperature
