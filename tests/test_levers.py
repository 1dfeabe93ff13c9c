"""What trades memory or waiting for work, and must not change a loss: recomputation, overlap, splits of the pipeline."""

import pytest
import torch

from minitron_megatron.config import DdpConfig, TrainerConfig
from minitron_megatron.errors import UserError
from minitron_megatron.train.optimizer import check_ddp, recomputation
from tests import jobs
from tests.test_models import names
from tests.tiny import hf_model, imported

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 2000}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(teacher folder, student folder, tokens of four steps, what plain training gives)."""
    folder = tmp_path_factory.mktemp("levers")
    teacher = str(imported(hf_model(0), folder / "teacher"))
    student = str(imported(hf_model(1, hidden_size=24, intermediate_size=24), folder / "student"))
    tokens = torch.randint(0, 300, (32, 33), generator=torch.Generator().manual_seed(7))
    return teacher, student, tokens


@pytest.fixture(scope="module")
def plain(gloo, pair):
    return gloo(1, jobs.training_losses, *pair, {}, 2, 4, layout={})[0]


@pytest.mark.parametrize(
    ("ranks", "layout", "how"),
    [
        (1, {}, {"recompute": "selective"}),
        (2, {"tensor": 2, "sequence": True}, {"recompute": "selective", "recompute_modules": ["mlp", "core_attn"]}),
        (1, {}, {"recompute": "full"}),
        (2, {"pipeline": 2}, {"recompute": "full", "recompute_method": "block"}),
        (2, {}, {"ddp": {"overlap_grad_reduce": True, "bucket_size": 2000}}),
        (2, {}, {"ddp": OVERLAP}),
        (4, {"pipeline": 2, "virtual_pipeline": 2}, {"ddp": OVERLAP, "recompute": "full"}),
    ],
    ids=names,
)
def test_levers_leave_the_losses_as_they_are(gloo, pair, plain, ranks, layout, how):
    """Over four optimizer steps: losses to 1e-4 and gradient norms to 1e-3, as between layouts."""
    for found in gloo(ranks, jobs.training_losses, *pair, layout, 2, 4, how, layout=layout):
        for (loss, norm), (loss_wanted, norm_wanted) in zip(found, plain, strict=True):
            assert loss == pytest.approx(loss_wanted, rel=1e-4)
            assert norm == pytest.approx(norm_wanted, rel=1e-3)


def kept_bytes(student, how):
    """Bytes that a student's forward pass keeps for its backward pass."""
    _, trained = jobs.trainer(None, student, {}, 8, optimizer=True, **how)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    batch = jobs.batch_of(torch.randint(0, 300, (8, 33), generator=torch.Generator().manual_seed(1)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trained.chunks[0](batch["tokens"], batch["position_ids"], None)
    return sum(kept.values())


def test_recomputation_keeps_less(gloo, pair):
    bytes_of = [gloo(1, kept_bytes, pair[1], {"recompute": how}, layout={})[0] for how in ("none", "selective", "full")]
    assert bytes_of[0] > bytes_of[1] > bytes_of[2]


def test_what_megatron_would_refuse_is_refused_first():
    with pytest.raises(UserError, match=r"trainer\.recompute_modules has moe: use core_attn or mlp, or both"):
        recomputation(TrainerConfig(recompute="selective", recompute_modules=["moe"]))
    with pytest.raises(UserError, match=r"needs ddp\.overlap_grad_reduce=true"):
        check_ddp(DdpConfig(overlap_param_gather=True))
