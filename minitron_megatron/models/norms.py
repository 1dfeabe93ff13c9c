"""RMSNorm and LayerNorm for Megatron's local engine: Megatron's own torch wrapper refuses sequence parallelism.

Under sequence parallelism each tensor-parallel rank normalises its own tokens, so the gradients of gain and bias are partial
there; the `sequence_parallel` mark makes Megatron sum them over the tensor-parallel group. Norms of query and key heads
see the rank's own heads only: Megatron sums those too, by `config.qk_layernorm` and their place in the layer.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, chosen by `config.normalization`; parameters replicated over ranks.

    With `config.layernorm_zero_centered_gamma` the gain is `weight` + 1, as in Nemotron's LayerNorm1P.
    """

    def __init__(self, config: "TransformerConfig", hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.rms = config.normalization == "RMSNorm"
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        mean = 0.0 if self.zero_centered else 1.0
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), mean, dtype=config.params_dtype, device=device))
        self.bias = None if self.rms else torch.nn.Parameter(torch.zeros_like(self.weight))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., hidden_size]; the statistics are taken in float32, the result has x's dtype."""
        gain = self.weight + 1 if self.zero_centered else self.weight
        if self.rms:
            return torch.nn.functional.rms_norm(x, gain.shape, gain, self.eps)
        return torch.nn.functional.layer_norm(x, gain.shape, gain, self.bias, self.eps)
