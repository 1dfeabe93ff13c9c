"""FP8 as far as a CPU can tell: the teacher's output matrix, what is refused before a GPU is asked, what a dry run counts."""

from dataclasses import replace

import pytest
import torch

from minitron_megatron.errors import UserError
from minitron_megatron.models.fp8 import Fp8Matrix, check_fp8_device, fp8_fields
from minitron_megatron.models.limits import check_fp8
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.distill import distill
from minitron_megatron.train.memory import memory_of_stage
from tests.test_foresee import plan_of
from tests.test_teachers import PIPELINE, SEQUENCE, figures, options, sources, wanted  # noqa: F401 (fixtures)

SHAPE = ModelShape(
    family="llama",
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=64,
    vocab_size=1000,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    rope_scaling=None,
    rotary_percent=1.0,
    norm_eps=1e-5,
    tied_embeddings=False,
    dtype="bfloat16",
)


def test_a_matrix_is_rounded_row_by_row():
    """e4m3 has four bits: a number is off by 2⁻⁴ of itself at most, whatever its row's size; and rows of zeros stay."""
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 32, generator=draw) * torch.logspace(-6, 6, 64)[:, None]
    matrix[3] = 0
    rounded = Fp8Matrix.of(matrix)
    back = rounded.values.float() * rounded.scale
    largest = matrix.abs().amax(-1, keepdim=True)
    assert ((back - matrix).abs() <= matrix.abs() / 16 + largest * 2**-17).all()
    assert (back[3] == 0).all() and back.isfinite().all()
    rows = torch.randn(10, 32, generator=draw)
    error = (rounded.product(rows) - rows @ matrix.t()).abs()
    # Of every term both numbers are off.
    assert (error <= 0.13 * (rows.abs() @ matrix.abs().t())).all() and error.max() > 0


@pytest.fixture(scope="module")
def alone(gloo, sources, tmp_path_factory):  # noqa: F811
    """Losses of a run on one process whose teacher has its head in FP8."""
    run = tmp_path_factory.mktemp("alone") / "run"
    gloo(1, distill, options(sources, run, teacher_head_fp8=True))
    return figures(run)["loss"]


def test_a_teachers_head_in_fp8_is_close_to_what_it_was(wanted, alone):  # noqa: F811
    assert alone != wanted["loss"] and alone == pytest.approx(wanted["loss"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "teacher"),
    [(SEQUENCE, None), (PIPELINE, {"tensor": 2, "pipeline": 1})],
    ids=["sequence", "own layout"],
)
def test_a_teachers_head_in_fp8_says_the_same_in_every_layout(gloo, sources, alone, tmp_path, layout, teacher):  # noqa: F811
    """Scales are of a token and of a word, so ranks do not matter: only what float32 rounds may tip a number over."""
    gloo(2, distill, options(sources, tmp_path / "run", layout, teacher, teacher_head_fp8=True))
    assert figures(tmp_path / "run")["loss"] == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "layout", "scaling", "bf16_layers", "says"),
    [
        ({"ffn_hidden_size": 520}, {}, "tensorwise", 0, "needs multiples of 16: ffn_hidden_size=520 / tensor is 520"),
        (
            {},
            {"tensor": 4, "world_size": 4},
            "blockwise",
            0,
            "of 128: num_attention_heads × head_dim / tensor is 64",
        ),
        ({"hidden_size": 264}, {}, "delayed", 0, "needs multiples of 16: hidden_size is 264"),
        ({}, {}, "delayed", 1, "trainer.fp8=delayed cannot leave layers in bf16"),
        ({}, {}, "tensorwise", 2, "trainer.fp8_bf16_layers=2 at either end leaves none of 4 layers in FP8"),
        ({}, {}, "none", 1, "trainer.fp8_bf16_layers is for FP8"),
    ],
)
def test_what_fp8_cannot_do_is_refused(change, layout, scaling, bf16_layers, says):
    with pytest.raises(UserError) as error:
        check_fp8("trainer.fp8", scaling, replace(SHAPE, **change), Layout(**layout), 256, bf16_layers)
    assert says in str(error.value)


def test_tokens_count_after_sequence_parallelism():
    layout = Layout(tensor=2, sequence=True, world_size=2)
    check_fp8("trainer.fp8", "tensorwise", SHAPE, layout, 32)
    with pytest.raises(UserError, match="tokens of a micro-batch on a rank is 8"):
        check_fp8("trainer.fp8", "tensorwise", SHAPE, layout, 16)


@pytest.mark.parametrize(("engine", "dtype"), [("local", torch.bfloat16), ("te", torch.float32)])
def test_fp8_needs_transformer_engine_and_bf16(engine, dtype):
    with pytest.raises(UserError, match=r"trainer\.fp8=blockwise needs Transformer Engine's layers in bf16"):
        check_fp8_device("trainer.fp8", "blockwise", engine, dtype, torch.device("cpu"))
    check_fp8_device("trainer.fp8", "none", engine, dtype, torch.device("cpu"))


def test_fields_are_megatrons():
    from megatron.core.transformer import TransformerConfig

    for scaling in ("delayed", "tensorwise", "blockwise"):
        layers = 0 if scaling == "delayed" else 1
        fields = fp8_fields(scaling, frozen=True, bf16_layers=layers)
        config = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **fields)
        assert config.fp8_recipe == scaling and config.fp8_param and config.first_last_layers_bf16 == bool(layers)
    assert fp8_fields("none") == {}


def test_a_dry_run_counts_what_fp8_and_bf16_moments_save():
    from minitron_megatron.train.census import take_census

    layout = Layout(world_size=1)
    (stage,) = take_census(SHAPE, SHAPE, layout, torch.bfloat16, torch.bfloat16)
    plan = replace(plan_of(SHAPE, layout, torch.bfloat16), teacher=SHAPE)
    how = replace(plan.how, engine="te", fused_norms=True)
    plan = replace(plan, how=how, teacher_how=how)
    plain = memory_of_stage(stage, plan)
    trained = stage.student[0].parameters
    matrices = stage.student[0].layer_matrices
    moments = memory_of_stage(stage, replace(plan, state_precision="bf16"))
    assert plain["optimizer"] - moments["optimizer"] == 4 * trained
    head = SHAPE.padded_vocab_size * SHAPE.hidden_size
    frozen = memory_of_stage(stage, replace(plan, teacher_how=replace(how, fp8=True, fp8_head=True)))
    assert plain["teacher weights"] - frozen["teacher weights"] == matrices + head
    learning = memory_of_stage(stage, replace(plan, how=replace(how, fp8=True)))
    assert learning["weights"] - plain["weights"] == 2 * matrices
    assert learning["activations"] < plain["activations"]
