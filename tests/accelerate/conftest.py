import pytest
import torch

from fastdiff.accelerate import measure
from fastdiff.accelerate.rules import rule


@pytest.fixture(autouse=True)
def _steady():
    """One seed, and one thread: these tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def all_faster(monkeypatch):
    """Whether a replacement is worth it at the sizes of tests would be luck: all are, and small tensors are worth an op."""
    monkeypatch.setattr(rule, "FROM", dict.fromkeys(rule.FROM, (0, 0)))
    monkeypatch.setattr(measure, "not_worth", lambda forward, step: False)


@pytest.fixture
def rin(rin_pytorch):
    """(model, inputs): the learned gains start at 0, so they are drawn anew for every part of the model to reach the output."""
    model = rin_pytorch.RIN(dim=32, image_size=16, patch_size=4, depth=2, latent_self_attn_depth=1, num_latents=8, heads=2, dim_head=16)
    return drawn(model), (torch.randn(2, 3, 16, 16), torch.rand(2))


@pytest.fixture
def perceiver(perceiver_pytorch):
    model = perceiver_pytorch.Perceiver(num_freq_bands=3, depth=2, max_freq=8, num_latents=12, latent_dim=24, latent_heads=3,
                                        latent_dim_head=8, cross_dim_head=16, num_classes=7, weight_tie_layers=True)
    return drawn(model), (torch.randn(2, 9, 10, 3),)


@pytest.fixture
def transformers_classifier(transformers_perceiver):
    """Builds a small PerceiverForImageClassificationFourier; its weights are drawn wide enough to reach the output."""

    def build(**options):
        config = transformers_perceiver.PerceiverConfig(**dict(
            num_latents=6, d_latents=24, num_blocks=2, num_self_attends_per_block=1, num_self_attention_heads=3,
            num_cross_attention_heads=1, num_labels=5, initializer_range=0.2) | options)
        return drawn(transformers_perceiver.PerceiverForImageClassificationFourier(config))

    return build


def drawn(model):
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0.0, 0.2)
    return model.eval()
