"""What the distillation loss costs with both heads, from final hidden states to gradients of the student's and of its head.

Ours and the peers' (ModelOpt, Liger, torch.compile, where they can be imported) take the same random states and heads in the same
run, and are compared with the products of the heads alone, which all have to make, and with float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minitron_megatron.benchmark.checks import source_and_target
from minitron_megatron.benchmark.common import seconds
from minitron_megatron.benchmark.peers import PEERS, Peer
from minitron_megatron.checkpoints.random_model import STANDARD_DEVIATION
from minitron_megatron.config import BenchmarkConfig, HardwareConfig
from minitron_megatron.distill.choices import Divergence
from minitron_megatron.distill.losses import DistillationLoss
from minitron_megatron.models.build import model_dtype
from minitron_megatron.models.fp8 import Fp8Matrix
from minitron_megatron.models.head import LOGITS_BYTES, Head, fused_loss
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.hardware import hardware, peak_flops
from minitron_megatron.parallel.layout import Layout

# Rows that are compared with float64, which cannot hold all logits.
COMPARED = 256


@dataclass
class Case:
    """Random final states [n, 1, hidden] and heads [V / tp, hidden] of both models; the student's have gradients."""

    student: torch.Tensor
    teacher: torch.Tensor
    head: torch.Tensor
    teacher_head: torch.Tensor
    vocab_size: int

    @classmethod
    def drawn(cls, cfg: BenchmarkConfig, layout: Layout) -> "Case":
        """Of `model=` and its `target=`."""
        teacher, student = source_and_target(cfg)
        dtype, width = model_dtype(teacher, cfg.precision), teacher.padded_vocab_size // layout.tensor
        rows, device = cfg.micro_batch_size * cfg.sequence_length, torch.cuda.current_device()

        def normal(*size: int, spread: float = 1.0) -> torch.Tensor:
            return torch.randn(*size, device=device, dtype=dtype).mul_(spread)

        states, heads = [], []
        for shape in (student, teacher):
            states.append(normal(rows, 1, shape.hidden_size))
            heads.append(normal(width, shape.hidden_size, spread=STANDARD_DEVIATION))
        return cls(*states, *heads, teacher.vocab_size).fresh()

    def fresh(self) -> "Case":
        """Without gradients from before."""
        for tensor in (self.student, self.head):
            tensor.requires_grad_()
            tensor.grad = None
        return self

    def first(self, rows: int) -> "Case":
        """Some of the tokens, with heads that share memory and no gradients."""
        some = [tensor.detach() for tensor in (self.student[:rows], self.teacher[:rows], self.head, self.teacher_head)]
        return Case(*some, self.vocab_size).fresh()


def loss_with_heads(cfg: BenchmarkConfig, layout: Layout) -> dict[str, float]:
    """Seconds and GiB of forward KL, forward and backward, of ours and of each peer, and ratios between them."""
    case = Case.drawn(cfg, layout)
    found = {"tokens": len(case.student), **_floors(case, cfg)}
    ours = {
        "ours": Peer(lambda case: _ours(case, case.teacher_head)),
        "ours_half_the_memory": Peer(lambda case: _ours(case, case.teacher_head, LOGITS_BYTES // 4)),
        "ours_teacher_head_fp8": Peer(_with_fp8_head(case)),
        "ours_into_main_grad": Peer(lambda case: _ours(case, case.teacher_head), main_grad=True),
    }
    theirs = PEERS if cfg.peers and layout.tensor == 1 else {}
    for name, peer in {**ours, **theirs}.items():
        found |= {f"{name}_{what}": value for what, value in _measured(peer, case, cfg.repeats).items()}
    for name in PEERS:
        if f"{name}_seconds" in found:
            found[f"{name}_over_ours"] = found[f"{name}_seconds"] / found["ours_seconds"]
    return found


def _ours(case: Case, teacher_head: torch.Tensor | Fp8Matrix, logits_bytes: int = LOGITS_BYTES // 2) -> torch.Tensor:
    group = collectives.tensor_parallel_group()
    loss = DistillationLoss(Head(case.teacher, teacher_head), Divergence(), vocab_size=case.vocab_size, group=group)
    mask = torch.ones(len(case.student), 1, device=case.student.device)
    return fused_loss(Head(case.student, case.head), loss, mask, logits_bytes=logits_bytes).total


def _with_fp8_head(case: Case) -> Callable[[Case], torch.Tensor]:
    rounded = Fp8Matrix.of(case.teacher_head)
    return lambda case: _ours(case, rounded)


def _measured(peer: Peer, case: Case, repeats: int) -> dict[str, float]:
    """Median seconds, GiB beside heads, states and their gradients, and how far gradients are from float64's."""
    if not peer.exists():
        return {}
    if peer.main_grad:
        case.head.main_grad = torch.zeros(case.head.shape, device=case.head.device)

    def once() -> None:
        case.fresh()
        peer.total(case).backward()

    found = {"seconds": seconds(once, repeats)}
    if torch.cuda.is_available():
        case.fresh()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        peer.total(case).backward()
        # With a float32 gradient the head's own is empty, and was made when nothing else was there any more.
        kept = sum(t.grad.numel() * t.grad.itemsize for t in (case.student, *([] if peer.main_grad else [case.head])))
        found["gib"] = (torch.cuda.max_memory_allocated() - before - kept) / 2**30
    case.fresh()
    if peer.main_grad:
        del case.head.main_grad
    elif collectives.world_size() == 1:
        found |= _errors(peer, case)
    return found


def _errors(peer: Peer, case: Case) -> dict[str, float]:
    """‖found − exact‖ / ‖exact‖ of both gradients, and the loss's relative error, on the first tokens."""
    some = case.first(COMPARED)
    total = peer.total(some)
    total.backward()
    states, head, teacher, teacher_head = (
        t.detach().double() for t in (some.student, some.head, some.teacher, some.teacher_head)
    )
    log_q = torch.log_softmax((states[:, 0] @ head.t())[:, : case.vocab_size], -1)
    log_p = torch.log_softmax((teacher[:, 0] @ teacher_head.t())[:, : case.vocab_size], -1)
    exact = (log_p.exp() * (log_p - log_q)).sum()
    gradient = log_q.exp_().sub_(log_p.exp_())
    of_states, of_head = gradient @ head[: case.vocab_size], gradient.t() @ states[:, 0]
    return {
        "loss_error": float((total.double() - exact).abs() / exact),
        "states_gradient_error": float((some.student.grad[:, 0].double() - of_states).norm() / of_states.norm()),
        "head_gradient_error": float((some.head.grad[: case.vocab_size].double() - of_head).norm() / of_head.norm()),
    }


def _floors(case: Case, cfg: BenchmarkConfig) -> dict[str, float]:
    """What cannot be less: the heads' four products by arithmetic and as measured, the logits through memory."""
    states, theirs = case.student.detach()[:, 0], case.teacher[:, 0]
    rows, (width, hidden) = len(states), case.head.shape
    logits = torch.empty(rows, width, dtype=states.dtype, device=states.device)

    def products() -> None:
        torch.mm(theirs, case.teacher_head.t(), out=logits)
        torch.mm(states, case.head.detach().t(), out=logits)
        logits @ case.head.detach(), logits.t() @ states

    found = {"products_of_heads_seconds": seconds(products, cfg.repeats)}
    if torch.cuda.is_available():
        gpu = hardware(HardwareConfig())
        flops = 2 * rows * width * (case.teacher_head.shape[1] + 3 * hidden)
        found["floor_of_products_seconds"] = flops / peak_flops(gpu, states.dtype)
        # Both logits read and the gradient written, once.
        found["floor_of_logits_seconds"] = 3 * logits.numel() * logits.itemsize / (gpu.memory_gb_s * 1e9)
    return found
