"""What a distillation compares, chosen and checked by numbers alone: a distance between answers, and pairs of states."""

from dataclasses import dataclass
from typing import NamedTuple

from minitron_megatron.config import DistillOptions
from minitron_megatron.errors import UserError


def check_top_k(k: int, vocab_size: int) -> None:
    """Raise UserError where a vocabulary has fewer tokens than are asked for."""
    if k > vocab_size:
        raise UserError(f"distill.top_k={k} is above the vocabulary of {vocab_size}")


@dataclass(frozen=True)
class Divergence:
    """Which distance between teacher and student, with its settings; the words are those of `DistillOptions`."""

    kind: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    top_k: int = 1000
    rest: str = "bucket"

    @classmethod
    def from_options(cls, options: DistillOptions, vocab_size: int) -> "Divergence":
        """What the command line asks for, of models of this vocabulary. Raises UserError."""
        if options.loss == "topk_kl":
            check_top_k(options.top_k, vocab_size)
        return cls(options.loss, options.temperature, options.jsd_beta, options.top_k, options.top_k_rest)


# The state before the first layer. State n is what layer n gives.
EMBEDDINGS = -1


class Pair(NamedTuple):
    """Two states that are compared, by number: EMBEDDINGS, or a layer from 0."""

    student: int
    teacher: int


def chosen_pairs(options: DistillOptions, student_layers: int, teacher_layers: int) -> tuple[Pair, ...]:
    """The states to compare, of models with so many layers; none where the loss is off. Raises UserError."""
    if not options.intermediate:
        return ()
    name, asked = "distill.intermediate_layers", options.intermediate_layers
    pairs = list(asked) if isinstance(asked, list | tuple) else [asked]
    if not all(isinstance(pair, list | tuple) and [type(n) for n in pair] == [int, int] for pair in pairs):
        raise UserError(f"{name}={asked} must be pairs of layer numbers [[student,teacher],…], such as [[-3,-3]]")
    found = [Pair(EMBEDDINGS, EMBEDDINGS)] if options.intermediate_embeddings else []
    for student, teacher in pairs:
        numbers = []
        for who, number, layers in (("student", student, student_layers), ("teacher", teacher, teacher_layers)):
            if not -layers <= number < layers:
                raise UserError(f"{name} has layer {number} of the {who}: use {-layers} to {layers - 1}")
            numbers.append(number % layers)
        found.append(Pair(*numbers))
    if not found:
        raise UserError(
            f"distill.intermediate={options.intermediate:g} has nothing to compare: give {name}= or intermediate_embeddings=true"
        )
    return tuple(found)
