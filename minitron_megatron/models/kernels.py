"""Losses of logits on a GPU, by Triton: each row is read twice and its gradient written once, in place; sums are float32.

    logits [n, V / tp] ─▶ row_sums, _pair_sums: largest and Σ exp of each row ─▶ over the group: log Z
                       ─▶ kl_, reverse_kl_, cross_entropy_: loss [n]; the logits become the gradient

A row of forward KL is shared out over several programs, so that a few rows keep the GPU busy too. Plain torch takes some fifteen
passes over float32 copies for the same. Exponentials and logarithms are to the base 2, which is what the hardware has. Padded
columns take no part and get gradient 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# Adds a tensor over the ranks that share a vocabulary, in place.
Summed = Callable[[torch.Tensor], torch.Tensor]
# Columns that a program reads at once, its warps, and how often it does so in kernels that share a row out; tuned on an H200.
_BLOCK, _WARPS, _TILES = 4096, 4, 8


@triton.jit
def _sums_of(x, largest, summed):
    """Running largest and Σ 2^(x − largest) of a row, with one more tile of it."""
    before = largest
    largest = tl.maximum(largest, tl.max(x, axis=0))
    # Where all is padding so far, nothing is added, rather than ∞ − ∞.
    safe = tl.where(largest == -float("inf"), 0.0, largest)
    return largest, summed * tl.exp2(before - safe) + tl.sum(tl.exp2(x - safe), axis=0)


@triton.jit
def _row_sums(
    logits,  # [rows, width], any floating dtype
    highest,  # [rows] float32: the largest x = logits · scale
    total,  # [rows] float32: Σ 2^(x − highest)
    moment,  # [rows] float32: Σ 2^(x − highest) (x − highest)
    best,  # [rows] int32: column of the largest, of several the first
    width,
    columns,
    scale,
    MEASURE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = -float("inf")
    summed = 0.0
    weighted = 0.0
    place = 0
    for tile in range(TILES):
        column = tile * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * width + column, mask=column < columns, other=-float("inf")).to(tl.float32) * scale
        if MEASURE:
            here = tl.max(x, axis=0)
            first = tl.min(tl.where(x == here, column, 2147483647), axis=0)
            place = tl.where(here > largest, first, place)
            after = tl.maximum(largest, here)
            shift = tl.where(largest == -float("inf"), 0.0, largest - after)
            weighted = tl.exp2(shift) * (weighted + shift * summed)
            away = tl.where(column < columns, x - after, 0.0)
            weighted += tl.sum(tl.where(column < columns, tl.exp2(away) * away, 0.0), axis=0)
        largest, summed = _sums_of(x, largest, summed)
    tl.store(highest + row, largest)
    tl.store(total + row, summed)
    if MEASURE:
        tl.store(moment + row, weighted)
        tl.store(best + row, place)


@triton.jit
def _pair_sums(
    student,  # [rows, width], any floating dtype
    teacher,  # [rows, width]
    parts,  # [rows, 4, PARTS] float32: of each part of the columns the student's largest and Σ 2^(x − largest), the teacher's
    width,
    columns,
    scale,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_largest = -float("inf")
    q_summed = 0.0
    p_largest = -float("inf")
    p_summed = 0.0
    for tile in range(TILES):
        column = (part * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        real = column < columns
        place = row * width + column
        q = tl.load(student + place, mask=real, other=-float("inf"), eviction_policy="evict_last")
        p = tl.load(teacher + place, mask=real, other=-float("inf"), eviction_policy="evict_last")
        q_largest, q_summed = _sums_of(q.to(tl.float32) * scale, q_largest, q_summed)
        p_largest, p_summed = _sums_of(p.to(tl.float32) * scale, p_largest, p_summed)
    out = parts + row * 4 * PARTS + part
    tl.store(out, q_largest)
    tl.store(out + PARTS, q_summed)
    tl.store(out + 2 * PARTS, p_largest)
    tl.store(out + 3 * PARTS, p_summed)


@triton.jit
def _log_z(parts, PARTS: tl.constexpr):
    """log2 Σ 2^x of a row out of its parts."""
    part = tl.arange(0, PARTS)
    highest = tl.load(parts + part)
    most = tl.max(highest, axis=0)
    return most + tl.log2(tl.sum(tl.load(parts + PARTS + part) * tl.exp2(highest - most), axis=0))


@triton.jit
def _kl(
    student,  # [rows, width], any floating dtype; becomes the gradient
    teacher,  # [rows, width]
    parts,  # [rows, 4, PARTS] float32, of _pair_sums or of the whole group
    log_z_plain,  # [rows] float32, to the base 2: the student's at temperature 1, for cross entropy
    labels,  # [rows] int32: column of the label, below 0 for one of another rank
    weight,  # [rows] float32: what a row's gradient is multiplied by
    loss,  # [rows, programs of a row] float32
    width,
    columns,
    scale,  # log2(e) / temperature
    temperature,
    cross_entropy,  # weight of the labels' cross entropy
    log2_e,
    GRADIENT: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    log_z_q = _log_z(parts + row * 4 * PARTS, PARTS)
    log_z_p = _log_z(parts + (row * 4 + 2) * PARTS, PARTS)
    if GRADIENT:
        of_row = tl.load(weight + row)
        if CROSS_ENTROPY:
            log_z_1 = tl.load(log_z_plain + row)
            label = tl.load(labels + row)
    summed = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        column = (part * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        place = row * width + column
        real = column < columns
        z = tl.load(student + place, mask=real, other=0.0, eviction_policy="evict_first").to(tl.float32)
        t = tl.load(teacher + place, mask=real, other=0.0, eviction_policy="evict_first").to(tl.float32)
        log_q = z * scale - log_z_q
        log_p = t * scale - log_z_p
        p = tl.exp2(log_p)
        summed += tl.where(real, p * (log_p - log_q), 0.0)
        if GRADIENT:
            moved = (tl.exp2(log_q) - p) * temperature
            if CROSS_ENTROPY:
                certain = tl.where(column == label, 1.0, 0.0)
                moved += cross_entropy * (tl.exp2(z * log2_e - log_z_1) - certain)
            moved = tl.where(real, moved * of_row, 0.0)
            moved = moved.to(student.dtype.element_ty)
            tl.store(student + place, moved, mask=column < width, eviction_policy="evict_first")
    tl.store(loss + row * tl.num_programs(1) + part, tl.sum(summed, axis=0))


@triton.jit
def _reverse_kl(
    student,  # as in _kl
    teacher,
    log_z_student,
    log_z_teacher,
    log_z_plain,
    labels,
    weight,
    loss,  # [rows] float32, to the base 2: made without GRADIENT, over the whole vocabulary with it
    width,
    columns,
    scale,
    temperature,
    cross_entropy,
    log2_e,
    GRADIENT: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    log_z_q = tl.load(log_z_student + row)
    log_z_p = tl.load(log_z_teacher + row)
    if GRADIENT:
        of_row = tl.load(weight + row)
        whole = tl.load(loss + row)
        if CROSS_ENTROPY:
            log_z_1 = tl.load(log_z_plain + row)
            label = tl.load(labels + row)
    summed = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        column = tile * BLOCK + tl.arange(0, BLOCK)
        place = row * width + column
        real = column < columns
        z = tl.load(student + place, mask=real, other=0.0).to(tl.float32)
        log_q = z * scale - log_z_q
        log_p = tl.load(teacher + place, mask=real, other=0.0).to(tl.float32) * scale - log_z_p
        q = tl.exp2(log_q)
        if GRADIENT:
            # The loss is kept to the base 2: ln 2 = 1 / log2(e) makes it natural.
            moved = q * (log_q - log_p - whole) * (temperature / log2_e)
            if CROSS_ENTROPY:
                certain = tl.where(column == label, 1.0, 0.0)
                moved += cross_entropy * (tl.exp2(z * log2_e - log_z_1) - certain)
            moved = tl.where(real, moved * of_row, 0.0)
            tl.store(student + place, moved.to(student.dtype.element_ty), mask=column < width)
        else:
            summed += tl.where(real, q * (log_q - log_p), 0.0)
    if not GRADIENT:
        tl.store(loss + row, tl.sum(summed, axis=0))


@triton.jit
def _cross_entropy(
    student,  # [rows, width], any floating dtype; becomes the gradient
    log_z,  # [rows] float32, to the base 2
    labels,  # [rows] int32: column of the label, below 0 for one of another rank
    weight,  # [rows] float32
    width,
    columns,
    log2_e,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    log_z_q = tl.load(log_z + row)
    label = tl.load(labels + row)
    of_row = tl.load(weight + row)
    for tile in range(TILES):
        column = tile * BLOCK + tl.arange(0, BLOCK)
        place = row * width + column
        real = column < columns
        z = tl.load(student + place, mask=real, other=0.0).to(tl.float32)
        moved = (tl.exp2(z * log2_e - log_z_q) - tl.where(column == label, 1.0, 0.0)) * of_row
        tl.store(student + place, tl.where(real, moved, 0.0).to(student.dtype.element_ty), mask=column < width)


def _tiles(width: int) -> dict[str, int]:
    block = min(_BLOCK, triton.next_power_of_2(width))
    return {"TILES": triton.cdiv(width, block), "BLOCK": block, "num_warps": _WARPS}


class RowSums(NamedTuple):
    """Of rows of x = logits · log2(e) / T over this rank's columns, float32 [n] each (`best` int32); of no columns -inf and 0."""

    highest: torch.Tensor  # the largest x
    total: torch.Tensor  # Σ 2^(x − highest)
    moment: torch.Tensor | None  # measured: Σ 2^(x − highest) (x − highest)
    best: torch.Tensor | None  # measured: column of the largest, of several the first


class Gradient(NamedTuple):
    """What the gradient that takes the logits' place is of: Σ weight · (T² distance + cross_entropy · cross entropy)."""

    weight: torch.Tensor  # float32 [n]
    cross_entropy: float = 0.0
    labels: torch.Tensor | None = None  # int32 [n]: the label's column, below 0 for one of another rank
    log_z_plain: torch.Tensor | None = None  # float32 [n] to the base 2, at temperature 1


def row_sums(logits: torch.Tensor, columns: int, temperature: float, *, measure: bool = False) -> RowSums:
    """The sums over the first `columns` of contiguous logits [n, width]; `measure` for all of them."""
    rows, width = logits.shape
    highest = torch.full((rows,), -torch.inf, dtype=torch.float32, device=logits.device)
    total = torch.zeros_like(highest)
    found = RowSums(
        highest,
        total,
        torch.zeros_like(highest) if measure else None,
        torch.zeros(rows, dtype=torch.int32, device=logits.device) if measure else None,
    )
    if columns:
        _row_sums[(rows,)](logits, *found, width, columns, LOG2_E / temperature, measure, **_tiles(width))
    return found


def kl_(
    student: torch.Tensor,
    teacher: torch.Tensor,
    log_z: tuple[torch.Tensor, torch.Tensor] | None,
    columns: int,
    temperature: float,
    gradient: Gradient | None,
    summed: Summed,
) -> torch.Tensor:
    """KL(p ‖ q), float32 [n] in nats, without T²; the student's logits become the gradient.

    Args:
        student, teacher: contiguous logits [n, width], any floating dtypes.
        log_z: of student and teacher, float32 [n], log2 Σ exp(logits / T) over the whole vocabulary; None where `columns` are
            the whole vocabulary.
        columns: of them are real tokens.
        temperature: T.
        gradient: of what; None leaves the logits as they are.
        summed: adds a tensor [n] over the group, in place.
    """
    rows, width = student.shape
    tiles = _tiles(width)
    programs = triton.next_power_of_2(triton.cdiv(tiles["TILES"], _TILES))
    tiles["TILES"] = triton.cdiv(tiles["TILES"], programs)
    loss = torch.empty(rows, programs, dtype=torch.float32, device=student.device)
    if log_z is None:
        parts = loss.new_empty(rows, 4, programs)
        _pair_sums[(rows, programs)](student, teacher, parts, width, columns, LOG2_E / temperature, programs, **tiles)
    else:
        parts = _whole(log_z)
    given = (student, teacher, parts, *_of_gradient(gradient), loss, width, columns, *_scales(temperature, gradient))
    _kl[(rows, programs)](*given, *_kinds(gradient), parts.shape[-1], **tiles)
    return summed(loss.sum(-1)).mul_(LN_2)


def _whole(log_z: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Sums of rows as _pair_sums gives them, of one part that is everything."""
    q, p = log_z
    return torch.stack((q, torch.ones_like(q), p, torch.ones_like(p)), dim=1)[..., None].contiguous()


def reverse_kl_(
    student: torch.Tensor,
    teacher: torch.Tensor,
    log_z: tuple[torch.Tensor, torch.Tensor],
    columns: int,
    temperature: float,
    gradient: Gradient | None,
    summed: Summed,
) -> torch.Tensor:
    """KL(q ‖ p), as `kl_`; its gradient needs the loss over the whole vocabulary, which takes a pass of its own."""
    rows, width = student.shape
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    given = (student, teacher, *log_z, *_of_gradient(gradient), loss, width, columns, *_scales(temperature, gradient))
    _reverse_kl[(rows,)](*given, False, False, **_tiles(width))
    summed(loss)
    if gradient:
        _reverse_kl[(rows,)](*given, *_kinds(gradient), **_tiles(width))
    return loss.mul_(LN_2)


def cross_entropy_(
    student: torch.Tensor, log_z: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, columns: int
) -> None:
    """The logits become the gradient of Σ weight · cross entropy; `log_z` and `labels` are as in `Gradient`, at temperature 1."""
    rows, width = student.shape
    _cross_entropy[(rows,)](student, log_z, labels, weight, width, columns, LOG2_E, **_tiles(width))


def _of_gradient(gradient: Gradient | None) -> tuple[torch.Tensor | None, ...]:
    return (gradient.log_z_plain, gradient.labels, gradient.weight) if gradient else (None, None, None)


def _scales(temperature: float, gradient: Gradient | None) -> tuple[float, ...]:
    return LOG2_E / temperature, temperature, gradient.cross_entropy if gradient else 0.0, LOG2_E


def _kinds(gradient: Gradient | None) -> tuple[bool, bool]:
    return gradient is not None, gradient is not None and gradient.cross_entropy > 0
