"""The CPU adapter: lets Megatron-core, which addresses CUDA throughout, run unchanged on CPUs over gloo.

This is the only place that knows CPUs. While it is on, `device="cuda"` means the CPU, `Tensor.cuda()` is the identity,
and the torch.cuda functions that Megatron calls have stand-ins. Everything is put back at the end. The device rewriting
holds for the thread that entered it, which is also the one that runs a CPU backward pass.
"""

import contextlib
import functools
import importlib
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def import_megatron(name: str = "") -> Any:
    """megatron.core, or a module of it, without what is imported along with it for nothing.

    Only GPUs run its fused functions, and marking them as such imports torch's compiler: 2 s. Its own switch for that
    (megatron.core.jit.disable_jit_fuser) can be reached only once it has happened, so where there is no GPU torch.compile marks
    nothing meanwhile. Its timers import wandb if there is one: 0.3 s.
    """
    if "megatron.core" not in sys.modules:
        compiler, without_wandb = torch.compile, "wandb" not in sys.modules
        if without_wandb:
            sys.modules["wandb"] = None
        if not torch.cuda.is_available():
            torch.compile = _marks_nothing
        try:
            importlib.import_module("megatron.core")
        finally:
            torch.compile = compiler
            if without_wandb:
                del sys.modules["wandb"]
        if not torch.cuda.is_available():
            importlib.import_module("megatron.core.jit").disable_jit_fuser()
    return importlib.import_module(f"megatron.core.{name}" if name else "megatron.core")


def _marks_nothing(function: Any = None, **_: Any) -> Any:
    """torch.compile for functions that are left as they are."""
    return function if function is not None else lambda given: given


def _is_cuda(device: Any) -> bool:
    if isinstance(device, bool):
        return False
    return isinstance(device, int) or str(device).startswith("cuda")


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device arguments of every torch function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type:
            # Megatron's optimizers and gradient clipping compare this string.
            answer = func(*args, **kwargs)
            return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and len(args) > 1 and not isinstance(args[1], torch.Tensor) and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def without_adapter[**P, T](function: Callable[P, T]) -> Callable[P, T]:
    """For our own functions that run in every layer and name no device: the adapter need not look at their operations."""

    @functools.wraps(function)
    def plain(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return plain


class _Stream:
    """A CUDA stream's place: CPU work is in order already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = CPU

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def wait_stream(self, _: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, _: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, _: Any = None) -> "_Event":
        """An event that has happened."""
        return _Event()


class _Event:
    """A CUDA event's place."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, _: Any = None) -> None:
        """It has happened."""

    def wait(self, _: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It has happened."""
        return True


def _no(*_: Any, **__: Any) -> bool:
    return False


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _stand_ins() -> dict[str, Any]:
    return {
        # On a machine with GPUs, a job on its CPUs must take the same paths as elsewhere.
        "is_available": _no,
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "synchronize": _nothing,
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "set_device": _nothing,
        "empty_cache": _nothing,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": torch.manual_seed,
        "memory_allocated": lambda *_: 0,
    }


def _optimizer_stand_ins(optimizer: type) -> dict[str, Any]:
    """DistributedOptimizer's checkpoint methods, mended for torch's Adam: Megatron means the fused one of the GPU packages.

    Torch's Adam keeps its step count as one state tensor a parameter, made in its first step.
    """
    load_states = "_set_main_param_and_optimizer_states"
    before = {name: getattr(optimizer, name) for name in ("state_dict", "load_state_dict", load_states)}

    def state_dict(self: Any) -> Any:
        # Megatron reads the step out of the state, also when a fresh optimizer prepares to load.
        if not self.optimizer.state:
            for parameter in (p for group in self.optimizer.param_groups for p in group["params"]):
                zeros = {name: torch.zeros_like(parameter, requires_grad=False) for name in self.optimizer_state_keys}
                self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        return before["state_dict"](self)

    def load_state_dict(self: Any, state: Any) -> None:
        before["load_state_dict"](self, state)
        # Megatron gives all parameters one and the same tensor, which each of them would then count up.
        for own in self.optimizer.state.values():
            own["step"] = own["step"].clone()

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # It copies into parameters that require grad. `step` came with load_state_dict: some formats lack it here, and in
        # dp_reshardable it is the fresh optimizer's own zero.
        with torch.no_grad():
            before[load_states](self, model_param, defaultdict(lambda: None, tensors, step=None))

    return {"state_dict": state_dict, "load_state_dict": load_state_dict, load_states: set_states}


def _recomputing(backward: Callable[..., Any]) -> staticmethod:
    """Megatron's backward pass that runs layers again: torch has taken the mode off there."""

    def again(*args: Any) -> Any:
        with _CudaMeansCpu():
            return backward(*args)

    return staticmethod(again)


@contextlib.contextmanager
def adapter() -> Iterator[None]:
    """Run Megatron on the CPU within. Entering it again inside itself is harmless."""
    if _Active.depth:
        _Active.depth += 1
        try:
            yield
        finally:
            _Active.depth -= 1
        return
    import_megatron()
    # It orders kernels of a GPU.
    warnings.filterwarnings(
        "ignore", message="(?s).*recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS"
    )
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random

    changes = [(torch.cuda, name, value) for name, value in _stand_ins().items()]
    changes += [
        (random, "_get_cuda_rng_state", _get_rng_state),
        (random, "_set_cuda_rng_state", _set_rng_state),
    ]
    changes += [
        (DistributedOptimizer, name, value) for name, value in _optimizer_stand_ins(DistributedOptimizer).items()
    ]
    changes += [(random.CheckpointFunction, "backward", _recomputing(random.CheckpointFunction.backward))]
    # Out of the class itself where it is one: a static method has to come back as one.
    before = [(owner, name, vars(owner).get(name, getattr(owner, name))) for owner, name, _ in changes]
    _Active.depth += 1
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        with _CudaMeansCpu():
            yield
    finally:
        _Active.depth -= 1
        for owner, name, value in before:
            setattr(owner, name, value)


class _Active:
    """How many adapters are entered in this process."""

    depth = 0
