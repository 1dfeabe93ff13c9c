"""What this machine gives at the most: matrix products, memory, links. The other measurements are to be read against these."""

import torch
import torch.distributed as dist

from minitron_megatron.benchmark.common import seconds
from minitron_megatron.config import BenchmarkConfig
from minitron_megatron.models.build import model_dtype
from minitron_megatron.models.fp8 import ADA
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.precision import Products, measure

# Rows and columns of a product, on a GPU and on a CPU; numbers of a tensor that is copied or summed over ranks.
SIDE, SIDE_ON_CPU = 8192, 1024
COPIED, COPIED_ON_CPU = 2**29, 2**24
# Tokens, inputs and outputs of a linear layer: a feed-forward matrix of SmolLM2-135M.
LINEAR = (1024, 576, 1536)


def ceilings(cfg: BenchmarkConfig, layout: Layout) -> dict[str, float]:
    """TFLOP/s of a square product in the model's dtype (and in FP8), GB/s of a copy, and of an all-reduce over the job.

    On CPUs also GFLOP/s of one thread in the three products of a linear layer, in both dtypes: what `precision=auto` goes by.
    """
    on_gpu, here = torch.cuda.is_available(), torch.cuda.current_device()
    side, numbers = (SIDE, COPIED) if on_gpu else (SIDE_ON_CPU, COPIED_ON_CPU)
    dtype = model_dtype(ModelShape.from_dict(cfg.model.sizes("model"), "model"), cfg.precision)
    a, b = (torch.randn(side, side, device=here).to(dtype) for _ in range(2))
    flops = 2 * side**3 / 1e12
    found = {"product_side": side, "product_tflops": flops / seconds(lambda: a @ b, cfg.repeats)}
    if on_gpu and torch.cuda.get_device_capability() >= ADA:
        one = torch.ones((), device=here)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)

        def fp8() -> torch.Tensor:
            return torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        found["fp8_product_tflops"] = flops / seconds(fp8, cfg.repeats)
    if not on_gpu:
        products = measure(LINEAR)
        found |= {f"{name}, {dtype}, gflops": rate for dtype, of in products.items() for name, rate in of.items()}
        found["bfloat16_over_float32"] = Products(products, "here").gain
    source, target = (torch.empty(numbers, dtype=torch.bfloat16, device=here) for _ in range(2))
    moved = 2 * source.numel() * source.itemsize / 1e9
    found["copy_gb_s"] = moved / seconds(lambda: target.copy_(source), cfg.repeats)
    if layout.world_size > 1:
        source.zero_()
        # What each rank sends in a ring.
        sent = 2 * (layout.world_size - 1) / layout.world_size * source.numel() * source.itemsize / 1e9
        found["all_reduce_gb_s"] = sent / seconds(lambda: dist.all_reduce(source), cfg.repeats)
    return found
