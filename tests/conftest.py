"""Options of the suite: how long it looks, and where."""

import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--deep", action="store_true", help="200 random examples per property instead of a few fixed ones")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the ops under test run")


def pytest_configure(config):
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")
