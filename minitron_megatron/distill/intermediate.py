"""Losses on intermediate states: some of the student's, mapped up by one shared linear, against some of the teacher's.

    embeddings ─▶ layer 0 ─▶ … ─▶ layer n−3 ─▶ … ─▶ head          teacher, frozen, ahead
        │                            │                            hooks keep its states [s, b, teacher hidden] …
        ▼ 1 − cos                    ▼ 1 − cos                    … which go to the pipeline stage of the student's layer
        ▲ W                          ▲ W
    embeddings ─▶ layer 0 ─▶ … ─▶ layer m−3 ─▶ … ─▶ head          student: hooks add the gradient where the state is made

A pipeline's loss function sees the last stage alone. So every stage has its own part of the loss: a function that passes a
state through unchanged and, in the backward pass, adds the gradient of that state's loss to what comes from above, as
Megatron's auxiliary losses of experts do. It is the gradient of a sum over this rank's tokens, which Megatron divides by the
step's global token count with all others. With sequence and context parallelism ranks have different tokens. Without sequence
parallelism every tensor-parallel rank has them all and their whole gradient, as everywhere in the model, and the first alone
counts them.

arXiv 2407.14679, section 3; docs/distillation.md has the equation.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from minitron_megatron.distill.choices import EMBEDDINGS, Pair
from minitron_megatron.models.forward import Batch
from minitron_megatron.parallel import collectives

# States that agree to float32's precision have no loss, and nothing that a ratio with it could mean.
SMALLEST = 1e-6


def distances(student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """1 − cos(W · LN(student), LN(teacher)) per token; LN is a LayerNorm without parameters.

    Args:
        student: [..., student hidden], any floating dtype.
        teacher: [..., teacher hidden].
        weight: W, [teacher hidden, student hidden]; the product is in its dtype, all else in float32 (float64 for float64).

    Returns:
        [...] float32 (or float64), with gradients of student and weight.
    """
    mapped = F.linear(_normalised(student).to(weight.dtype), weight)
    return 1 - F.cosine_similarity(mapped.to(_compute(student)), _normalised(teacher), dim=-1)


def _normalised(states: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(states.to(_compute(states)), states.shape[-1:])


def _compute(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _WithLoss(torch.autograd.Function):
    """A state as it is; backward adds the gradient of `scale` Σ mask · distance, of the state and of the weight.

    Backward works the distance out again, so that of all its tensors only the teacher's state is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, state: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(state, weight, teacher, mask)
        ctx.scale = scale
        return state

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        state, weight, teacher, mask = ctx.saved_tensors
        state, weight = (tensor.detach().requires_grad_() for tensor in (state, weight))
        with torch.enable_grad():
            loss = ctx.scale * (distances(state, teacher, weight) * mask).sum()
        of_state, of_weight = torch.autograd.grad(loss, (state, weight))
        return gradient + of_state, of_weight, None, None, None


class Projection(torch.nn.Module):
    """The shared linear W, [teacher hidden, student hidden], in each model chunk that has a state to compare.

    It begins as the identity where widths are equal, as after a cut of layers alone, and else with normal values of variance
    1 / student hidden, drawn from the seed: the same on every rank.

    `copy` numbers the chunks that have it, of `copies`. Copies are one parameter, as tied embeddings are to Megatron: written
    once (replica), counted once in the gradient norm (`shared`), and in a bucket of its own (`shared_embedding`), so that every
    copy's optimizer state is spread over the data-parallel ranks in the same way.
    """

    def __init__(self, config: Any, teacher_width: int, *, seed: int, copy: int, copies: int) -> None:
        super().__init__()
        width = config.hidden_size
        if width == teacher_width:
            values = torch.eye(width)
        else:
            drawn = torch.randn(teacher_width, width, generator=torch.Generator().manual_seed(seed))
            values = drawn / math.sqrt(width)
        self.copy = copy
        self.weight = torch.nn.Parameter(values.to(config.params_dtype).to(torch.cuda.current_device()))
        # Ranks that have tokens of their own have a part of the gradient: Megatron sums it as that of norms.
        self.weight.sequence_parallel = config.sequence_parallel
        if copies > 1:
            self.weight.shared_embedding = True
            self.weight.shared = copy > 0

    def forward(self) -> torch.Tensor:
        """W. Where weights are gathered during the forward pass, Megatron waits for them when a module is called."""
        return self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoints: one tensor, written by one of all ranks that have it."""
        from megatron.core import parallel_state as ps
        from megatron.core.utils import make_sharded_tensor_for_checkpoint

        replica = (
            self.copy,
            ps.get_tensor_model_parallel_rank(),
            ps.get_data_parallel_rank(with_context_parallel=True),
        )
        name = f"{prefix}weight"
        return {name: make_sharded_tensor_for_checkpoint(self.weight, name, sharded_offsets, replica_id=replica)}


class IntermediateLoss:
    """The intermediate-state losses of a student in training, this rank's part.

    The loss of step k is L_logits + weight · α_k · L_is, where L_is is the mean over the step's tokens of the sum over pairs of
    `distances`, and α_k = L_logits / L_is of step k − 1, both means over the tokens of all ranks, without a gradient. The paper
    recomputes α in each step. The ratio of step k itself is known when most of its backward passes are done, and one of each
    micro-batch would make training depend on how a batch is split; that of the step before does neither. Before its first step,
    and only then, a run does that step's passes once for α, and drops their gradients.
    """

    def __init__(self, pairs: Sequence[Pair], teacher: Sequence[torch.nn.Module], weight: float, seed: int) -> None:
        self.pairs, self.teacher, self.weight, self.seed = tuple(pairs), list(teacher), weight, seed
        self.alpha: float | None = None
        self.watching = False
        # Of each pair: the teacher's states on their own stage; and with their tokens' mask on the student's, in order.
        self.seen: list[deque[torch.Tensor]] = [deque() for _ in self.pairs]
        self.due: list[deque[tuple[torch.Tensor, torch.Tensor]]] = [deque() for _ in self.pairs]
        self.projections: list[Projection] = []

    def attach(self, chunks: Sequence[Any]) -> None:
        """Give the student's chunks their projection, and both models their hooks; before Megatron wraps the chunks."""
        from megatron.core import parallel_state as ps

        config = chunks[0].config
        self.split_tokens = config.sequence_parallel
        self.counts = self.split_tokens or ps.get_tensor_model_parallel_rank() == 0
        self.total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
        teachers = [_place(self.teacher, pair.teacher) for pair in self.pairs]
        students = [_place(chunks, pair.student) for pair in self.pairs]
        held = sorted({chunk for chunk, _ in filter(None, students)})
        everyone = collectives.gather_over_pipeline(
            {"teachers": [t is not None for t in teachers], "students": [s is not None for s in students], "held": held}
        )
        self.stages = [
            tuple(next(n for n, stage in enumerate(everyone) if stage[who][i]) for who in ("teachers", "students"))
            for i in range(len(self.pairs))
        ]
        places = [(n, chunk) for n, stage in enumerate(everyone) for chunk in stage["held"]]
        self.on_stages, mine = len({n for n, _ in places}), ps.get_pipeline_model_parallel_rank()
        self.width, self.student_width = self.teacher[0].config.hidden_size, config.hidden_size
        projections = {}
        for copy, (stage, number) in enumerate(places):
            if stage == mine:
                made = Projection(config, self.width, seed=self.seed, copy=copy, copies=len(places))
                chunks[number].add_module("intermediate_projection", made)
                projections[number] = made
        self.projections = list(projections.values())
        for i, (there, here) in enumerate(zip(teachers, students, strict=True)):
            if there:
                there[1].register_forward_hook(lambda module, args, out, i=i: self._see(i, out))
            if here:
                projection = projections[here[0]]
                here[1].register_forward_hook(lambda module, args, out, i=i, p=projection: self._compare(i, out, p))

    def _see(self, pair: int, out: Any) -> None:
        """A state of the teacher is there."""
        if self.watching:
            self.seen[pair].append(out[0] if isinstance(out, tuple) else out)

    def deliver(self, batches: Sequence[Batch]) -> None:
        """Bring the states that the teacher has made of these micro-batches, in their order, to where they are compared.

        Every stage goes through the same transfers in the same order, each with one sender and one receiver: the earliest that is
        not done has both of them at it, so that none waits for ever.
        """
        from megatron.core import parallel_state as ps

        mine, dtype = ps.get_pipeline_model_parallel_rank(), next(self.teacher[0].parameters()).dtype
        for pair, (source, target) in enumerate(self.stages):
            for batch in batches:
                mask = self._own_tokens(batch["loss_mask"].t())
                state = self.seen[pair].popleft() if source == mine else None
                if source != target:
                    shape = (*mask.shape, self.width)
                    state = collectives.move_between_stages(state, shape, dtype, source=source, target=target)
                if target == mine:
                    self.due[pair].append((state, mask))

    def _own_tokens(self, mask: torch.Tensor) -> torch.Tensor:
        """This rank's part of what there is of each token, [s, b]."""
        from megatron.core import parallel_state as ps

        if not self.split_tokens:
            return mask
        return mask.chunk(ps.get_tensor_model_parallel_world_size())[ps.get_tensor_model_parallel_rank()]

    def _compare(self, pair: int, out: Any, projection: Projection) -> Any:
        """A state of the student is there: it gets its loss, where it will have a gradient.

        Without gradients there is nothing to do: in a validation, and in the first of two passes of a layer that is recomputed.
        Passes with gradients of one chunk are in the order of the micro-batches in every schedule.
        """
        if not torch.is_grad_enabled():
            return None
        from megatron.core.utils import make_viewless_tensor

        state, *rest = out if isinstance(out, tuple) else (out,)
        (teacher, mask), weight = self.due[pair].popleft(), projection()
        with torch.no_grad():
            self.total += (distances(state, teacher, weight) * mask).sum(dtype=torch.float64)
        # Megatron's factor of the main loss is 1 without float16, and sums are divided by the step's tokens with all gradients.
        with_loss = _WithLoss.apply(state, weight, teacher, mask, self.weight * (self.alpha or 0.0))
        # Megatron frees what a stage has sent, which a view does not allow.
        with_loss = make_viewless_tensor(with_loss, requires_grad=True, keep_graph=True)
        return (with_loss, *rest) if isinstance(out, tuple) else with_loss

    def take_sum(self) -> float:
        """Σ mask · distance of this rank's tokens since the last call, of those that it counts for all ranks that have them."""
        total = self.total.item()
        self.total.zero_()
        return total if self.counts else 0.0

    def add_gradients_of_copies(self) -> None:
        """Have one gradient, the sum, in every copy of the projection; after gradients are reduced over data-parallel ranks."""
        gradients = [projection.weight.main_grad for projection in self.projections]
        if self.on_stages > 1:
            here = torch.cuda.current_device()
            shape = (self.width, self.student_width)
            own = sum(gradients, torch.zeros(shape, dtype=torch.float32, device=here))
            total = collectives.sum_over_pipeline(own)
        elif len(gradients) > 1:
            total = torch.stack(gradients).sum(0)
        else:
            return
        for gradient in gradients:
            gradient.copy_(total)

    def next_alpha(self, logits: float, intermediate: float) -> float:
        """Take the step's means over all ranks, for the next step's α; gives the α that this step had (0 in a first pass).

        A loss that is not finite leaves α as it is.
        """
        used = self.alpha or 0.0
        if math.isfinite(logits) and math.isfinite(intermediate):
            self.alpha = logits / intermediate if intermediate > SMALLEST else 0.0
        return used


def _place(chunks: Sequence[Any], state: int) -> tuple[int, torch.nn.Module] | None:
    """(number of the chunk, module) that a state comes out of, where this rank has it."""
    for number, chunk in enumerate(chunks):
        if state == EMBEDDINGS and chunk.pre_process:
            return number, chunk.embedding
        for layer in chunk.decoder.layers:
            if layer.layer_number - 1 == state:
                return number, layer
    return None
