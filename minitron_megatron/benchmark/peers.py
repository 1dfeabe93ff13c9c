"""Other software's distillation losses, to be measured beside ours on the same tensors; none of them is needed for anything else.

ModelOpt (modelopt.torch.distill) and plain torch take whole logits, Liger's chunked loss takes states and heads as ours does.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Peer:
    """A loss to measure.

    Attributes:
        total: makes the summed loss of a case (benchmark/loss.py), with gradients of its states and head.
        package: what has to be there; None for what always is.
        main_grad: the head's gradient is added to a float32 one, as in training.
    """

    total: Callable[[Any], torch.Tensor]
    package: str | None = None
    main_grad: bool = False

    def exists(self) -> bool:
        """Whether it can run here."""
        return self.package is None or can_run(self.package)


def can_run(package: str) -> bool:
    """Whether other software is installed and there is a GPU, for which it is made."""
    return torch.cuda.is_available() and importlib.util.find_spec(package) is not None


def modelopt_loss() -> Any:
    """ModelOpt's forward KL of logits [s, b, V]: gives ([b, s], …)."""
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    return LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1))


def _logits(case: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        teacher = case.teacher @ case.teacher_head.t()
    return case.student @ case.head.t(), teacher


def _modelopt(case: Any) -> torch.Tensor:
    return modelopt_loss()(*_logits(case))[0].sum()


def plain_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Σ KL(p ‖ q) of logits, as anyone would write it."""
    log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


@cache
def _compiled() -> Any:
    return torch.compile(plain_kl)


def _torch_compile(case: Any) -> torch.Tensor:
    return _compiled()(*_logits(case))


def _liger(case: Any) -> torch.Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    rows = case.student.shape[0]
    labels = torch.zeros(rows, dtype=torch.int64, device=case.student.device)
    student, teacher = case.student.reshape(rows, -1), case.teacher.reshape(rows, -1)
    # Hard loss 0, soft loss 1, β = 0: forward KL; its mean over the tokens.
    given = (student, case.head, teacher, case.teacher_head, labels, None, None, 0.0, 1.0, 0.0)
    return LigerFusedLinearJSDFunction.apply(*given) * rows


PEERS = {
    "modelopt": Peer(_modelopt, "modelopt"),
    "torch_compile": Peer(_torch_compile, "triton"),
    "liger": Peer(_liger, "liger_kernel"),
}
