"""Accelerated models under DDP and FSDP2, before and after wrapping, on two processes."""

import copy
import os
import socket
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastdiff
from fastdiff.accelerate.rules import Replaced


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv1d(8, 8, 1))
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        y = self.block(x).transpose(1, 2)
        return self.attend(y, y, y, need_weights=False)[0]


def gradients(model, wrapped, x):
    wrapped(x).square().mean().backward()
    return {name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone() for name, p in model.named_parameters()}


def sharded(model):
    for part in (model.block, model.attend, model):
        fully_shard(part, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    return model


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, data = Model(), torch.randn(2, 3, 8, 9)
    mine = data[dist.get_rank()]
    expected = gradients(model, model, data.flatten(0, 1))
    model.zero_grad()
    for wrap in (DistributedDataParallel, sharded):
        for first in (True, False):
            inner = copy.deepcopy(model)
            if first:
                assert len(fastdiff.accelerate(inner, show=False).replaced) == 2
            outer = wrap(inner)
            if not first:
                assert len(fastdiff.accelerate(outer, show=False).replaced) == 2
            assert sum(isinstance(m, Replaced) for m in outer.modules()) == 2
            inner.zero_grad()
            torch.testing.assert_close(gradients(inner, outer, mine), expected)
            classes = [type(m).__name__ for m in fastdiff.restore(outer).modules()]
            assert not any(isinstance(m, Replaced) for m in outer.modules())
            mark = "FSDP" if wrap is sharded else ""
            assert {mark + "Sequential", mark + "MultiheadAttention", mark + "Model"} < set(classes), classes
            inner.zero_grad()
            torch.testing.assert_close(gradients(inner, outer, mine), expected)
            assert list(inner.state_dict()) == list(model.state_dict())
    dist.destroy_process_group()


def test_two_processes():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", OMP_NUM_THREADS="1")
    runs = [subprocess.Popen([sys.executable, __file__], env=world | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
            for rank in range(2)]
    try:
        for run in runs:
            assert not run.wait(300), run.stderr.read()
    finally:
        for run in runs:
            run.kill()
            run.stderr.close()


if __name__ == "__main__":
    main()
