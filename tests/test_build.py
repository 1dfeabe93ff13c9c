"""From sizes to Megatron's config: engines, fusions and fields, worked out by hand; FP8 and norms beside them."""

import itertools
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minitron_megatron.automatic import Choice
from minitron_megatron.errors import UserError
from minitron_megatron.models import build, fp8
from minitron_megatron.models.axes import TRAITS
from minitron_megatron.models.build import (
    attention_in_fixed_order,
    build_model_chunks,
    check_document_masks,
    check_fused,
    foretell_dtype,
    layer_spec,
    model_dtype,
    pick_engine,
    scaled_inverse_frequencies,
    transformer_config,
)
from minitron_megatron.models.fp8 import (
    Fp8Matrix,
    ScalesBefore,
    check_fp8_device,
    check_fp8_matrix_device,
    delayed_scales,
    fp8_fields,
    set_delayed_scales,
)
from minitron_megatron.models.norms import Norm
from minitron_megatron.models.shape import RopeScaling
from minitron_megatron.parallel.layout import Layout
from tests.test_bounds import SMALL_SHAPE, refused

BF16, FP32 = torch.bfloat16, torch.float32
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("have", [False, True])
@pytest.mark.parametrize("engine", ["auto", "te", "local"])
def test_the_engine_is_transformer_engine_where_it_can_and_should_run(monkeypatch, engine, have):
    """For bfloat16 on CUDA; context parallelism has no other."""
    monkeypatch.setattr(build, "_have_transformer_engine", lambda: have)
    for device, dtype, context in itertools.product((CPU, CUDA), (BF16, FP32), (1, 2)):
        runs = have and device == CUDA
        wanted = ("te" if runs and dtype is BF16 else "local") if engine == "auto" else engine
        # Fused attention takes no float32, and what splits a sequence is fused.
        impossible = (engine == "te" and not runs) or (context == 2 and (wanted == "local" or dtype is FP32))
        given = (engine, Layout(context=context, world_size=context), dtype, device, "teacher")
        if impossible:
            with pytest.raises(UserError):
                pick_engine(*given)
        else:
            assert pick_engine(*given) == wanted


@pytest.mark.parametrize("value", [None, "0", "1"])
def test_attention_adds_in_a_fixed_order_unless_the_user_says_otherwise(monkeypatch, value):
    name = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
    monkeypatch.delenv(name, raising=False)
    if value:
        monkeypatch.setenv(name, value)
    assert attention_in_fixed_order() is (value != "1")
    whole = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec"
    monkeypatch.setattr(whole, lambda **given: given)
    given = SimpleNamespace(transformer_impl="transformer_engine", qk_layernorm=True, use_te_activation_func=False)
    spec, _ = build._te_spec(given)
    assert spec == {"qk_layernorm": True, "use_te_activation_func": False}
    assert build.os.environ[name] == (value or "0")


def test_what_needs_fused_layers_needs_both():
    for engine, dtype in itertools.product(("te", "local"), (BF16, FP32)):
        assert refused(check_fused, "o", "v", "none", engine, dtype) is not (engine == "te" and dtype is BF16)
    for reset, engine in itertools.product((True, False), ("te", "local")):
        assert refused(check_document_masks, reset, engine, "model") is (reset and engine == "te")


@pytest.mark.parametrize(("device", "precision", "dtype", "said"), [
    ("cpu", "auto", "bfloat16", 1), ("cpu", "auto", "float32", 0),
    ("cpu", "bf16", "bfloat16", 0), ("cuda", "auto", "bfloat16", 0),
])  # fmt: skip
def test_a_dry_run_says_what_a_cpu_would_compute_in(monkeypatch, caplog, device, precision, dtype, said):
    monkeypatch.setattr(build, "of_this_machine", lambda: Choice("precision", "float32", "since"))
    with caplog.at_level(logging.INFO):
        foretell_dtype(precision, torch.device(device), SMALL_SHAPE.resized(dtype=dtype))
    assert len(caplog.records) == said
    of_options = {"bf16": BF16, "fp32": FP32, "auto": {"bfloat16": BF16, "float32": FP32}[dtype]}
    assert model_dtype(SMALL_SHAPE.resized(dtype=dtype), precision) is of_options[precision]


@pytest.mark.parametrize("family", TRAITS)
@pytest.mark.parametrize("te", [False, True])
@pytest.mark.parametrize("rotates", [False, True])
def test_fused_kernels_are_the_engines_own(monkeypatch, family, te, rotates):
    monkeypatch.setattr(build, "_have_fused_rotation", lambda: rotates)
    never = ("bias_activation_fusion", "gradient_accumulation_fusion", "masked_softmax_fusion", "persist_layer_norm")
    assert build._fusions(te, TRAITS[family]) == {
        **dict.fromkeys(never, False),
        **dict.fromkeys(("bias_dropout_fusion", "apply_rope_fusion"), te),
        "use_te_activation_func": te and family != "nemotron",
        "fused_single_qkv_rope": te and rotates and family != "qwen3",
    }


FAMILIES = {
    "llama": ("RMSNorm", False, torch.nn.functional.silu, True, False, False),
    "mistral": ("RMSNorm", False, torch.nn.functional.silu, True, False, False),
    "qwen2": ("RMSNorm", False, torch.nn.functional.silu, True, True, False),
    "qwen3": ("RMSNorm", False, torch.nn.functional.silu, True, False, True),
    "nemotron": ("LayerNorm", True, build.squared_relu, False, False, False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_says_what_the_family_computes(family):
    found = transformer_config(SMALL_SHAPE.resized(family=family), Layout(), FP32, "local")
    assert (
        found.normalization,
        found.layernorm_zero_centered_gamma,
        found.activation_func,
        found.gated_linear_unit,
        found.add_qkv_bias,
        found.qk_layernorm,
    ) == FAMILIES[family]
    sizes = (found.num_layers, found.hidden_size, found.ffn_hidden_size, found.num_attention_heads)
    assert sizes == (4, 32, 48, 8) and (found.num_query_groups, found.kv_channels) == (4, 4)
    assert found.layernorm_epsilon == SMALL_SHAPE.norm_eps and not found.add_bias_linear
    assert found.hidden_dropout == found.attention_dropout == 0
    # Weights are read, sums are divided once, and on CPUs nothing is made on a GPU.
    assert found.calculate_per_token_loss and not found.perform_initialization and found.use_cpu_initialization
    assert found.transformer_impl == "local" and not found.heterogeneous_block_specs


@pytest.mark.parametrize(
    ("layout", "engine", "dtype", "fields"),
    [
        ({}, "local", FP32, {"bf16": False, "params_dtype": FP32, "pipeline_dtype": FP32, "sequence_parallel": False}),
        ({"tensor": 2}, "local", BF16, {"bf16": True, "sequence_parallel": False, "tensor_model_parallel_size": 2}),
        ({"tensor": 2, "sequence": True}, "local", FP32, {"sequence_parallel": True}),
        ({"sequence": True}, "local", FP32, {"sequence_parallel": False}),
        ({"pipeline": 2}, "local", FP32, {"overlap_p2p_comm": False, "batch_p2p_comm": True}),
        (
            {"pipeline": 2, "virtual_pipeline": 2},
            "local",
            FP32,
            {"overlap_p2p_comm": True, "batch_p2p_comm": False, "virtual_pipeline_model_parallel_size": 2},
        ),
        ({}, "te", BF16, {"transformer_impl": "transformer_engine", "apply_rope_fusion": False}),
    ],
)
def test_the_config_says_how_the_layout_computes(monkeypatch, layout, engine, dtype, fields):
    # Megatron refuses fusions whose packages are not there.
    monkeypatch.setattr(build, "_fusions", lambda *_: {"bias_dropout_fusion": engine == "te"})
    size = math.prod(layout.get(name, 1) for name in ("tensor", "pipeline"))
    found = transformer_config(SMALL_SHAPE, Layout(**layout, world_size=size), dtype, engine, {"recompute_modules": []})
    assert {name: getattr(found, name) for name in fields} == fields and found.recompute_modules == []


def test_layers_of_several_sizes_have_configs_of_their_own():
    """The whole config has the widest; a layer's number counts from 1."""
    found = transformer_config(SMALL_SHAPE.resized(ffn_hidden_size=(8, 48, 16, 24)), Layout(), FP32, "local")
    assert found.heterogeneous_block_specs and found.ffn_hidden_size == 48
    assert [found.get_config_for_layer(number).ffn_hidden_size for number in (1, 2, 3, 4)] == [8, 48, 16, 24]
    assert found.ffn_hidden_size == 48
    spec = layer_spec(found, None, 0)
    assert len(spec.layer_specs) == 4 and spec.layer_norm is Norm


@pytest.mark.parametrize("scaling", [(8.0, 1.0, 4.0, 8192), (32.0, 0.5, 2.0, 4096), (4.0, 1.0, 2.0, 32)])
def test_scaled_frequencies_are_those_of_transformers(scaling):
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **dict(zip(names, scaling, strict=True))}
    config = AutoConfig.for_model("llama", head_dim=64, rope_parameters=rope, max_position_embeddings=131072)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    found = scaled_inverse_frequencies(plain, RopeScaling(*scaling))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert 0 < int((found == plain).sum()) < 32


@pytest.mark.parametrize(("backend", "on_cpu"), [(None, True), ("gloo", True), ("nccl", False)])
def test_a_model_is_on_the_cpu_unless_ranks_meet_on_gpus(monkeypatch, backend, on_cpu):
    """And its engine is picked for that device; of an interleaved pipeline each chunk knows its place."""
    from megatron.core import parallel_state as ps

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: backend is not None)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    picked, built = [], []
    monkeypatch.setattr(build, "pick_engine", lambda *given: picked.append(given) or "local")
    monkeypatch.setattr(build, "build_gpt", lambda *given, **more: built.append((given, more)) or len(built))
    for what in ("first", "last"):
        place = f"is_pipeline_{what}_stage"
        monkeypatch.setattr(ps, place, lambda *, ignore_virtual, vp_stage, what=what: (what, ignore_virtual, vp_stage))
    assert build._on_cpu() is on_cpu
    for layout, stages in ((Layout(), [None]), (Layout(pipeline=2, virtual_pipeline=2, world_size=2), [0, 1])):
        assert build_model_chunks(SMALL_SHAPE, layout, FP32, "auto", {"a": 1}) == [*range(1, len(stages) + 1)]
        assert picked.pop() == ("auto", layout, FP32, CPU if on_cpu else CUDA)
        for (given, more), stage in zip(built, stages, strict=True):
            assert given == (SMALL_SHAPE, layout, FP32, "local") and more["training"] == {"a": 1}
            assert more["vp_stage"] == stage
            assert more["pre_process"] == ("first", stage is None, stage)
            assert more["post_process"] == ("last", stage is None, stage)
        built.clear()
    for what in ("first", "last"):
        monkeypatch.setattr(f"megatron.core.pipeline_parallel.utils.is_pp_{what}_stage", lambda pp, w=what: (w, pp))
    groups = SimpleNamespace(pp="pipeline")
    build_model_chunks(SMALL_SHAPE, Layout(), FP32, "local", groups=groups)
    ((_, more),) = built
    assert more == {
        "pre_process": ("first", "pipeline"),
        "post_process": ("last", "pipeline"),
        "training": None,
        "groups": groups,
    }


# FP8


@pytest.mark.parametrize("scaling", ["none", "delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layers", [0, 2])
def test_fields_of_fp8(scaling, frozen, layers):
    of = {"fp8": "e4m3" if scaling == "blockwise" else "hybrid", "fp8_recipe": scaling, "fp8_param": frozen}
    history = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"} if scaling == "delayed" else {}
    ends = dict.fromkeys(("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"), layers)
    wanted = of | history | ({"first_last_layers_bf16": True, **ends} if layers else {})
    assert fp8_fields(scaling, frozen=frozen, bf16_layers=layers) == ({} if scaling == "none" else wanted)


@pytest.mark.parametrize(
    ("capability", "scalings", "matrix"),
    [
        ((8, 6), [], False),
        ((8, 8), [], False),
        ((8, 9), ["delayed", "tensorwise"], True),
        ((9, 0), ["delayed", "tensorwise", "blockwise"], True),
        ((10, 0), ["delayed", "tensorwise", "blockwise"], True),
    ],
)
def test_gpus_that_have_fp8(monkeypatch, capability, scalings, matrix):
    """Ada and later; blocks need Hopper. A CPU computes with the numbers of a matrix."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for scaling in ("delayed", "tensorwise", "blockwise"):
        assert refused(check_fp8_device, "o", scaling, "te", BF16, CUDA) is (scaling not in scalings)
        assert refused(check_fp8_device, "o", scaling, "local", BF16, CUDA)
    check_fp8_device("o", "none", "local", FP32, CUDA)
    assert refused(check_fp8_matrix_device, "o", CUDA) is not matrix
    check_fp8_matrix_device("o", CPU)


def scaled(value: float | None) -> torch.nn.Module:
    """A module with Transformer Engine's state of delayed scaling; None: before it first ran."""
    made = torch.nn.Linear(1, 1)
    made.fp8_meta = {}
    made.init_fp8_meta_tensors = lambda recipe: made.fp8_meta.update(scales(0.0), initialised=recipe)
    if value is not None:
        made.fp8_meta = {"num_gemms": 3, **scales(value)}
    return made


def scales(value: float) -> dict:
    ways = {"scaling_fwd": value, "scaling_bwd": 10 * value}
    return {
        way: SimpleNamespace(scale=torch.full((2,), one), amax_history=torch.full((3, 2), one + 1))
        for way, one in ways.items()
    }


def chunk_of(**modules: torch.nn.Module) -> torch.nn.Module:
    made = torch.nn.ModuleDict(modules)
    made.config = "config"
    return made


def test_scales_go_on_in_another_process(monkeypatch):
    """Of the modules that have some; what has not run yet has none."""
    monkeypatch.setattr("megatron.core.fp8_utils.get_fp8_recipe", lambda config: f"recipe of {config}")
    half = scaled(7.0)
    del half.fp8_meta["scaling_bwd"]
    written = delayed_scales(chunk_of(a=scaled(2.0), part=half, b=scaled(None), plain=torch.nn.Linear(1, 1)))
    ways = [f"a.{way}.{what}" for way in ("scaling_fwd", "scaling_bwd") for what in ("scale", "amax_history")]
    assert set(written) == {"a.products", *ways} and int(written["a.products"]) == 3
    fresh = chunk_of(a=scaled(None), b=scaled(None))
    set_delayed_scales(fresh, written)
    meta = fresh["a"].fp8_meta
    assert meta["num_gemms"] == 3 and meta["recipe"] == meta["initialised"] == "recipe of config"
    assert meta["scaling_fwd"].scale.tolist() == [2, 2] and meta["scaling_bwd"].scale.tolist() == [20, 20]
    assert (meta["scaling_fwd"].amax_history == 3).all() and (meta["scaling_bwd"].amax_history == 21).all()
    assert fresh["b"].fp8_meta == {}


def test_a_step_that_is_not_taken_leaves_no_scale_behind():
    """In the memory that they had, also once more modules have run."""
    late = scaled(None)
    chunk = chunk_of(a=scaled(1.0), late=late)
    before = ScalesBefore([chunk])
    before.remember()
    before.restore()
    held = chunk["a"].fp8_meta["scaling_fwd"].scale
    for value in (2.0, 5.0):
        before.remember()
        wanted = [t.clone() for t in before.held]
        for tensor in before.held:
            tensor.fill_(float("nan"))
        before.restore()
        assert all(torch.equal(t, w) for t, w in zip(before.held, wanted, strict=True))
        assert chunk["a"].fp8_meta["scaling_fwd"].scale is held and held.tolist() == [1, 1]
        late.fp8_meta = scales(value)
    assert len(before.held) == 8 and len(before.kept) == 8
    ScalesBefore([torch.nn.Linear(1, 1)]).restore()


def test_a_product_in_fp8_is_that_of_the_numbers_that_it_holds():
    rows, matrix = torch.tensor([[448.0, -224.0], [1.0, 2.0]]), torch.tensor([[896.0, 448.0], [3.0, 6.0], [0.0, 0.0]])
    held = Fp8Matrix.of(matrix)
    assert held.scale[:2, 0].tolist() == pytest.approx([2.0, 6 / 448]) and held.values.shape == (3, 2)
    torch.testing.assert_close(held.product(rows), rows @ matrix.t())
    assert torch.finfo(torch.float8_e4m3fn).max == fp8.LARGEST


# Norms


@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norms_are_written_out(kind, zero_centred):
    config = SimpleNamespace(
        normalization=kind,
        layernorm_zero_centered_gamma=zero_centred,
        use_cpu_initialization=True,
        params_dtype=torch.float64,
        sequence_parallel=True,
    )
    norm, x = Norm(config, 6, eps=0.25), torch.randn(5, 6, dtype=torch.float64)
    assert (norm.weight == (0 if zero_centred else 1)).all() and norm.weight.dtype is torch.float64
    assert all(parameter.sequence_parallel for parameter in norm.parameters())
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    middle = x.mean(-1, keepdim=True) if kind == "LayerNorm" else 0
    plain = (x - middle) / ((x - middle).square().mean(-1, keepdim=True) + 0.25).sqrt()
    wanted = plain * (norm.weight + zero_centred) + (norm.bias if kind == "LayerNorm" else 0)
    torch.testing.assert_close(norm(x), wanted)
    assert (norm.bias is None) is (kind == "RMSNorm")
