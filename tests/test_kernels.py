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


LOSSES = """
import os
import torch
import torch.distributed as dist
from minitron_megatron.distill.losses import Divergence
from minitron_megatron.models import kernels
from minitron_megatron.models.vocab_parallel import _argmax_by_kernels, _entropy_by_kernels, valid_columns
from tests import reference
from tests.through_head import distance, label_loss

alone = "RANK" not in os.environ
dist.init_process_group("gloo", **({"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}))
rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
torch.manual_seed(0)


def close(found, gradient, wanted, plain, dtype):
    for name, values in found.items():
        torch.testing.assert_close(values.double(), wanted[name].detach().double(), rtol=1e-5, atol=2e-6, msg=lambda m: name + m)
    mine = plain.grad.chunk(world, -1)[rank]
    # The interpreter cuts bfloat16 off where a GPU rounds it.
    bound = {"rtol": 1e-5, "atol": 1e-5 if alone else 1e-6} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(gradient.double(), mine, **bound)


# Several tiles of columns; padding within a rank; of two ranks one with nothing but padding.
shapes = {torch.float32: ((3, 5200, 5000), (2, 160, 150), (4, 128, 60)), torch.bfloat16: ((2, 160, 150), (4, 128, 60))}
if alone:
    # Short rows, shared out over two programs of two tiles each.
    kernels._BLOCK, kernels._TILES, shapes = 64, 2, {torch.float32: ((3, 160, 150),)}
for dtype, of_dtype in shapes.items():
    for n, width, vocab in of_dtype:
        student, teacher = (torch.randn(n, 1, width).mul(spread).to(dtype) for spread in (3, 4))
        student[0] = teacher[0]
        teacher[..., vocab:] += 20
        weights, labels = torch.rand(n, 1), torch.randint(0, vocab, (n, 1))
        for kind, temperature, share in (
            ("forward_kl", 1.0, 0), ("forward_kl", 2.5, 0.5), ("reverse_kl", 0.5, 0), ("reverse_kl", 1.0, 2)
        ):
            how = Divergence(kind, temperature)
            plain = student.double().requires_grad_()
            wanted = reference.distillation_terms(plain, teacher.double(), vocab, how, labels, share)
            (wanted["loss"] * weights).sum().backward()
            more = {"labels": labels, "cross_entropy": share, "measure": True} if share else {"measure": True}
            found, gradient = distance(student, teacher, how, weights, vocab_size=vocab, group=group, logits_bytes=2**15, **more)
            assert len(found) == (5 if share else 4) and 0 < found["agreement"].mean()
            close(found, gradient, wanted, plain, dtype)
        plain = student.double().requires_grad_()
        nll = -torch.log_softmax(plain[..., :vocab], -1).gather(-1, labels[..., None])[..., 0]
        (nll * weights).sum().backward()
        close(*label_loss(student, labels, weights, vocab_size=vocab, group=group), {"loss": nll}, plain, dtype)
        # Of several that are the highest, the first; on two ranks there is one on each.
        teacher[-1, 0, [3, vocab - 1]] = 100
        rows = teacher.chunk(world, -1)[rank][:, 0].contiguous()
        first, columns = rank * rows.shape[-1], valid_columns(rows, vocab, group)
        log_p = torch.log_softmax(teacher[:, 0, :vocab].double(), -1)
        entropy = _entropy_by_kernels(rows, columns, group).double()
        torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
        best = _argmax_by_kernels(rows, columns, first, group)
        assert best[-1] == 3 and torch.equal(best[:-1], log_p[:-1].argmax(-1))
if rank == 0:
    print("same")
dist.barrier()
dist.destroy_process_group()
"""


def interpreted(command, says="same"):
    """In a process of its own: Triton reads whether to interpret when it is imported."""
    own = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        env={**{name: value for name, value in os.environ.items() if name != "RANK"}, **own},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.split() == says.split(), done.stderr


def test_sums_equal_plain_float64():
    """And losses of a few short rows, on one rank, in the same process."""
    interpreted([sys.executable, "-c", SUMS + LOSSES], "same same")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_equal_float64(tmp_path, ranks):
    """Every loss that has kernels, its terms and gradients; over ranks the largest logit and the sums come from all."""
    (tmp_path / "check.py").write_text(LOSSES)
    start = [TORCHRUN, "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    interpreted([*start, tmp_path / "check.py"])
