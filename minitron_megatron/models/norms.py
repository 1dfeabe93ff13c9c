"""RMSNorm and LayerNorm for Megatron's local engine: Megatron's own torch wrapper refuses sequence parallelism.

Under sequence parallelism each tensor-parallel rank normalises its own tokens, so the gain's gradient is partial there;
the `sequence_parallel` mark makes Megatron sum it over the tensor-parallel group.
"""

import torch
from megatron.core.transformer import TransformerConfig


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, chosen by `config.normalization`; gain replicated over ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.rms = config.normalization == "RMSNorm"
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.bias = None if self.rms else torch.nn.Parameter(torch.zeros_like(self.weight))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., hidden_size]; the statistics are taken in float32, the result has x's dtype."""
        if self.rms:
            return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
