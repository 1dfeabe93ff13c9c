"""What trades memory or waiting for work, and must not change a loss: recomputation, overlap, splits of the pipeline."""

import pytest
import torch

from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.config import TrainerConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.limits import check_layout, layers_of_stages
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.checks import recomputation
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
        pytest.param(
            4, {"pipeline": 2, "virtual_pipeline": 2}, {"ddp": OVERLAP, "recompute": "full"}, marks=pytest.mark.slow
        ),
        (2, {"pipeline": 2, "account_for_loss": True}, {}),
        (2, {"pipeline": 2, "pipeline_layout": "Et|t*3L"}, {}),
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


def test_layers_are_shared_out_as_asked():
    def stages(layers, pipeline, **split):
        return layers_of_stages(layers, Layout(pipeline=pipeline, world_size=pipeline, **split))

    embedding, loss = ({f"account_for_{what}": True} for what in ("embedding", "loss"))
    assert stages(8, 4) == [2, 2, 2, 2] and stages(7, 3) == [3, 2, 2]
    assert stages(6, 4, **embedding, **loss) == [1, 2, 2, 1]
    assert stages(7, 4, **loss) == [2, 2, 2, 1] and stages(7, 4, **embedding) == [1, 2, 2, 2]
    assert stages(8, 2, pipeline_layout="Et*3|t*5L") == [3, 5]
    both = "Et*3|t*5L; Et|t*3L"
    assert stages(8, 2, pipeline_layout=both) == [3, 5] and stages(4, 2, pipeline_layout=both) == [1, 3]
    for wrong in ("Et*3|t*4L", "Et*3|t*4L;Et|t*3L", "Et*8L", "t*3|t*5L", "EtL|t*7", "nonsense"):
        with pytest.raises(UserError, match="does not lay out 8 layers over 2 stages"):
            stages(8, 2, pipeline_layout=wrong)


def test_a_split_that_leaves_a_stage_empty_is_refused(pair):
    shape = open_model_folder(pair[0]).shape
    layout = Layout(pipeline=4, world_size=4, account_for_loss=True)
    with pytest.raises(
        UserError, match=r"4 layers of the model over 4 stages would be \[2, 1, 1, 0\]: every stage needs"
    ):
        check_layout(shape, layout)


def test_what_megatron_would_refuse_is_refused_first():
    with pytest.raises(UserError, match=r"trainer\.recompute_modules has moe: use core_attn or mlp, or both"):
        recomputation(TrainerConfig(recompute="selective", recompute_modules=["moe"]))
