"""What the distillation loss costs with both heads: from final hidden states to gradients of the student's and of its head."""

import statistics
import time
from collections.abc import Callable

import torch

from minitron_megatron.checkpoints.random_model import STANDARD_DEVIATION
from minitron_megatron.config import BenchmarkConfig, HardwareConfig
from minitron_megatron.distill.losses import Divergence, divergence
from minitron_megatron.models.build import check_layout, model_dtype
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.hardware import hardware
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.select import target_shape


def loss_with_heads(cfg: BenchmarkConfig, layout: Layout) -> dict[str, float]:
    """Seconds and memory of forward KL between random heads of `model=` and `target=`, forward and backward, and of its parts.

    The floor of the whole is what the heads' four products take alone, measured: the teacher's and the student's going forward,
    two of the student's going back.
    """
    teacher = ModelShape.from_dict(cfg.model.sizes("model"), "model")
    student = target_shape(teacher, vars(cfg.target), [])
    check_layout(teacher, layout)
    check_layout(student, layout, "the target")
    dtype, width = model_dtype(teacher, cfg.precision), teacher.padded_vocab_size // layout.tensor
    rows, device = cfg.micro_batch_size * cfg.sequence_length, torch.cuda.current_device()
    group = collectives.tensor_parallel_group()

    def drawn(*size: int, spread: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=dtype).mul_(spread)

    heads = {m: drawn(width, m.hidden_size, spread=STANDARD_DEVIATION) for m in (student, teacher)}
    heads[student].requires_grad_()
    states = [(drawn(rows, student.hidden_size).requires_grad_(), drawn(rows, teacher.hidden_size)) for _ in range(2)]
    logits = [drawn(rows, width).requires_grad_(), drawn(rows, width)]

    def kl(of_student: torch.Tensor, of_teacher: torch.Tensor) -> torch.Tensor:
        return divergence(of_student, of_teacher, Divergence(), vocab_size=teacher.vocab_size, group=group)

    def alone(turn: int) -> None:
        logits[0].grad = None
        kl(*logits).sum().backward()

    def whole(turn: int) -> None:
        mine, theirs = states[turn % 2]
        mine.grad = heads[student].grad = None
        with torch.no_grad():
            targets = theirs @ heads[teacher].t()
        kl(mine @ heads[student].t(), targets).sum().backward()

    def products(turn: int) -> None:
        mine, theirs = (t.detach() for t in states[turn % 2])
        weight, gradient = heads[student].detach(), logits[1]
        theirs @ heads[teacher].t(), mine @ weight.t(), gradient @ weight, gradient.t() @ mine

    found = {
        "tokens": rows,
        "loss_alone_seconds": _seconds(alone, cfg.repeats),
        "loss_with_heads_seconds": _seconds(whole, cfg.repeats),
        "products_of_heads_seconds": _seconds(products, cfg.repeats),
    }
    if torch.cuda.is_available():
        # Both logits read and the gradient written, once.
        moved = 3 * logits[0].numel() * logits[0].itemsize
        found["floor_of_loss_alone_seconds"] = moved / (hardware(HardwareConfig()).memory_gb_s * 1e9)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        whole(0)
        found["held_beside_heads_and_states"] = torch.cuda.max_memory_allocated() - before
    return found


def _seconds(work: Callable[[int], None], repeats: int) -> float:
    """Median of some runs, after two to warm up."""
    seconds = []
    for turn in range(repeats + 2):
        torch.cuda.synchronize()
        collectives.barrier()
        began = time.perf_counter()
        work(turn)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])
