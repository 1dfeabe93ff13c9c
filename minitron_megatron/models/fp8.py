"""FP8 products, by Transformer Engine: which layers, how tensors are scaled, and where it cannot be.

    delayed      a scale a tensor, from the largest values of past micro-batches     Micikevicius et al., arXiv 2209.05433
    tensorwise   a scale a tensor, from the tensor itself
    blockwise    a scale for 128 numbers of an activation, and 128 × 128 of a weight  DeepSeek-V3, arXiv 2412.19437, section 3.3

A model that is trained keeps its weights in bfloat16 (and float32 in the optimizer) and casts them once a step. A teacher is
frozen: its weights are cast when they are loaded, and nothing else of them is kept. Embedding, norms, attention's inside and the
output matrix are not in FP8; a teacher's output matrix can be (`Fp8Matrix`), since nothing is learned through it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from minitron_megatron.errors import UserError
from minitron_megatron.models.build import check_fused

# Largest number of float8_e4m3fn.
LARGEST = 448.0
# Rows of a matrix that are rounded at once: they are divided in float32.
_ROWS = 8192
# Compute capabilities that have FP8, and that have Transformer Engine's blockwise products.
ADA, HOPPER = (8, 9), (9, 0)


def fp8_fields(scaling: str, *, frozen: bool = False, bf16_layers: int = 0) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig for a model whose layers compute in FP8; none for scaling=none.

    Args:
        scaling: one of config.FP8_SCALINGS.
        frozen: weights are kept in FP8 alone.
        bf16_layers: layers at either end of the model that stay in bfloat16.
    """
    if scaling == "none":
        return {}
    found: dict[str, Any] = {
        # Gradients need a larger range than e4m3 has, unless every block has a scale.
        "fp8": "e4m3" if scaling == "blockwise" else "hybrid",
        "fp8_recipe": scaling,
        "fp8_param": frozen,
    }
    if scaling == "delayed":
        found |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    if bf16_layers:
        found |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": bf16_layers,
            "num_layers_at_end_in_bf16": bf16_layers,
        }
    return found


def check_fp8_device(option: str, scaling: str, engine: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raise UserError where this machine, a model's engine (te or local) or its precision has no FP8."""
    if scaling == "none":
        return
    check_fused(option, scaling, "none", engine, dtype)
    needed = HOPPER if scaling == "blockwise" else ADA
    if torch.cuda.get_device_capability(device) < needed:
        raise UserError(
            f"{option}={scaling} needs a GPU of compute capability {needed[0]}.{needed[1]}, and this is "
            f"{torch.cuda.get_device_name(device)}: use {option}=none"
        )


def check_fp8_matrix_device(option: str, device: torch.device) -> None:
    """Raise UserError where a GPU has no FP8 products. On a CPU they are computed in float32, of the same numbers."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < ADA:
        raise UserError(
            f"{option}=true needs a GPU with FP8, and this is {torch.cuda.get_device_name(device)}: use false"
        )


def delayed_scales(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Scales of a live chunk's delayed scaling and the largest values that they follow from, on the CPU, by module.

    What Transformer Engine itself would write of them is a pickle.
    """
    found = {}
    for name, meta in _delayed(chunk):
        found[f"{name}.products"] = torch.tensor(meta["num_gemms"])
        for way in _WAYS:
            found[f"{name}.{way}.scale"] = meta[way].scale.cpu()
            found[f"{name}.{way}.amax_history"] = meta[way].amax_history.cpu()
    return found


def set_delayed_scales(chunk: torch.nn.Module, scales: dict[str, torch.Tensor]) -> None:
    """Have a chunk that has not run yet go on from these."""
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe = get_fp8_recipe(chunk.config)
    for name, module in chunk.named_modules():
        if f"{name}.products" in scales:
            module.fp8_meta["num_gemms"] = int(scales[f"{name}.products"])
            module.fp8_meta["recipe"] = recipe
            module.init_fp8_meta_tensors(recipe)
            for way in _WAYS:
                held = module.fp8_meta[way]
                held.scale.copy_(scales[f"{name}.{way}.scale"])
                held.amax_history.copy_(scales[f"{name}.{way}.amax_history"])


class ScalesBefore:
    """Delayed scaling's scales of live chunks as they were before a step: one that is not taken leaves none of its values behind.

    A value that is not finite would be the largest of the next 1024 micro-batches.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self.chunks = chunks
        self.held: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []

    @torch.no_grad()
    def remember(self) -> None:
        """Keep them; a chunk that has not run yet has none."""
        metas = [meta[way] for chunk in self.chunks for _, meta in _delayed(chunk) for way in _WAYS]
        self.held = [tensor for meta in metas for tensor in (meta.scale, meta.amax_history)]
        if len(self.kept) != len(self.held):
            self.kept = [torch.empty_like(tensor) for tensor in self.held]
        if self.held:
            torch._foreach_copy_(self.kept, self.held)

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to them, in the memory that graphs know."""
        if self.held:
            torch._foreach_copy_(self.held, self.kept)


_WAYS = ("scaling_fwd", "scaling_bwd")


def _delayed(chunk: torch.nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in chunk.named_modules():
        meta = getattr(module, "fp8_meta", {})
        if all(hasattr(meta.get(way), "amax_history") for way in _WAYS):
            yield name, meta


class Fp8Matrix(NamedTuple):
    """A matrix [n, k] in FP8 with a scale a row."""

    values: torch.Tensor  # float8_e4m3fn [n, k]
    scale: torch.Tensor  # float32 [n, 1]: what values are multiplied by

    @classmethod
    def of(cls, matrix: torch.Tensor) -> "Fp8Matrix":
        """Round a matrix: each row so that its largest number is the largest of FP8."""
        scale = matrix.abs().amax(-1, keepdim=True).float().clamp_min_(1e-30).div_(LARGEST)
        values = torch.empty_like(matrix, dtype=torch.float8_e4m3fn)
        for some, into, by in zip(*(t.split(_ROWS) for t in (matrix, values, scale)), strict=True):
            into.copy_(some / by)
        return cls(values, scale)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [m, k] · matrixᵀ: [m, n] in their dtype, the rows rounded to FP8 too."""
        given = Fp8Matrix.of(rows)
        if rows.is_cuda:
            scales = {"scale_a": given.scale, "scale_b": self.scale.t()}
            return torch._scaled_mm(given.values, self.values.t(), **scales, out_dtype=rows.dtype, use_fast_accum=True)
        exact = torch.mm(given.values.float(), self.values.float().t())
        return (exact * given.scale * self.scale.t()).to(rows.dtype)
