"""Every public op, on every backend, has every property. Read from the registry: an op is never named here."""

import os
import random

import pytest
import torch

import fastdiff  # noqa: F401  registers the ops
from fastdiff.testing.check import LIMIT, run
from fastdiff.testing.properties import PROPERTIES, dtypes, subjects

EXAMPLES, DEEP = 10, 200
# The Triton interpreter takes about a second where a kernel takes none.
INTERPRETED_EXAMPLES, INTERPRETED_LIMIT = 4, 1 << 10


def pytest_generate_tests(metafunc):
    rows, first = [], {}
    for subject, why in subjects(metafunc.config.getoption("device")):
        if why is None:
            first.setdefault(subject.name, subject.backend)
        for p in PROPERTIES:
            if not p.once or first.get(subject.name) == subject.backend:
                rows.append(pytest.param(subject, p, id=f"{subject.name}-{subject.backend}-{p.name}",
                                         marks=[pytest.mark.skip(reason=why)] if why else []))
    metafunc.parametrize("subject, prop", rows)


def test_contract(subject, prop, request):
    device, deep = request.config.getoption("device"), request.config.getoption("deep")
    takes = dtypes(subject)
    if prop.tiny:
        if torch.float64 not in takes:
            pytest.skip(f"{subject.backend} takes no float64, which numerical derivatives need")
        takes = (torch.float64,)
    count, limit = (DEEP if deep else EXAMPLES), LIMIT
    if subject.backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        limit, count = INTERPRETED_LIMIT, count if deep else INTERPRETED_EXAMPLES
    seed = random.randrange(1 << 30) if deep else None
    result = run(prop.check, subject, count=prop.count(count), dtypes=takes, device=device, limit=limit, tiny=prop.tiny, seed=seed)
    assert not result.failure, result.failure + (f"\n  seed {seed}" if deep else "")
    if result.examples == 0:
        pytest.skip(f"{subject.backend} refuses every example: {result.refused}")
