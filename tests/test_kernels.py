"""The GPU's kernels, run by Triton's interpreter on the CPU, equal plain float64 arithmetic."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_commands import TORCHRUN, free_port

ROOT = Path(__file__).parent.parent
SUMS = """
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


FORWARD_KL = """
import torch
from minitron_megatron.distill import kernels

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    # Of a vocabulary over two ranks, with padding; the second may have nothing else.
    for n, vocab, width, temperature in ((3, 5000, 2600, 1.0), (2, 150, 80, 2.5), (2, 64, 64, 0.5)):
        student, teacher = (torch.randn(n, 2 * width).mul(spread).to(dtype) for spread in (3, 4))
        parts, columns = [], [min(width, max(0, vocab - r * width)) for r in (0, 1)]
        for logits in (student, teacher):
            found = [kernels.log_sum_exp_parts(z.contiguous(), c, temperature) for z, c in zip(logits.split(width, 1), columns)]
            parts.append(torch.stack([m + s.log() for m, s in found if (m > -torch.inf).all()]).logsumexp(0))
        log_q, log_p = ((z[:, :vocab].double() / temperature).log_softmax(-1) for z in (student, teacher))
        for z, log_z in zip((student, teacher), parts):
            torch.testing.assert_close(log_z.double(), (z[:, :vocab].double() / temperature).logsumexp(-1), rtol=1e-6, atol=1e-6)
        loss, gradients = 0, []
        for mine, theirs, c in zip(student.split(width, 1), teacher.split(width, 1), columns):
            one, gradient = kernels.forward_kl(mine.contiguous(), theirs.contiguous(), *parts, c, temperature)
            assert gradient.dtype is dtype and (gradient[:, c:] == 0).all()
            loss, gradients = loss + one.double(), [*gradients, gradient[:, :c]]
        torch.testing.assert_close(loss, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-5, atol=1e-6)
        wanted = temperature * (log_q.exp() - log_p.exp())
        # The interpreter cuts bfloat16 off where a GPU rounds it.
        close = {"rtol": 1e-5 if dtype is torch.float32 else 2**-7, "atol": 1e-7}
        torch.testing.assert_close(torch.cat(gradients, 1).double(), wanted, **close)
print("same")
"""


OVER_RANKS = """
import torch
import torch.distributed as dist
from minitron_megatron.distill.losses import _fused_forward_kl

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
# The last: one rank has nothing but padding.
for vocab, width, temperature in ((150, 80, 1.0), (97, 50, 2.0), (64, 64, 0.5)):
    student, teacher = (torch.randn(5, world * width).mul(spread) for spread in (3, 4))
    mine, theirs = (z[:, rank * width : (rank + 1) * width] for z in (student, teacher))
    columns = max(0, min(width, vocab - rank * width))
    loss, gradient = _fused_forward_kl(theirs, columns, temperature, dist.group.WORLD, mine)
    log_q, log_p = ((z[:, :vocab].double() / temperature).log_softmax(-1) for z in (student, teacher))
    wanted = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    whole = torch.zeros(5, world * width, dtype=torch.double)
    whole[:, :vocab] = temperature * (log_q.exp() - log_p.exp())
    torch.testing.assert_close(gradient.double(), whole[:, rank * width : (rank + 1) * width], rtol=1e-5, atol=1e-7)
if rank == 0:
    print("same")
dist.destroy_process_group()
"""


def test_forward_kl_over_ranks_equals_float64(tmp_path):
    """A vocabulary over two processes: its largest logit and its sums come from both."""
    (tmp_path / "check.py").write_text(OVER_RANKS)
    done = subprocess.run(
        [TORCHRUN, "--nproc-per-node", "2", "--master-port", str(free_port()), tmp_path / "check.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("check", [SUMS, FORWARD_KL], ids=["sums", "forward_kl"])
def test_kernels_equal_plain_float64(check):
    """In a process of its own: Triton reads whether to interpret when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", check],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr
