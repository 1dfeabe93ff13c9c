"""The GPU's reductions, run by Triton's interpreter on the CPU, equal plain float64 sums."""

import os
import subprocess
import sys
from pathlib import Path

CHECK = """
import torch
from minitron_megatron.importance import kernels

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for s, b, heads, d in ((37, 2, 3, 24), (5, 1, 2, 32), (200, 1, 1, 8)):
        a = torch.randn(s, b, heads * d).to(dtype)
        wide = a.double()
        norms = wide.unflatten(-1, (heads, d)).norm(dim=-1)
        for how in ("mean", "l2", "variance"):
            k = 2 if how == "variance" else 1
            for x, width in ((wide, heads * d), (norms, heads)):
                buffer = torch.full((k, kernels.SPLITS, b, width + 7), float("nan"))
                out = buffer[..., 3 : 3 + width]
                if x is wide:
                    kernels.column_sums(a, how, out)
                else:
                    kernels.head_sums(a, d, how, out)
                wanted = {"mean": [x.abs().sum(0)], "l2": [x.square().sum(0)], "variance": [x.sum(0), x.square().sum(0)]}
                torch.testing.assert_close(out.sum(1).double(), torch.stack(wanted[how]), rtol=1e-5, atol=1e-5)
                rest = torch.cat((buffer[..., :3], buffer[..., 3 + width :]), -1)
                assert rest.isnan().all()
        other = torch.randn(s, b, heads * d).to(dtype)
        other[0] = 0
        wanted = torch.nn.functional.cosine_similarity(wide, other.double(), dim=-1)
        torch.testing.assert_close(kernels.cosines(a, other).double(), wanted, rtol=1e-5, atol=1e-6)
print("same")
"""


def test_kernels_equal_plain_sums():
    """In a process of its own: Triton reads whether to interpret when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr
