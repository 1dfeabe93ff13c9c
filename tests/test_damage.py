"""Only damage is called damage: what is wanting where a file is read is said as it is, and the file is left alone."""

import errno
import os
import pickle
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from minitron_megatron.checkpoints.damage import is_damage
from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.hf_folder import HfFolder
from minitron_megatron.checkpoints.reading import read_metadata
from minitron_megatron.checkpoints.weights import load_weights
from minitron_megatron.config import TrainerConfig
from minitron_megatron.errors import UserError
from minitron_megatron.train import checkpoint
from tests.test_saved import written
from tests.tiny import hf_model, imported

NOT_DAMAGE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    MemoryError(),
    OSError(errno.EMFILE, "Too many open files", "x"),
    OSError(errno.EIO, "Input/output error", "x"),
    PermissionError(errno.EACCES, "Permission denied", "x"),
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3699, unhandled system error"),
    RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    KeyboardInterrupt(),
]
DAMAGE = [
    EOFError("Ran out of input"),
    pickle.UnpicklingError("invalid load key"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
    RuntimeError("PytorchStreamReader failed reading zip archive: failed finding central directory"),
    KeyError("storage"),
]


@pytest.mark.parametrize(
    "error", [*NOT_DAMAGE, *DAMAGE], ids=lambda error: f"{type(error).__name__}: {str(error)[:30]}"
)
def test_what_says_that_a_file_is_damaged(error):
    assert is_damage(error) == (error in DAMAGE)


def wrapped(error: BaseException) -> CheckpointException:
    """As torch's distributed reading passes it on."""
    return CheckpointException("read", {1: (EOFError("it followed"), None), 2: (error, None)})


@pytest.mark.parametrize("error", NOT_DAMAGE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("through_torch", [False, True])
def test_what_is_no_damage_is_raised_as_it_is(tmp_path, monkeypatch, error, through_torch):
    """Of a training checkpoint and of a model's weights; the checkpoint stays where it is."""
    folder = written(tmp_path / "checkpoints", 2)

    def load(*_):
        raise wrapped(error) if through_torch else error

    monkeypatch.setattr(dist_checkpointing, "load", load)
    monkeypatch.setattr(checkpoint, "_state", lambda *_, **__: {})
    with pytest.raises(type(error)) as raised:
        checkpoint.load(folder / "step_00000002", [], None, TrainerConfig(parallel_load=False))
    assert raised.value is error and "damaged" not in str(raised.value)
    with pytest.raises(type(error)) as raised:
        load_weights([], tmp_path)
    assert raised.value is error and [path.name for path in folder.iterdir()] == ["step_00000002"]


@contextmanager
def without_descriptors() -> Iterator[None]:
    """This process can open no more files."""
    held, before = [], resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 64, before[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_descriptors_that_are_wanting_damage_no_model(tmp_path):
    """The index of its weights, and a Hugging Face file, which its library calls missing."""
    weights = open_model_folder(imported(hf_model(0, num_hidden_layers=1), tmp_path)).weights
    hf, said = HfFolder(tmp_path / "hf"), []
    file = tmp_path / "hf" / "model.safetensors"
    with without_descriptors():
        for read in (lambda: read_metadata(weights), lambda: hf._names(file)):
            try:
                read()
            except (OSError, UserError) as error:
                said.append((type(error), getattr(error, "errno", None), getattr(error, "filename", None)))
    assert said == [(OSError, errno.EMFILE, str(weights / ".metadata")), (OSError, errno.EMFILE, str(file))]
    os.truncate(file, 100)
    with pytest.raises(UserError, match="is damaged"):
        hf._names(file)
    file.unlink()
    with pytest.raises(UserError, match="is damaged"):
        hf._names(file)
