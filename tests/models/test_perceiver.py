"""Perceiver and Perceiver IO against perceiver-pytorch and transformers, live, and against the published sizes."""

import pytest
import torch

import fastdiff
from fastdiff.models import Perceiver, PerceiverIO
from fastdiff.ops.fourier_cross_attend import reference


def compare(held, theirs, load, call, given, parameters, mine=lambda out: out):
    """Outputs, gradients of inputs and of `parameters` {name here: name there}, all weights random; the other's own error in float32 is
    measured."""
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0.0, 0.3)
    theirs.eval()

    def run(module, function, dtype, names):
        module.to(dtype).zero_grad()
        inputs = {k: x.to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x for k, x in given.items()}
        out = function(module, inputs)
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)).sum().backward()
        grads = {k: x.grad for k, x in inputs.items() if x.is_floating_point()}
        return out.detach(), grads | {name: module.get_parameter(names[name]).grad.clone() for name in parameters}

    exact, exact_grads = run(theirs, call, torch.float64, parameters)
    with fastdiff.use_backend(None):
        rounded, rounded_grads = run(theirs, call, torch.float32, parameters)
    model = load(theirs.to(held.dtype))
    out, grads = run(model, lambda m, x: mine(m(**x)), held.dtype, dict(zip(parameters, parameters, strict=True)))
    error = lambda a, b: ((a.double() - b).abs().max() / b.abs().max()).item()
    held.outputs(error(rounded, exact), out=(out, exact))
    held.gradients(max(error(rounded_grads[k], x) for k, x in exact_grads.items()), {k: (grads[k], x) for k, x in exact_grads.items()})
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_equals_perceiver_pytorch(perceiver_pytorch, held, tied):
    """Three passes: of three layers, or of one and one that is used twice."""
    theirs = perceiver_pytorch.Perceiver(
        num_freq_bands=4, depth=3, max_freq=10, num_latents=6, latent_dim=24, cross_dim_head=16, cross_heads=2, latent_heads=2,
        latent_dim_head=8, num_classes=7, weight_tie_layers=tied, self_per_cross_attn=2)
    compare(held, theirs, Perceiver.from_perceiver_pytorch, lambda m, x: m(x["image"].movedim(1, -1)), {"image": torch.randn(2, 3, 9, 12)},
            {"latents": "latents", "reads.1.attention.query.weight": "layers.1.cross_attn.fn.to_q.weight",
             "reads.0.mlp.up.weight": "layers.0.cross_ff.fn.net.0.weight",
             "blocks.1.0.attention.out.weight": "layers.1.self_attns.0.0.fn.to_out.weight", "head.weight": "to_logits.2.weight"})


@pytest.mark.parametrize("tied", [False, True])
def test_io_equals_perceiver_pytorch(perceiver_pytorch, held, tied):
    """With and without a decoder's MLP; two blocks, or one that is used twice."""
    theirs = perceiver_pytorch.PerceiverIO(
        depth=2, dim=20, queries_dim=10, logits_dim=5, num_latents=6, latent_dim=24, cross_dim_head=16, cross_heads=2, latent_heads=2,
        latent_dim_head=8, weight_tie_layers=tied, decoder_ff=tied)
    compare(held, theirs, PerceiverIO.from_perceiver_pytorch, lambda m, x: m(x["source"], queries=x["queries"]),
            {"source": torch.randn(2, 30, 20), "queries": torch.randn(2, 8, 10)},
            {"latents": "latents", "read.attention.query.weight": "cross_attend_block.cross_attn.fn.to_q.weight",
             "blocks.0.0.attention.out.weight": "layers.0.self_attns.0.0.fn.to_out.weight",
             "decoder.attention.target_norm.weight": "decoder_cross_attn.norm.weight", "out.weight": "to_logits.weight"})


def config(package, **changes):
    return package.PerceiverConfig(**dict(
        num_latents=6, d_latents=24, num_blocks=2, num_self_attends_per_block=2, num_self_attention_heads=2, num_cross_attention_heads=1,
        num_labels=5, attention_probs_dropout_prob=0.0) | changes)


class Exact(torch.nn.Module):
    """A preprocessor whose places are not rounded to float32."""

    def __init__(self, theirs):
        super().__init__()
        positions = theirs.position_embeddings
        self.bands, self.sizes = positions.num_bands, positions.max_resolution

    def forward(self, image, **_):
        return reference.features(image, self.bands, self.sizes, "kind"), None, None


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_equals_transformers(transformers_perceiver, held, act):
    theirs = transformers_perceiver.PerceiverForImageClassificationFourier(config(transformers_perceiver, hidden_act=act))
    before = theirs.perceiver.input_preprocessor

    def load(theirs):
        theirs.perceiver.input_preprocessor = before
        return PerceiverIO.from_transformers(theirs)

    theirs.perceiver.input_preprocessor = Exact(before)
    attention, layer = "perceiver.encoder.cross_attention.", "perceiver.encoder.self_attends.1."
    compare(held, theirs, load, lambda m, x: m(x["source"]).logits, {"source": torch.randn(2, 3, 12, 16)},
            {"latents": "perceiver.embeddings.latents", "read.attention.value.weight": f"{attention}attention.self.value.weight",
             "read.mlp.down.bias": f"{attention}mlp.dense2.bias", "blocks.0.1.mlp.norm.weight": f"{layer}layernorm.weight",
             "queries": "perceiver.decoder.decoder.output_position_encodings.position_embeddings",
             "out.weight": "perceiver.decoder.decoder.final_layer.weight"}, mine=lambda out: out[:, 0])


@pytest.mark.parametrize("widths", [{}, {"qk_channels": 16, "v_channels": 24}], ids=["one width", "keys 16, values 24"])
def test_language_equals_transformers(transformers_perceiver, held, widths):
    theirs = transformers_perceiver.PerceiverForMaskedLM(config(
        transformers_perceiver, d_model=16, vocab_size=20, max_position_embeddings=12, num_cross_attention_heads=2, **widths))
    compare(held, theirs, PerceiverIO.from_transformers, lambda m, x: m(x["source"]).logits, {"source": torch.randint(0, 20, (2, 12))},
            {"latents": "perceiver.embeddings.latents", "embedding.weight": "perceiver.input_preprocessor.embeddings.weight",
             "position": "perceiver.input_preprocessor.position_embeddings.weight", "logit_bias": "embedding_decoder.bias",
             "blocks.0.0.mlp.up.weight": "perceiver.encoder.self_attends.0.mlp.dense1.weight",
             "decoder.attention.key.weight": "perceiver.decoder.decoding_cross_attention.attention.self.key.weight"})


def test_padding_equals_transformers(transformers_perceiver):
    theirs = transformers_perceiver.PerceiverForMaskedLM(config(transformers_perceiver, d_model=16, vocab_size=20,
                                                                max_position_embeddings=12)).double().eval()
    tokens, lengths = torch.randint(0, 20, (2, 12)), torch.tensor([12, 7])
    mask = (torch.arange(12) < lengths[:, None]).long()
    mine = PerceiverIO.from_transformers(theirs)
    torch.testing.assert_close(mine(tokens, key_lengths=lengths), theirs(tokens, attention_mask=mask).logits, rtol=1e-12, atol=1e-12)


def _millions(make):
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters()) / 1e6


@pytest.mark.parametrize(("cls", "name", "millions"), [(Perceiver, "imagenet", 44.9), (PerceiverIO, "imagenet", 48.44),
                                                       (PerceiverIO, "language", 201.1), (PerceiverIO, "optical-flow", 41.1)])
def test_parameters(cls, name, millions):
    assert _millions(lambda: cls.from_config(name)) == pytest.approx(millions, abs=0.05)


def test_passes_share_weights():
    """The paper's: a read of its own for pass 0, one for all others, one block for all."""
    torch.manual_seed(0)
    model = Perceiver(classes=3, latents=4, dim=16, passes=3, layers=1, bands=2, max_freq=6.0, layer=dict(heads=2))
    image, z = torch.randn(1, 3, 5, 6), model.latents.expand(1, -1, -1)
    for read in (model.reads[0], model.reads[1], model.reads[1]):
        z = model.blocks[0](read(z, image))
    torch.testing.assert_close(model(image), model.head(z.mean(1)), rtol=0, atol=0)


def test_queries_of_the_input():
    """Optical flow: every pixel asks, with its channels and features."""
    torch.manual_seed(0)
    model = PerceiverIO(4, outputs=2, bands=2, max_freq=(6.0, 8.0), latents=5, dim=16, passes=1, layers=1, queries="input", query_dim=14,
                        layer=dict(heads=2), decoder=dict(heads=1, width=16, residual=False))
    image = torch.randn(2, 4, 6, 8)
    out = model(image)
    assert out.shape == (2, 48, 2)
    queries = reference.features(image, 2, (6.0, 8.0), "kind")
    torch.testing.assert_close(model.decode(model.encode(image), queries[:, 7:9]), out[:, 7:9])


def test_a_video():
    model = Perceiver(classes=3, axes=3, latents=4, dim=16, passes=2, layers=1, bands=2, max_freq=6.0, layer=dict(heads=2))
    assert model(torch.randn(2, 3, 2, 5, 6)).shape == (2, 3)


def test_refusals(perceiver_pytorch, transformers_perceiver):
    package = perceiver_pytorch
    options = dict(num_freq_bands=2, depth=1, max_freq=10, num_latents=2, latent_dim=8)
    for changes in (dict(attn_residual=True), dict(final_classifier_head=False)):
        with pytest.raises(ValueError, match="wants a classifier without attention residuals"):
            Perceiver.from_perceiver_pytorch(package.Perceiver(**options, **changes))
    with pytest.raises(ValueError, match=r"wants no dropout, or eval mode, got 0\.5"):
        Perceiver.from_perceiver_pytorch(package.Perceiver(**options, ff_dropout=0.5))
    with pytest.raises(ValueError, match="wants a softmax over the pixels"):
        Perceiver.from_perceiver_pytorch(package.Perceiver(**options, inverted_cross_attn=True))
    with pytest.raises(ValueError, match="wants no dropout of the source"):
        PerceiverIO.from_perceiver_pytorch(package.PerceiverIO(depth=1, dim=8, queries_dim=8, seq_dropout_prob=0.5))
    package = transformers_perceiver
    with pytest.raises(ValueError, match=r"model wants one of the activations gelu, .*, got 'relu'"):
        PerceiverIO.from_transformers(package.PerceiverForImageClassificationFourier(config(package, hidden_act="relu")).eval())
    flow = package.PerceiverForOpticalFlow(config(package, train_size=[6, 8])).eval()
    with pytest.raises(ValueError, match="wants a decoder of learned queries, got a PerceiverOpticalFlowDecoder"):
        PerceiverIO.from_transformers(flow)
    made = PerceiverIO(4, outputs=2, latents=3, dim=8, passes=1, layers=1, queries=None, layer=dict(heads=1))
    with pytest.raises(ValueError, match="queries wants a tensor where the model has none"):
        made(torch.randn(1, 5, 4))
    made = PerceiverIO(4, vocabulary=5, positions=6, latents=3, dim=8, passes=1, layers=1, query_dim=4, layer=dict(heads=1))
    with pytest.raises(ValueError, match="source wants at most 6 tokens, got 7"):
        made(torch.ones(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="queries wants None where the model has its own"):
        made(torch.ones(1, 5, dtype=torch.int64), torch.randn(1, 2, 8))
    made = PerceiverIO(3, outputs=2, bands=2, max_freq=6.0, latents=3, dim=8, passes=1, layers=1, layer=dict(heads=1))
    with pytest.raises(ValueError, match="key_lengths wants None for an image"):
        made(torch.randn(1, 3, 5, 6), key_lengths=torch.tensor([5]))
