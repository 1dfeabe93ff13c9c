"""Forward KL of logits on a GPU: the logits are read twice and the gradient is written once, all sums in float32.

    student, teacher [n, V / tp] ─▶ largest and Σ exp of each row ─▶ over the group: log Z of each row
                                 ─▶ Σ p (log p − log q) of this rank's columns [n], and T (q − p) [n, V / tp]

A program has a row. Plain torch takes some fifteen passes over float32 copies for the same. Padded columns take no part and get
gradient 0.
"""

import torch
import triton
import triton.language as tl

# Columns that a program reads at once.
_BLOCK, _WARPS = 4096, 8


@triton.jit
def _log_sum_exp_parts(
    logits,  # [rows, width], any floating dtype
    highest,  # [rows] float32
    total,  # [rows] float32: Σ exp(x − highest)
    width,
    columns,
    scale,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest = -float("inf")
    summed = 0.0
    for tile in range(TILES):
        column = tile * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * width + column, mask=column < columns, other=-float("inf")).to(tl.float32) * scale
        before = largest
        largest = tl.maximum(largest, tl.max(x, axis=0))
        summed = summed * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), axis=0)
    tl.store(highest + row, largest)
    tl.store(total + row, summed)


@triton.jit
def _forward_kl(
    student,  # [rows, width], any floating dtype
    teacher,
    log_z_student,  # [rows] float32
    log_z_teacher,
    loss,  # [rows] float32
    gradient,  # [rows, width], the student's dtype
    width,
    columns,
    scale,
    temperature,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    log_z_q = tl.load(log_z_student + row)
    log_z_p = tl.load(log_z_teacher + row)
    summed = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        column = tile * BLOCK + tl.arange(0, BLOCK)
        place = row * width + column
        real = column < columns
        log_q = tl.load(student + place, mask=real, other=0.0).to(tl.float32) * scale - log_z_q
        log_p = tl.load(teacher + place, mask=real, other=0.0).to(tl.float32) * scale - log_z_p
        p = tl.exp(log_p)
        summed += tl.where(real, p * (log_p - log_q), 0.0)
        moved = tl.where(real, (tl.exp(log_q) - p) * temperature, 0.0)
        tl.store(gradient + place, moved.to(gradient.dtype.element_ty), mask=column < width)
    tl.store(loss + row, tl.sum(summed, axis=0))


def _tiles(width: int) -> dict[str, int]:
    block = min(_BLOCK, triton.next_power_of_2(width))
    return {"TILES": triton.cdiv(width, block), "BLOCK": block, "num_warps": _WARPS if block > 1024 else 4}


def log_sum_exp_parts(logits: torch.Tensor, columns: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest x = logits / T and Σ exp(x − largest) over `columns` of [n, width]: two float32 [n]; of no columns -inf and 0."""
    rows, width = logits.shape
    highest = torch.full((rows,), -torch.inf, dtype=torch.float32, device=logits.device)
    total = torch.zeros_like(highest)
    if columns == 0:
        return highest, total
    _log_sum_exp_parts[(rows,)](logits, highest, total, width, columns, 1 / temperature, **_tiles(width))
    return highest, total


def forward_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    log_z_student: torch.Tensor,
    log_z_teacher: torch.Tensor,
    columns: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of KL(p ‖ q) and its gradient by the student's logits, without T² and times T as in losses.py.

    Args:
        student, teacher: contiguous logits [n, width], any floating dtypes.
        log_z_student, log_z_teacher: float32 [n], log Σ exp(logits / T) over the whole vocabulary.
        columns: of them are real tokens.
        temperature: T.

    Returns:
        Loss float32 [n], to be summed over the group, and gradient [n, width] in the student's dtype.
    """
    rows, width = student.shape
    loss = torch.empty(rows, dtype=torch.float32, device=student.device)
    gradient = torch.empty_like(student)
    given = (student, teacher, log_z_student, log_z_teacher, loss, gradient, width, columns)
    _forward_kl[(rows,)](*given, 1 / temperature, temperature, **_tiles(width))
    return loss, gradient
