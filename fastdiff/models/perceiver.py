"""Perceiver (Jaegle et al. 2021a) and Perceiver IO (2021b): a few latents read any input; in IO, queries then read the latents."""

from typing import ClassVar

import torch
from torch import nn

from ..core.check import fail
from ..nn import MLP, CrossAttention, FourierCrossAttention, Linear, SelfAttention, foreign
from ..ops.fourier_cross_attend.reference import features
from .model import Model, cut_normal, initialize_linear

EPS = 1e-5


class Read(nn.Module):
    """An attention to something else, then an MLP, if there is one."""

    def __init__(self, attention, dim, mlp_ratio, activation):
        super().__init__()
        self.attention = attention
        self.mlp = MLP(dim, mlp_ratio * dim, activation=activation, eps=EPS) if mlp_ratio else None

    def forward(self, z, *source):
        z = self.attention(z, *source)
        return z if self.mlp is None else self.mlp(z)


class OwnAttention(nn.Module):
    """z + W_o attention(W_q LN(z), W_k LN(z), W_v LN(z)) where values have a width of their own."""

    def __init__(self, dim, **options):
        super().__init__()
        self.norm, self.cross = nn.LayerNorm(dim, EPS), CrossAttention(dim, dim, norm=False, source_norm=False, residual=False, **options)

    def forward(self, z):
        x = self.norm(z)
        return z + self.cross(x, x)


class Layer(nn.Module):
    """Self-attention of the latents, then an MLP."""

    def __init__(self, dim, mlp_ratio, activation, options):
        super().__init__()
        self.attention = OwnAttention(dim, **options) if "value_width" in options else SelfAttention(dim, eps=EPS, **options)
        self.mlp = MLP(dim, mlp_ratio * dim, activation=activation, eps=EPS)

    def forward(self, z):
        return self.mlp(self.attention(z))


def _blocks(blocks, layers, *options):
    return nn.ModuleList(nn.Sequential(*(Layer(*options) for _ in range(layers))) for _ in range(blocks))


@torch.no_grad()
def _initialize(model, tables):
    """Matrices normal, cut at two standard deviations, of variance 1 / fan-in; tables the same of standard deviation 0.02."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            initialize_linear(m)
    for table in tables:
        cut_normal(table, 0.02)


class Perceiver(Model):
    """Class logits of an image or a video: latents read its pixels and their Fourier features again and again.

    Shapes   image (B, channels, *grid) with `axes` axes (2 or 3) of any sizes -> (B, classes)
    Options  passes: of a read and a block of `layers` layers. reads, blocks: how many of them have weights of their own; pass i uses
             number min(i, reads - 1) and min(i, blocks - 1). bands, max_freq, order: of the features, as in
             `fastdiff.ops.fourier_cross_attend`; max_freq is the resolution. read, layer: options of the attentions (heads, width, bias,
             out_bias of `nn.FourierCrossAttention`, `nn.SelfAttention`). activation, mlp_ratio: of every MLP. head_norm: before the head
    Source   Jaegle et al. 2021a, sections 3 and 4.1
    """

    CONFIGS: ClassVar = {"imagenet": {}}

    def __init__(self, *, channels=3, classes=1000, axes=2, latents=512, dim=1024, passes=8, reads=2, layers=6, blocks=1, bands=64,
                 max_freq=224.0, order="kind", read=None, layer=None, activation="gelu_tanh", mlp_ratio=1, head_norm=False):
        super().__init__()
        self.passes = passes
        self.latents = nn.Parameter(torch.empty(latents, dim))
        fourier = dict(bands=bands, max_freq=max_freq, axes=axes, order=order, eps=EPS) | (read or dict(heads=1))
        self.reads = nn.ModuleList(Read(FourierCrossAttention(dim, channels, **fourier), dim, mlp_ratio, activation) for _ in range(reads))
        self.blocks = _blocks(blocks, layers, dim, mlp_ratio, activation, layer or dict(heads=8))
        self.norm, self.head = nn.LayerNorm(dim, EPS) if head_norm else nn.Identity(), nn.Linear(dim, classes)
        _initialize(self, (self.latents,))

    def forward(self, image):
        z = self.latents.expand(image.shape[0], -1, -1)
        for i in range(self.passes):
            z = self.reads[min(i, len(self.reads) - 1)](z, image)
            z = self.blocks[min(i, len(self.blocks) - 1)](z)
        return self.head(self.norm(z.mean(1)))

    @classmethod
    def from_perceiver_pytorch(cls, theirs):
        """A `perceiver_pytorch.Perceiver` with its weights copied; its images are (B, *grid, channels), these (B, channels, *grid).

        Raises   ValueError for attention residuals, no classifier, inverted attention, dropout in training mode, or data that is encoded
                 elsewhere or not on a grid of 2 or 3 axes
        """
        op = "from_perceiver_pytorch: model"
        if theirs.has_attn_residual or isinstance(theirs.to_logits, nn.Identity):
            fail(op, "wants a classifier without attention residuals")
        own = [i for i, layer in enumerate(theirs.layers) if all(layer is not other for other in theirs.layers[:i])]
        reads = [FourierCrossAttention.from_perceiver_pytorch(theirs, i) for i in own]
        first, head = theirs.layers[0], theirs.to_logits[2]
        made = cls(channels=reads[0].key.in_features - theirs.input_axis * (2 * theirs.num_freq_bands + 1), classes=head.out_features,
                   axes=theirs.input_axis, latents=theirs.latents.shape[0], dim=theirs.latents.shape[1], passes=len(theirs.layers),
                   reads=len(own), layers=len(first.self_attns), blocks=len(own), bands=theirs.num_freq_bands,
                   max_freq=float(theirs.max_freq), order="axis", read=_options(reads[0]),
                   layer=_options(SelfAttention.from_perceiver_pytorch(first.self_attns[0][0], residual=True)), activation="geglu",
                   mlp_ratio=first.cross_ff.fn.net[2].in_features // theirs.latents.shape[1], head_norm=True)
        made.to(theirs.latents)
        for i, read, block, mine in zip(own, reads, made.blocks, made.reads, strict=True):
            _take(mine, attention=read)
            _take_geglu(op, mine.mlp, theirs.layers[i].cross_ff)
            for layer, (attention, ff) in zip(block, theirs.layers[i].self_attns, strict=True):
                _take(layer, attention=SelfAttention.from_perceiver_pytorch(attention, residual=True))
                _take_geglu(op, layer.mlp, ff)
        _take(made, norm=theirs.to_logits[1], head=head)
        return _copied(made, latents=theirs.latents)


class PerceiverIO(Model):
    """Latents read an input once; queries read what the latents have made of it.

    Shapes   source: an image (B, channels, *grid) where there are `bands`; tokens (B, N) int64, N <= positions, where there is a
             vocabulary; else rows (B, N, channels). queries (B, K, query_dim), unless the model has its own; key_lengths (B,) hides source
             rows or tokens from there on -> (B, K, outputs), or (B, K, query_dim) if outputs is None, or (B, K, vocabulary)
    Options  passes: times that the `blocks` blocks of `layers` layers follow each other; pass i uses block min(i, blocks - 1).
             queries: how many learned ones, None for given ones, "input" for the pixels with their features. read, layer, decoder: options
             of the attentions (heads, width, value_width, bias, out_bias, residual of `nn.CrossAttention`). activation, mlp_ratio: of
             every MLP; decoder_mlp: the decoder has one. bands, max_freq: as in `fastdiff.ops.fourier_cross_attend`
    Source   Jaegle et al. 2021b, section 3
    """

    CONFIGS: ClassVar = {
        "imagenet": dict(channels=3, bands=64, max_freq=224.0, outputs=1000),
        "language": dict(channels=768, vocabulary=262, positions=2048, latents=256, dim=1280, passes=1, layers=26, queries=2048,
                         query_dim=768, read=dict(heads=8, width=256, value_width=1280), layer=dict(heads=8, width=256, value_width=1280),
                         decoder=dict(heads=8, width=256, value_width=768, residual=False)),
        "optical-flow": dict(channels=64, bands=64, max_freq=(368.0, 496.0), latents=2048, dim=512, passes=1, layers=24, queries="input",
                             query_dim=322, layer=dict(heads=16), decoder=dict(heads=1, width=512, residual=False), outputs=2)}

    def __init__(self, channels, *, outputs=None, vocabulary=None, positions=None, bands=None, max_freq=None, axes=2, latents=512, dim=1024,
                 passes=8, layers=6, blocks=1, queries=1, query_dim=None, read=None, layer=None, decoder=None, activation="gelu_tanh",
                 mlp_ratio=1, decoder_mlp=True):
        super().__init__()
        if queries == "input" and bands is None:
            fail("PerceiverIO", "queries wants a number or None where there are no bands, got 'input'")
        self.passes = passes
        query_dim = dim if query_dim is None else query_dim
        self.latents = nn.Parameter(torch.empty(latents, dim))
        self.embedding = None if vocabulary is None else nn.Embedding(vocabulary, channels)
        self.position = None if vocabulary is None else nn.Parameter(torch.empty(positions, channels))
        self.logit_bias = None if vocabulary is None else nn.Parameter(torch.zeros(vocabulary))
        self.own_queries = queries == "input"
        self.queries = nn.Parameter(torch.empty(queries, query_dim)) if isinstance(queries, int) else None
        read, decoder = dict(eps=EPS) | (read or dict(heads=1)), dict(eps=EPS) | (decoder or dict(heads=1, width=dim))
        attention = (CrossAttention(dim, channels, **dict(width=channels) | read) if bands is None else
                     FourierCrossAttention(dim, channels, bands=bands, max_freq=max_freq, axes=axes, **read))
        self.read = Read(attention, dim, mlp_ratio, activation)
        self.blocks = _blocks(blocks, layers, dim, mlp_ratio, activation, layer or dict(heads=8))
        self.decoder = Read(CrossAttention(query_dim, dim, **decoder), query_dim, mlp_ratio * decoder_mlp, activation)
        self.out = None if outputs is None else Linear(query_dim, outputs)
        _initialize(self, [x for x in (self.latents, self.position, self.queries) if x is not None])

    def forward(self, source, queries=None, key_lengths=None):
        return self.decode(self.encode(source, key_lengths), self._queries(source, queries))

    def encode(self, source, key_lengths=None):
        """The latents (B, latents, dim)."""
        z = self.latents.expand(source.shape[0], -1, -1)
        if self.embedding is not None:
            if source.shape[1] > len(self.position):
                fail("PerceiverIO", f"source wants at most {len(self.position)} tokens, got {source.shape[1]}")
            source = self.embedding(source) + self.position[:source.shape[1]]
        if key_lengths is not None and isinstance(self.read.attention, FourierCrossAttention):
            fail("PerceiverIO", "key_lengths wants None for an image, got a tensor")
        z = self.read(z, source) if key_lengths is None else self.read(z, source, key_lengths)
        for i in range(self.passes):
            z = self.blocks[min(i, len(self.blocks) - 1)](z)
        return z

    def decode(self, z, queries):
        """What queries (B, K, query_dim) read from latents z."""
        y = self.decoder(queries, z)
        if self.embedding is not None:
            return y @ self.embedding.weight.T + self.logit_bias
        return y if self.out is None else self.out(y)

    def _queries(self, source, queries):
        if (queries is None) == (self.queries is None and not self.own_queries):
            fail("PerceiverIO", f"queries wants {'a tensor' if queries is None else 'None'} where the model has "
                                f"{'none' if queries is None else 'its own'}")
        if self.own_queries:
            given = self.read.attention.options
            each = given["max_freq"] if isinstance(given["max_freq"], tuple) else (given["max_freq"],) * (source.dim() - 2)
            return features(source, given["bands"], each, given["order"])
        return queries if self.queries is None else self.queries.expand(source.shape[0], -1, -1)

    @classmethod
    def from_perceiver_pytorch(cls, theirs):
        """A `perceiver_pytorch.PerceiverIO` with its weights copied; queries are given.

        Raises   ValueError for attention residuals, inverted attention, and dropout of the input in training mode
        """
        op = "from_perceiver_pytorch: model"
        if theirs.has_attn_residual or theirs.inverted_cross_attn:
            fail(op, "wants no attention residuals and a softmax over the source")
        if theirs.training and theirs.seq_dropout_prob > 0:
            fail(op, f"wants no dropout of the source, or eval mode, got {theirs.seq_dropout_prob}")
        own = [layer for i, layer in enumerate(theirs.layers) if all(layer is not other for other in theirs.layers[:i])]
        read = CrossAttention.from_perceiver_pytorch(theirs.cross_attend_block.cross_attn, residual=True)
        decoder = CrossAttention.from_perceiver_pytorch(theirs.decoder_cross_attn)
        attentions = [[SelfAttention.from_perceiver_pytorch(a, residual=True) for a, _ in layer.self_attns] for layer in own]
        out = theirs.to_logits if isinstance(theirs.to_logits, nn.Linear) else None
        made = cls(read.key.in_features, outputs=out and out.out_features, latents=theirs.latents.shape[0], dim=theirs.latents.shape[1],
                   passes=len(theirs.layers), layers=len(attentions[0]), blocks=len(own), queries=None, query_dim=decoder.query.in_features,
                   read=_options(read), layer=_options(attentions[0][0]), decoder=_options(decoder), activation="geglu",
                   mlp_ratio=theirs.cross_attend_block.cross_ff.fn.net[2].in_features // theirs.latents.shape[1],
                   decoder_mlp=theirs.decoder_ff is not None).to(theirs.latents)
        _take(made.read, attention=read)
        _take(made.decoder, attention=decoder)
        _take_geglu(op, made.read.mlp, theirs.cross_attend_block.cross_ff)
        for block, layer, loaded in zip(made.blocks, own, attentions, strict=True):
            for mine, (_, ff), attention in zip(block, layer.self_attns, loaded, strict=True):
                _take(mine, attention=attention)
                _take_geglu(op, mine.mlp, ff)
        if theirs.decoder_ff is not None:
            _take_geglu(op, made.decoder.mlp, theirs.decoder_ff)
        if out is not None:
            _take(made, out=out)
        return _copied(made, latents=theirs.latents)

    @classmethod
    def from_transformers(cls, theirs):
        """`transformers`' PerceiverForImageClassificationFourier, whose logits are at query 0, or PerceiverForMaskedLM; weights are copied.

        Raises   ValueError for another model, another activation than gelu, or dropout in training mode
        """
        op, core = "from_transformers", theirs.perceiver
        c, encoder, text = core.config, core.encoder, getattr(theirs, "embedding_decoder", None)
        activations = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
        if c.hidden_act not in activations:
            fail(op, f"model wants one of the activations {', '.join(activations)}, got {c.hidden_act!r}")
        basic = getattr(core.decoder, "decoder", core.decoder)
        if not hasattr(getattr(basic, "output_position_encodings", None), "position_embeddings"):
            fail(op, f"model wants a decoder of learned queries, got a {type(core.decoder).__name__}")
        queries = basic.output_position_encodings.position_embeddings
        decoder = CrossAttention.from_transformers(basic.decoding_cross_attention)
        layers = [foreign.transformers(f"{op}: model", layer) for layer in encoder.self_attends]
        widths = dict(heads=layers[0].heads, width=layers[0].query[0].shape[0], value_width=layers[0].value[0].shape[0])
        if widths["width"] == widths["value_width"]:
            del widths["value_width"]
        common = dict(latents=c.num_latents, dim=c.d_latents, passes=c.num_blocks, layers=len(layers), queries=queries.shape[0],
                      query_dim=queries.shape[1], layer=widths, decoder=_options(decoder), activation=activations[c.hidden_act],
                      mlp_ratio=c.self_attention_widening_factor)
        if {c.cross_attention_widening_factor, basic.decoding_cross_attention.mlp.dense1.out_features // queries.shape[1]} != {
                c.self_attention_widening_factor}:
            fail(op, "model wants one widening factor of all MLPs")
        if text is None:
            read = FourierCrossAttention.from_transformers(core)
            fourier = read.options
            axes = core.input_preprocessor.position_embeddings.num_dimensions
            made = cls(read.key.in_features - axes * (2 * fourier["bands"] + 1), outputs=basic.final_layer.out_features,
                       bands=fourier["bands"], max_freq=fourier["max_freq"], axes=axes, read=_options(read), **common)
            made.to(queries)
            _take(made, out=basic.final_layer)
        else:
            read = CrossAttention.from_transformers(encoder.cross_attention)
            words, places = core.input_preprocessor.embeddings, core.input_preprocessor.position_embeddings
            made = cls(read.key.in_features, vocabulary=words.num_embeddings, positions=places.num_embeddings, read=_options(read),
                       **common)
            made.to(queries)
            _take(made, embedding=words)
            _copied(made, position=places.weight, logit_bias=text.bias)
        _take(made.read, attention=read)
        _take(made.decoder, attention=decoder)
        for mine, other in ((made.read, encoder.cross_attention), (made.decoder, basic.decoding_cross_attention),
                            *zip(made.blocks[0], encoder.self_attends, strict=True)):
            _take(mine.mlp, norm=other.layernorm, up=other.mlp.dense1, down=other.mlp.dense2)
        for mine, other in zip(made.blocks[0], layers, strict=True):
            if isinstance(mine.attention, OwnAttention):
                foreign.copied(mine.attention.cross, query=other.query, key=other.key, value=other.value, out=other.out)
                foreign.copied(mine.attention, norm=other.target_norm)
            else:
                foreign.copied(mine.attention, qkv=other.qkv(), out=other.out, norm=other.target_norm)
        return _copied(made, latents=core.embeddings.latents, queries=queries)


def _options(attention):
    """What an attention module was made with, of what the models let choose."""
    if isinstance(attention, SelfAttention):
        return dict(heads=attention.heads, width=attention.out.in_features, bias=attention.qkv.bias is not None,
                    out_bias=attention.out.bias is not None)
    return dict(heads=attention.options["heads"], width=attention.query.out_features, value_width=attention.value.out_features,
                bias=attention.query.bias is not None, out_bias=attention.out.bias is not None, residual=attention.options["residual"])


def _take(mine, **theirs):
    """The weights of modules with the same names inside."""
    for name, module in theirs.items():
        mine.get_submodule(name).load_state_dict(module.state_dict())


def _take_geglu(op, mine, theirs):
    """A perceiver_pytorch PreNorm of a FeedForward."""
    net = theirs.fn.net
    if theirs.training and len(net) > 3 and net[3].p > 0:
        fail(op, f"wants no dropout, or eval mode, got {net[3].p}")
    _take(mine, norm=theirs.norm, up=net[0], down=net[2])


@torch.no_grad()
def _copied(made, **tables):
    for name, table in tables.items():
        getattr(made, name).copy_(table)
    return made
