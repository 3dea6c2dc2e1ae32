"""Checkpoints: one safetensors file of tensors and settings, replaced whole or not at all."""

import hashlib
import json
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .core.check import fail


def _digest(tensors, settings):
    seen = hashlib.sha256(settings.encode())
    for name, x in sorted(tensors.items()):
        seen.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        seen.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return seen.hexdigest()


def write(path, tensors, settings):
    """Writes {name: tensor} and settings (anything of JSON) beside `path`, flushes them to the disk, and renames: a kill at any moment
    leaves the old file or the new one."""
    text = json.dumps(settings)
    data = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()},
                {"settings": text, "sha256": _digest(tensors, text)})
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    if hasattr(os, "O_DIRECTORY"):  # the new name too is on the disk
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path):
    """(tensors, settings) of a file of `write`. Raises ValueError naming the file if it is damaged, or was not made by `write`."""
    try:
        with safe_open(path, "pt") as file:
            known = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, UnicodeDecodeError) as error:
        fail("checkpoint", f"{path} is damaged, or no checkpoint: {error}")
    if not {"settings", "sha256"} <= set(known):
        fail("checkpoint", f"{path} has no settings: it was not written by python -m fastdiff train")
    if _digest(tensors, known["settings"]) != known["sha256"]:
        fail("checkpoint", f"{path} is damaged: its contents do not have the checksum that it was written with")
    return tensors, json.loads(known["settings"])
