"""A model's weights on disk: Megatron's distributed checkpoint, written and read one tensor at a time.

Layers are stacked under one key with shape [layers, …]; a file chunk is a block of rows of one layer's tensor, of at most
64 MiB, so that no step holds much more than that. Chunks do not depend on the layout that wrote them:

    key decoder.layers.mlp.linear_fc1.weight  [L, 2*ffn, hidden]      rank 0: every other chunk   (__0_0.distcp)
                                                                      rank 1: the others          (__1_0.distcp)

`write_weights` takes a function that fills each chunk when it is written, `load_model` fills a live sharded model, and
checkpoints/reading.py reads any region of a key. The folder is plain `torch_dist`: megatron.core.dist_checkpointing loads it.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from blake3 import blake3
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.serialization import get_crc32_options, set_crc32_options

from minitron_megatron.checkpoints.copies import by_node, share_of_node
from minitron_megatron.checkpoints.damage import cause_of, is_damage
from minitron_megatron.checkpoints.finite import BLOCK_BYTES as BLOCK_OF_CACHE
from minitron_megatron.checkpoints.finite import first_odd, has_odd
from minitron_megatron.checkpoints.folder import ModelFolder, check_beside, check_space, read_manifest
from minitron_megatron.checkpoints.hf_folder import part_positions
from minitron_megatron.checkpoints.index import short, total_bytes
from minitron_megatron.checkpoints.reading import WeightReader, as_bits, safe_reading
from minitron_megatron.cli.starting import at_work
from minitron_megatron.console import busy, progress
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import Slot, slots
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.deciding import from_rank_zero

# Largest chunk, and all the memory that writing takes.
BLOCK_BYTES = 64 * 2**20
# ‖rounded − exact‖ / ‖exact‖ of a matrix in e4m3, as found for random ones, and what is no rounding any more.
USUAL_ROUNDING, LARGEST_ROUNDING = 0.027, 0.1
# Key of what is not a tensor; in Megatron's format, a list of one object.
COMMON_STATE = "common_state/shard_0_1"


@dataclass(frozen=True)
class Chunk:
    """What is written in one piece: rows `start` to `stop` of a slot's first dimension, stored under `key`.

    `lead` is the slot's place along the leading dimension of stacked layers, empty where layers are not stacked; `whole` is
    the global shape of what is stored under the key.
    """

    slot: Slot
    start: int
    stop: int
    shape: tuple[int, ...]
    key: str
    lead: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Place in the checkpoint tensor."""
        return (*self.lead, self.start, *(0 for _ in self.shape[1:]))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Extent in the checkpoint tensor."""
        return (*(1 for _ in self.lead), *self.shape)


Filler = Callable[[Chunk, torch.Tensor], None]


def chunks(shape: ModelShape, prefix: str = "", padded: bool = True) -> Iterator[Chunk]:
    """Every chunk of a model, in data-flow order, the same for every layout.

    `prefix` goes before every key; without `padded` the vocabulary has its own rows alone.
    """
    itemsize = getattr(torch, shape.dtype).itemsize
    for slot in slots(shape):
        rows, *rest = slot.shape(shape)
        if not padded and "vocab" in slot.row.axes:
            rows = shape.vocab_size
        lead, stacked = slot.lead(shape), slot.stored_shape(shape)[: len(slot.lead(shape))]
        step = max(1, BLOCK_BYTES // (itemsize * torch.Size(rest).numel()))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            size, key = (stop - start, *rest), prefix + slot.key(shape)
            yield Chunk(slot, start, stop, size, key, lead, (*stacked, rows, *rest))


def write_weights(
    folder: Path,
    shape: ModelShape,
    fill: Filler,
    description: str,
    objects: Mapping[str, Any] | None = None,
    pieces: Sequence[Chunk] | None = None,
) -> str:
    """Write a model's weights, every rank its share of the chunks; `fill` is called for one chunk at a time.

    Args:
        folder: the (empty) weights folder.
        shape: the model; its dtype is the dtype on disk.
        fill: writes a chunk's values into the tensor that it is given, of the chunk's shape and the dtype on disk, in memory
            that held another chunk before; padded vocabulary rows must become zero.
        description: what the progress bar is called.
        objects: what else rank 0 writes, by key; Megatron's empty common state if not given.
        pieces: what is written; the model's chunks if not given.

    Returns:
        A digest of the content on rank 0 (and on all others) that does not depend on the number of ranks.
    """
    at_work()
    need = total_bytes(shape)
    folder.mkdir(parents=True, exist_ok=True)
    # Before any rank writes: the first chunks would count as room that is not there.
    from_rank_zero(lambda: check_space(folder, need, str(folder)))
    alone = collectives.world_size() == 1
    mine = _own_share(list(chunks(shape)) if pieces is None else pieces)
    size = sum(torch.Size(chunk.shape).numel() for chunk in mine) * getattr(torch, shape.dtype).itemsize
    with progress(description, size, unit="B") as advance:
        planner = _StreamPlanner(
            mine,
            shape.dtype,
            fill,
            partial(_digest_of_finite, description, shape),
            advance,
            {COMMON_STATE: {}} if objects is None else objects,
        )
        # Nothing ahead of what is being written: one chunk at a time, also where there is a GPU.
        writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
        try:
            with without_crc32():
                dcp.save({}, storage_writer=writer, planner=planner, no_dist=alone)
        except CheckpointException as error:
            # torch wraps what went wrong on each rank: a mistake, a full disk and Ctrl-C have to be told as what they are.
            raise cause_of(error) from error
    if collectives.is_rank_zero():
        _write_backend_file(folder)
    return _content_digest(shape, planner.digests)


def _own_share(pieces: Sequence[Chunk]) -> list[Chunk]:
    """What this rank writes of all chunks."""
    return [chunk for i, chunk in enumerate(pieces) if i % collectives.world_size() == collectives.rank()]


@contextmanager
def without_crc32() -> Iterator[None]:
    """torch.save without the checksum that torch.load never looks at: the digest stands for it, and it takes half as long."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _write_backend_file(folder: Path) -> None:
    """Megatron's note of the format, as its save_config writes it: importing that takes longer than cutting a small model."""
    note = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(note), encoding="utf-8")


def _content_digest(shape: ModelShape, digests: dict[tuple[str, tuple[int, ...]], str]) -> str:
    gathered = collectives.all_gather_objects(digests)
    return _joint_digest(shape, {key: digest for part in gathered for key, digest in part.items()})


def _joint_digest(shape: ModelShape, everything: Mapping[tuple[str, tuple[int, ...]], str]) -> str:
    whole = blake3(repr(sorted(shape.to_dict().items())).encode())
    for key in sorted(everything):
        whole.update(repr((key, everything[key])).encode())
    return "blake3:" + whole.hexdigest()


def _digest_of_finite(description: str, shape: ModelShape, chunk: Chunk, tensor: torch.Tensor) -> str:
    """BLAKE3 of a chunk: as strong as SHA-256 at four times its speed.

    Raises UserError where it has a NaN or an infinity, which is looked for on the way.
    """
    numbers, whole = as_bits(tensor).reshape(-1), blake3()
    step = BLOCK_OF_CACHE // numbers.itemsize
    for start in range(0, len(numbers), step):
        block = numbers[start : start + step]
        whole.update(block.view(np.uint8))
        if has_odd(block):
            row = chunk.start + (start + first_odd(block)) // (len(numbers) // len(tensor))
            raise UserError(
                f"{description}: {_name_of_row(chunk.slot, shape, row)} has a NaN or an infinity: {_ADVICE}"
            )
    return whole.hexdigest()


_ADVICE = "its source is damaged, or of a run that diverged; take another"


def _name_of_row(slot: Slot, shape: ModelShape, row: int) -> str:
    """A row of a slot's tensor as users know it: Hugging Face's tensor, and its row there."""
    for part, name in slot.hf_names().items():
        positions = part_positions(slot, shape, part)
        place = int(np.searchsorted(positions, row))
        if place < len(positions) and positions[place] == row:
            return f"{name}, row {place},"
    return f"{slot.numbered_key()}, row {row},"


class _StreamPlanner(SavePlanner):
    """Plans a rank's chunks and fills each when the writer asks for it, all in the same memory.

    New memory for each chunk would cost a third of a cut: the kernel clears every page of it before its first use. torch's
    writer asks for one chunk at a time, but keeps the last one of every key until its file ends.
    """

    def __init__(
        self,
        pieces: Sequence[Chunk],
        dtype: str,
        fill: Filler,
        digest: Callable[[Chunk, torch.Tensor], str],
        on_chunk: Callable[[int], None],
        objects: Mapping[str, Any],
    ) -> None:
        self.pieces, self.fill, self.digest, self.on_chunk, self.objects = pieces, fill, digest, on_chunk, objects
        self.memory = np.empty(0, np.uint8)
        self.dtype = getattr(torch, dtype)
        self.chunks: dict[MetadataIndex, Chunk] = {}
        self.digests: dict[tuple[str, tuple[int, ...]], str] = {}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        largest = max((torch.Size(chunk.shape).numel() for chunk in self.pieces), default=0)
        self.memory = np.empty(largest * self.dtype.itemsize, np.uint8)
        items = []
        for chunk in self.pieces:
            index = MetadataIndex(chunk.key, torch.Size(chunk.offsets))
            self.chunks[index] = chunk
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)),
                properties=TensorProperties(dtype=self.dtype),
                size=torch.Size(chunk.whole),
            )
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        if collectives.is_rank_zero():
            # Megatron's loader wants its non-tensor state, even an empty one.
            items += [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self.objects]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            state = io.BytesIO()
            torch.save([self.objects[write_item.index.fqn]], state)
            return state
        chunk = self.chunks[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        tensor = torch.frombuffer(self.memory, dtype=self.dtype, count=torch.Size(chunk.shape).numel()).view(
            chunk.shape
        )
        self.fill(chunk, tensor)
        self.digests[(chunk.key, chunk.offsets)] = self.digest(chunk, tensor)
        self.on_chunk(tensor.numel() * tensor.itemsize)
        return tensor.view(chunk.sizes)


def load_model(chunks_of_model: Sequence[torch.nn.Module], folder: ModelFolder, groups: Any = None) -> None:
    """Fill this rank's live model (its pipeline chunks) from a model folder written in any layout."""
    load_weights(chunks_of_model, folder.weights, groups)


def sharded_weights(chunk: torch.nn.Module, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """A live model chunk's parameters for megatron.core.dist_checkpointing, whichever engine it is built of.

    Transformer Engine's extra state (the scales of FP8) is no part of it, so that the other engine reads the same.
    """
    state = chunk.sharded_state_dict(metadata=metadata)
    return {name: tensor for name, tensor in state.items() if not name.endswith("_extra_state")}


def load_weights(chunks_of_model: Sequence[torch.nn.Module], weights: Path, groups: Any = None) -> None:
    """Fill this rank's live model from a distributed checkpoint folder, casting to the model's dtype.

    `groups` are those that the model was built with, if they are not Megatron's own.
    """
    from megatron.core import dist_checkpointing

    at_work()
    # All chunks at once: Megatron checks that together the ranks read every tensor just once.
    metadata = {"dp_cp_group": groups.dp_cp} if groups else None
    wanted = {f"chunk{i}": sharded_weights(chunk, metadata) for i, chunk in enumerate(chunks_of_model)}
    _round_whole(wanted)
    try:
        with busy(f"reading {weights}"), safe_reading():
            loaded = dist_checkpointing.load(wanted, str(weights))
    except CheckpointException as error:
        cause = cause_of(error)
        if isinstance(cause, UserError) or not is_damage(cause):
            raise cause from error
        raise UserError(f"{weights} is damaged ({short(cause)}): make the folder again") from error
    for i, chunk in enumerate(chunks_of_model):
        result = chunk.load_state_dict(loaded[f"chunk{i}"], strict=False)
        missing = [key for key in result.missing_keys if not key.endswith("_extra_state")]
        if missing or result.unexpected_keys:
            raise UserError(f"{weights} does not fit the model: {(missing + list(result.unexpected_keys))[0]}")
        _check_rounding(chunk, loaded[f"chunk{i}"], weights)


@torch.no_grad()
def _check_rounding(chunk: torch.nn.Module, exact: dict[str, Any], weights: Path) -> None:
    """Raise UserError where a matrix that is kept in FP8 is no longer the one that was read."""
    from megatron.core.fp8_utils import is_float8tensor

    for name, parameter in chunk.named_parameters():
        if is_float8tensor(parameter):
            error = rounding_error(parameter.dequantize(), exact[name])
            if not error <= LARGEST_ROUNDING:
                raise UserError(
                    f"{weights}: {name} in FP8 is {error:.0%} off, where e4m3 rounds off {USUAL_ROUNDING:.1%}: its numbers "
                    "are of too many sizes for their scale; use blockwise scaling, or none"
                )


def rounding_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    exact = exact.to(found.device, torch.float32)
    return float(torch.linalg.vector_norm(found.float() - exact) / torch.linalg.vector_norm(exact).clamp_min(1e-30))


def _round_whole(wanted: dict[str, dict[str, Any]]) -> None:
    """Have weights that a model keeps in FP8 read into CPU memory, to be rounded as whole matrices when they are put in place.

    Megatron would read a matrix into FP8 in pieces, a gate and its up projection apart and every chunk of a file, each rounded
    by a scale of its own, where the matrix has one for all: that of the last piece.
    """
    from megatron.core.fp8_utils import is_float8tensor

    for tensor in (tensor for state in wanted.values() for tensor in state.values()):
        if is_float8tensor(tensor.data):
            tensor.data = torch.empty(tensor.data.shape, dtype=tensor.data.dtype, device="cpu")


def verify_digest(folder: ModelFolder) -> None:
    """Read every chunk on every node (each rank its share of them) and compare the content with the manifest's digest.

    What lies beside the weights is compared, too. Raises UserError on every rank where something differs, and where there is a
    NaN or an infinity.
    """
    digests, problem = {}, None
    mine = share_of_node(chunks(folder.shape))
    try:
        check_beside(folder.path, read_manifest(folder.path))
        reader = WeightReader(folder.weights)
        for chunk in mine:
            tensor = reader.read_slot(chunk.slot, folder.shape, chunk.start, chunk.stop)
            digests[(chunk.key, chunk.offsets)] = _digest_of_finite(str(folder.path), folder.shape, chunk, tensor)
    except UserError as error:
        problem = str(error)
    for where, found in by_node(digests, problem).items():
        if _joint_digest(folder.shape, found) != folder.digest:
            at = f" on {where}" if collectives.world_size() > 1 else ""
            raise UserError(
                f"{folder.path}: the weights differ{at} from the digest in manifest.yaml; make the folder again"
            )
