"""Options of the suite: how long it looks, and where; and the packages it looks at, where they are installed."""

import os

import pytest
import torch

from fastdiff.demo import define_torchvision_operators


def pytest_addoption(parser):
    parser.addoption("--deep", action="store_true", help="200 random examples per property instead of a few fixed ones")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the ops under test run")


def pytest_configure(config):
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(items):
    """The longest first, so that several processes end together."""
    items.sort(key=lambda item: item.name != "test_interpreter")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture
def perceiver_pytorch():
    return pytest.importorskip("perceiver_pytorch", reason="perceiver-pytorch is not installed")


@pytest.fixture
def rin_pytorch():
    pytest.importorskip("beartype", reason="rin-pytorch's imports are not installed")
    define_torchvision_operators()
    return pytest.importorskip("rin_pytorch", reason="rin-pytorch is not installed")


@pytest.fixture
def transformers_perceiver():
    """The module that has transformers' Perceivers."""
    define_torchvision_operators()
    return pytest.importorskip("transformers.models.perceiver.modeling_perceiver", reason="transformers is not installed")


@pytest.fixture
def timm_patch_embed():
    define_torchvision_operators()
    return pytest.importorskip("timm.layers", reason="timm is not installed").PatchEmbed


@pytest.fixture
def diffusers_patch_embed():
    return _diffusers("embeddings").PatchEmbed


def _diffusers(part):
    define_torchvision_operators()
    return pytest.importorskip(f"diffusers.models.{part}", reason="diffusers is not installed")


@pytest.fixture
def diffusers_activations():
    return _diffusers("activations")


@pytest.fixture
def diffusers_embeddings():
    return _diffusers("embeddings")


@pytest.fixture
def diffusers_normalization():
    return _diffusers("normalization")
