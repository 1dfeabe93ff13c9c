"""A frozen model's layers in CPU memory: each is copied to the GPU while the one before it computes.

    CPU, pinned   [ layer 0 ][ layer 1 ][ layer 2 ][ layer 3 ]         a flat buffer a layer
    GPU           [ A ][ B ]                                           two buffers as large as the largest layer

    copies    ├ 0 → A ┤├ 1 → B ┤       ├ 2 → A ┤       ├ 3 → B ┤       ├ 0 → A ┤  of the next micro-batch
    compute            ├ layer 0 in A ┤├ layer 1 in B ┤├ layer 2 in A ┤├ layer 3 in B ┤

    2 → A waits until layer 0 has computed (`free`), layer 2 until 2 → A has arrived (`ready`)

The streams wait for one another by events; the host waits for neither. Embedding, final norm, output matrix and buffers stay
where they are, and so do the values: results are the same bit for bit. The layers of all chunks of a rank share A and B.
"""

import logging
import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch

log = logging.getLogger(__name__)
# Where a parameter begins in a flat buffer, in bytes: as torch's allocator aligns tensors, for which kernels are chosen.
ALIGNMENT = 512


def offload_layers(chunks: Sequence[torch.nn.Module]) -> "Offloaded":
    """Move the layers of a rank's model chunks to CPU memory, values and all, and have them come when they run.

    To be called before weights are loaded, which then go to CPU memory at once. The parameters are frozen. What it gives may
    be dropped: hooks of the layers keep it.
    """
    offloaded = Offloaded(chunks)
    if offloaded.on_gpu:
        # What the layers stood in is of use to others as a whole, not in pieces.
        torch.cuda.empty_cache()
    else:
        log.info("distill.teacher_offload=true has no effect: without a GPU the teacher is in CPU memory")
    return offloaded


class _Layer:
    """A layer's parameters in one flat buffer on the CPU, and what they may point to instead."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.parameters = [parameter.requires_grad_(False) for parameter in module.parameters()]
        self.starts, self.bytes = [], 0
        for parameter in self.parameters:
            self.starts.append(self.bytes)
            self.bytes += math.ceil(parameter.nbytes / ALIGNMENT) * ALIGNMENT
        on_gpu = any(parameter.is_cuda for parameter in self.parameters)
        self.memory = self._pinned() if on_gpu else torch.empty(self.bytes, dtype=torch.uint8)
        self.home = self.views(self.memory)
        for parameter, view in zip(self.parameters, self.home, strict=True):
            view.copy_(parameter.data)
        self.point_to(self.home)

    def _pinned(self) -> torch.Tensor:
        """uint8 [bytes] of pages that the GPU reads by itself, for as long as this layer lives. Raises CUDA's error.

        torch's own pinned memory comes in powers of two: 1 GiB for a layer of 550 MB.
        """
        # Whole pages of its own: none may be pinned twice.
        pages = mmap.mmap(-1, self.bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), self.bytes, 0))
        if failed:
            raise torch.cuda.CudaError(failed)
        weakref.finalize(self, _unpin, memory.data_ptr()).atexit = False
        return memory

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The parameters in a flat buffer of at least as many bytes."""
        places = zip(self.parameters, self.starts, strict=True)
        return [memory[at : at + p.nbytes].view(p.dtype).view(p.shape) for p, at in places]

    def point_to(self, views: Sequence[torch.Tensor]) -> None:
        """Have the parameters be these."""
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view


class _Slot:
    """A buffer on the GPU that layers take turns in."""

    def __init__(self, layers: Sequence[_Layer], device: torch.device) -> None:
        self.memory = torch.empty(max(layer.bytes for layer in layers), dtype=torch.uint8, device=device)
        self.views = [layer.views(self.memory) for layer in layers]
        self.layer: int | None = None  # the layer whose weights it has, or will have
        self.ready, self.free = torch.cuda.Event(), torch.cuda.Event()
        # The memory may have been another tensor's, which the compute stream has not done with.
        self.free.record()


class Offloaded:
    """Layers in CPU memory and the two buffers that they run in.

    Layer n's successor is the next of its chunk, and the first after the last: the next micro-batch nearly always begins where
    this one did, and begins at once where its first layer has come during whatever ran between. Of an interleaved pipeline's
    chunks another one may be next; then the guess was in vain, and that chunk's first layer is waited for.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        modules = [list(chunk.decoder.layers) for chunk in chunks]
        device = next(modules[0][0].parameters()).device
        self.on_gpu = device.type == "cuda"
        self.layers = [_Layer(module) for of_chunk in modules for module in of_chunk]
        # The least recently used first.
        self.slots = [_Slot(self.layers, device), _Slot(self.layers, device)]
        self.copies = torch.cuda.Stream()
        if self.on_gpu:
            for slot in self.slots:
                # Whoever gets this memory after us waits for copies under way.
                slot.memory.record_stream(self.copies)
        first = 0
        for of_chunk in modules:
            for place, module in enumerate(of_chunk):
                follows = first + (place + 1) % len(of_chunk)
                module.register_forward_pre_hook(self._before(first + place, follows))
                module.register_forward_hook(self._after(first + place))
            first += len(of_chunk)

    def _before(self, number: int, follows: int) -> Any:
        """What a layer does before it runs: wait for its weights, and ask for the next one's."""

        def hook(*_: Any) -> None:
            slot = self._holding(number)
            slot.ready.wait()
            self.layers[number].point_to(slot.views[number])
            if slot is self.slots[0]:
                self.slots.reverse()
            self._holding(follows)

        return hook

    def _after(self, number: int) -> Any:
        def hook(*_: Any) -> None:
            self._holding(number).free.record()
            self.layers[number].point_to(self.layers[number].home)

        return hook

    def _holding(self, number: int) -> _Slot:
        """The buffer that has a layer's weights, or the one used longest ago with a copy of them under way."""
        found = next((slot for slot in self.slots if slot.layer == number), None)
        if found:
            return found
        slot, memory = self.slots[0], self.layers[number].memory
        with torch.cuda.stream(self.copies):
            self.copies.wait_event(slot.free)
            slot.memory[: len(memory)].copy_(memory, non_blocking=True)
            slot.ready.record()
        slot.layer = number
        return slot


def _unpin(address: int) -> None:
    # A copy may still read from there.
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)
