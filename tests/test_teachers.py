"""The teacher's modes (same layout, another, bounded ahead, cached) give the same run; what travels between layouts; refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.config import (
    CacheDataConfig,
    CacheOptions,
    CacheRunConfig,
    CacheTeacherConfig,
    DistillConfig,
    DistillOptions,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TeacherParallelConfig,
    TrainerConfig,
)
from minitron_megatron.distill.cache_teacher import cache_teacher
from minitron_megatron.distill.objective import Distillation
from minitron_megatron.distill.offload import _Layer, offload_layers
from minitron_megatron.distill.routing import Side, messages
from minitron_megatron.distill.teacher import Teacher
from minitron_megatron.errors import UserError
from minitron_megatron.models.build import build_model_chunks
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train.census import take_census
from minitron_megatron.train.distill import distill, load_teacher
from minitron_megatron.train.distill_checks import check_pair, teacher_layout
from minitron_megatron.train.memory import Arithmetic, MicroBatch, Plan, layers_in_cpu_memory, memory_of_stage
from tests.test_models import names
from tests.tiny import data_folder, data_option, hf_model, imported, model_option

LENGTH, STEPS = 32, 3
# Of 8 samples a step in micro-batches of 1: 8, 4 or 2 a rank.
TRAINER = {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 1, "validation_samples": 9}
FIGURES = ("loss", "grad_norm", "validation_loss", "validation_perplexity")
PIPELINE, TENSOR, DATA = {"pipeline": 2}, {"tensor": 2}, {}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
SEQUENCE = {"tensor": 2, "sequence": True}
# processes, student's layout, teacher's where it differs, how far it runs ahead
MODES = [
    (2, PIPELINE, None, None),
    (2, PIPELINE, None, 3),
    (2, INTERLEAVED, None, 2),
    (2, PIPELINE, {"tensor": 2, "pipeline": 1}, None),
    (2, TENSOR, {"tensor": 1, "pipeline": 2}, 2),
    (2, SEQUENCE, {"tensor": 1, "sequence": False}, None),
    (2, DATA, {"tensor": 2}, 1),
    pytest.param(4, PIPELINE, {"tensor": 4, "pipeline": 1, "sequence": True}, 2, marks=pytest.mark.slow),
    (4, {**INTERLEAVED, **SEQUENCE}, {"tensor": 1, "pipeline": 2, "sequence": False}, 4),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folder with a teacher, a smaller student and data. The teacher's embeddings are tied: where its layout is its own, the
    student's last stage reads them for a head."""
    folder = tmp_path_factory.mktemp("sources")
    teacher = imported(hf_model(0, tie_word_embeddings=True), folder / "teacher")
    imported(hf_model(1, hidden_size=24, intermediate_size=24), folder / "student")
    data_folder(folder, teacher)
    return folder


@pytest.fixture(scope="module")
def wanted(gloo, sources, tmp_path_factory):
    """Figures of a run on one process, with the whole softmax."""
    run = tmp_path_factory.mktemp("one") / "run"
    gloo(1, distill, options(sources, run))
    return figures(run)


def options(sources: Path, output: Path, layout=None, teacher=None, ahead=None, **loss) -> DistillConfig:
    """A short run."""
    beside = TeacherParallelConfig(**(teacher or {}))
    return DistillConfig(
        output=str(output),
        parallel=ParallelConfig(**(layout or {})),
        teacher=ModelConfig() if "cache" in loss else model_option(sources / "teacher" / "model"),
        student=model_option(sources / "student" / "model"),
        data=data_option(sources / "data", LENGTH),
        trainer=TrainerConfig(**TRAINER),
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
        distill=DistillOptions(teacher_parallel=beside, teacher_ahead=ahead, **loss),
        logger=LoggerConfig(wandb="disabled"),
    )


def figures(run: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines if name in line] for name in FIGURES}


def distill_and_count(cfg: DistillConfig) -> int:
    """Run the command; the most final hidden states of the teacher that this rank kept, in micro-batches."""
    prepare, kept = Distillation.prepare, [0]

    def counting(self, batches, *, training=True):
        assert not self.teacher.states  # what came before is consumed
        prepare(self, batches, training=training)
        kept.append(len(self.teacher.states))

    Distillation.prepare = counting
    try:
        distill(cfg)
    finally:
        Distillation.prepare = prepare
    return max(kept)


@pytest.mark.parametrize(("ranks", "layout", "teacher", "ahead"), MODES, ids=names)
def test_every_mode_of_a_teacher_gives_the_same_run(gloo, sources, wanted, tmp_path, ranks, layout, teacher, ahead):
    """Losses and gradient norms of three steps and a validation's figures: to 1e-5 and 1e-4 of one process's, in float32."""
    cfg = options(sources, tmp_path / "run", layout, teacher, ahead)
    kept = gloo(ranks, distill_and_count, cfg)
    found = figures(tmp_path / "run")
    assert len(found["loss"]) == STEPS and len(found["validation_loss"]) == 1
    for name in FIGURES:
        assert found[name] == pytest.approx(wanted[name], rel=1e-4 if name == "grad_norm" else 1e-5), name
    # Bounded on the ranks of the student's last stage, none on the others; without a bound those of a step (or validation).
    stage = ranks // layout.get("pipeline", 1)
    micro_batches = max(8 * layout.get("tensor", 1) // stage, 9 if stage == layout.get("tensor", 1) else 0)
    assert all(1 <= n <= (ahead or micro_batches) for n in kept[-stage:]) and not any(kept[:-stage])


def test_documents_and_an_untied_output_matrix_find_their_way(gloo, sources, tmp_path):
    """The masks of documents that share a sample travel with the tokens; the matrix is a tensor of its own in the folder."""
    untied = imported(hf_model(0), tmp_path / "untied")
    runs = {
        name: options(sources, tmp_path / name, PIPELINE, own)
        for name, own in (("same", None), ("own", {"pipeline": 1}))
    }
    for cfg in runs.values():
        cfg.teacher = model_option(untied)
        cfg.data.reset_attention_mask = True
        gloo(2, distill, cfg)
    for name, found in figures(tmp_path / "own").items():
        assert found == pytest.approx(figures(tmp_path / "same")[name], rel=1e-4 if name == "grad_norm" else 1e-5), name


def test_losses_on_intermediate_states_go_in_rounds_too(gloo, sources, tmp_path):
    asked = {"intermediate": 1.0, "intermediate_layers": [[0, 0], [-2, -2]]}
    for ahead in (None, 2):
        gloo(2, distill, options(sources, tmp_path / str(ahead), PIPELINE, ahead=ahead, **asked))
    for name, found in figures(tmp_path / "2").items():
        assert found == pytest.approx(figures(tmp_path / "None")[name], rel=1e-4 if name == "grad_norm" else 1e-5), name


def test_a_cached_teacher_gives_the_same_run(gloo, sources, wanted, tmp_path):
    """All of the vocabulary cached: to what float16 keeps. test_cache.py has smaller K."""
    cache = CacheTeacherConfig(
        output=str(tmp_path / "cache"),
        teacher=model_option(sources / "teacher" / "model"),
        data=CacheDataConfig(path=str(sources / "data"), sequence_length=LENGTH),
        trainer=CacheRunConfig(steps=STEPS, global_batch_size=8, validation_samples=9),
        distill=CacheOptions(top_k=300),
    )
    gloo(2, cache_teacher, cache)
    gloo(2, distill, options(sources, tmp_path / "run", PIPELINE, loss="topk_kl", top_k=300, cache=cache.output))
    for name, found in figures(tmp_path / "run").items():
        assert found == pytest.approx(wanted[name], rel=5e-3), name


def bytes_of_teacher(cfg: DistillConfig) -> int:
    """Bytes of weights that this rank keeps of a loaded teacher."""
    beside = load_teacher(cfg, open_model_folder(cfg.teacher.path), Layout.from_config(cfg.parallel))
    matrices = [beside.head.weight] if beside.head else []
    return sum(p.numel() * p.itemsize for p in [*beside.chunks[0].parameters(), *matrices])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("layout", "beside"), [(PIPELINE, {"tensor": 2, "pipeline": 1}), (TENSOR, {"tensor": 1, "pipeline": 2})]
)
def test_a_dry_run_knows_what_a_teacher_in_a_layout_of_its_own_takes(gloo, sources, tmp_path, layout, beside, tied):
    """Its weights on each rank to the byte; and that hidden states are bounded."""
    teacher, student = imported(hf_model(0, tie_word_embeddings=tied), tmp_path), sources / "student" / "model"
    cfg = options(sources, tmp_path / "run", layout, beside)
    cfg.teacher = model_option(teacher)
    shapes = [open_model_folder(path).shape for path in (student, teacher)]
    full = Layout(**layout, world_size=2)
    own, fp32 = teacher_layout(cfg, full), torch.float32
    how = Arithmetic(fp32, "local")
    plan = Plan(*shapes, full, MicroBatch.of(1, LENGTH, full), 8, how, how, own, ahead=4)
    stages = take_census(*shapes, full, fp32, fp32, own)
    weights = [memory_of_stage(stage, plan)["teacher weights"] for stage in stages]
    assert weights == gloo(2, bytes_of_teacher, cfg, layout=full)
    unbounded = replace(plan, ahead=None)
    states, all_states = (
        [memory_of_stage(stage, one)["teacher hidden states"] for stage in stages] for one in (plan, unbounded)
    )
    assert all_states == [2 * n for n in states] and max(states) >= 4 * LENGTH * 32 * 4


UNEVEN = ModelShape(
    family="llama", num_layers=5, hidden_size=32, ffn_hidden_size=(48, 16, 64, 64, 16), num_attention_heads=8,
    num_query_groups=4, head_dim=8, vocab_size=300, max_position_embeddings=128, rope_theta=1e4, norm_eps=1e-5,
    tied_embeddings=False, dtype="float32",
)  # fmt: skip


def random_teacher(shape: ModelShape, layout: Layout):
    """A teacher of random weights, the same ones at each call, not told that it is frozen yet."""
    chunks = build_model_chunks(shape, layout, torch.float32, "local")
    draw = torch.Generator().manual_seed(1)
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        parameter.data.normal_(std=0.1, generator=draw)
    return chunks


def random_batches(shape: ModelShape, count: int):
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, shape.vocab_size, (count, 1, LENGTH), generator=draw)
    place = torch.arange(LENGTH).expand(1, LENGTH)
    return [{"tokens": some, "position_ids": place} for some in tokens]


def states_of(chunks, layout: Layout) -> list[torch.Tensor]:
    """Final hidden states of six micro-batches."""
    beside, batches = Teacher(chunks, pipelined=layout.pipeline > 1), random_batches(UNEVEN, 6)
    beside.run_ahead(batches)
    for batch in [] if beside.pipelined else batches:
        beside.run(batch)
    return list(beside.states)


def states_in_both_ways(layout: Layout):
    """States of a teacher as it is, and offloaded; then its layers' storages while they run, between passes and on the CPU."""
    plain = states_of(random_teacher(UNEVEN, layout), layout)
    chunks, running = random_teacher(UNEVEN, layout), set()
    offloaded = offload_layers(chunks)
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: running.update(storages(layer.parameters())))
    states = states_of(chunks, layout)
    between = storages(p for layer in layers for p in layer.parameters())
    return plain, states, running, between, storages(layer.memory for layer in offloaded.layers)


def storages(tensors) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("layout", [DATA, PIPELINE, INTERLEAVED, SEQUENCE], ids=names)
def test_a_teacher_in_cpu_memory_gives_the_same_states_out_of_two_buffers(gloo, layout):
    """Bit for bit, of layers that differ in size; between its passes nothing of them is in the buffers' memory."""
    ranks = 2 if layout else 1
    found = gloo(ranks, states_in_both_ways, Layout(**layout, world_size=ranks), layout=layout)
    for rank, (plain, offloaded, running, between, on_cpu) in enumerate(found):
        answers = rank == ranks - 1 or "pipeline" not in layout
        assert len(plain) == len(offloaded) == (6 if answers else 0)
        assert all(torch.equal(*both) for both in zip(plain, offloaded, strict=True))
        assert len(running) == 2 and not running & on_cpu
        assert between == on_cpu and len(on_cpu) in ((2, 3) if "pipeline" in layout else (5,))


def held_after_each(shape: ModelShape) -> list[list[int | None]]:
    """Which layer's weights each buffer has after each of two micro-batches, the least recently used first."""
    chunks = random_teacher(shape, Layout())
    offloaded = offload_layers(chunks)
    beside, found = Teacher(chunks, pipelined=False), []
    for batch in random_batches(shape, 2):
        beside.run(batch)
        found.append([slot.layer for slot in offloaded.slots])
    return found


def test_the_next_micro_batchs_first_layer_is_there_when_it_begins(gloo):
    assert gloo(1, held_after_each, UNEVEN, layout=Layout()) == [[[0, 4], [0, 4]]]
    one = replace(UNEVEN, num_layers=1, ffn_hidden_size=48)
    assert gloo(1, held_after_each, one, layout=Layout()) == [[[None, 0], [None, 0]]]


@pytest.mark.parametrize(
    ("layout", "beside", "loss"),
    [
        (PIPELINE, None, {"intermediate": 1.0, "intermediate_layers": [[0, 0], [-2, -2]]}),
        (PIPELINE, {"tensor": 2, "pipeline": 1}, {}),
    ],
    ids=names,
)
def test_a_run_beside_a_teacher_in_cpu_memory_is_the_run_without(gloo, sources, tmp_path, layout, beside, loss):
    """All its figures, exactly."""
    for name, offload in (("plain", False), ("offloaded", True)):
        gloo(2, distill, options(sources, tmp_path / name, layout, beside, teacher_offload=offload, **loss))
    assert figures(tmp_path / "offloaded") == figures(tmp_path / "plain")


@pytest.mark.parametrize(
    ("sizes", "own"),
    [({}, None), ({"tensor": 2}, None), (PIPELINE, None), (PIPELINE, {"tensor": 2, "pipeline": 1})],
    ids=names,
)
def test_a_dry_run_counts_two_buffers_in_place_of_a_teachers_layers(sizes, own):
    """To the byte against the built models' counts: everything but layers, and twice the largest of them."""
    layout, fp32 = Layout(**sizes, world_size=2), torch.float32
    how, own = Arithmetic(fp32, "local"), Layout(**own, world_size=2) if own else None
    plan = Plan(UNEVEN, UNEVEN, layout, MicroBatch.of(1, LENGTH, layout), 8, how, how, own)
    stages = take_census(UNEVEN, UNEVEN, layout, fp32, fp32, own)
    offloaded = replace(plan, teacher_how=replace(how, offloaded=True))
    tensor = plan.of_teacher.layout.tensor
    for stage in stages:
        layers = layers_in_cpu_memory(stage, offloaded)
        numbers = [number for chunk in stage.teacher for number in chunk.layers]
        gains = 2 * 32
        sharded = [2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * UNEVEN.ffn_of_layers[number] for number in numbers]
        assert layers == [4 * (n // tensor + gains) for n in sharded]
        before, after = (memory_of_stage(stage, one)["teacher weights"] for one in (plan, offloaded))
        assert before - after == sum(layers) - 2 * max(layers)
        assert not layers_in_cpu_memory(stage, plan)


LAYOUTS = [
    Layout(world_size=8),
    Layout(tensor=2, sequence=True, world_size=8),
    Layout(tensor=4, pipeline=2, world_size=8),
    Layout(pipeline=4, context=2, world_size=8),
    Layout(tensor=2, context=2, sequence=True, world_size=8),
    Layout(tensor=2, context=2, pipeline=2, sequence=True, world_size=8),
]


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
@pytest.mark.parametrize("target", LAYOUTS, ids=str)
def test_every_position_travels_once_to_each_rank_that_needs_it(source, target):
    """Of tokens and of final hidden states, context and sequence parallel too; both ends name the same messages in order."""
    count, length = 5, 16
    for sides in (
        (Side.of_tokens(source), Side.of_tokens(target)),
        (Side.of_final_states(source), Side.of_final_states(target)),
    ):
        sent = {rank: list(messages(*sides, rank, count, length)) for rank in range(8)}
        for rank in range(8):
            for number in sides[1].numbers(rank, count):
                mine = [m for m in sent[rank] if m.to == rank and m.number == number]
                places = np.concatenate([m.places for m in mine])
                has = np.concatenate([sides[0].positions(m.sender, length)[m.rows] for m in mine])
                needs = sides[1].positions(rank, length)
                assert sorted(places) == list(range(len(needs))) and (needs[places] == has).all()
                assert all(number in sides[0].numbers(m.sender, count) for m in mine)
            for other in range(8):
                between = [
                    [(m.number, m.rows.tolist()) for m in sent[end] if (m.sender, m.to) == (rank, other)]
                    for end in (rank, other)
                ]
                assert between[0] == between[1]


def test_teachers_that_cannot_be_are_refused(sources, tmp_path):
    """In one line, before anything is written."""
    teacher, student = (open_model_folder(sources / name / "model").shape for name in ("teacher", "student"))
    option = r"distill\.teacher_parallel"
    for world, chosen, says in (
        (3, {"teacher": {"tensor": 2}}, option + r"\.tensor × pipeline × context = 2 × 1 × 1 = 2 does not divide"),
        (3, {"teacher": {"pipeline": 3}}, option + r"\.pipeline=3 does not divide num_layers=4 .* use 1 or 2"),
        (3, {"teacher": {"tensor": 3}}, option + r"\.tensor=3 does not divide num_query_groups=4 of the teacher"),
        (6, {"teacher": {"pipeline": 6}}, option + r"\.pipeline=6 is more than num_layers=4 of the teacher"),
        (3, {"teacher": {"context": 3}}, r"=32 is not a multiple of the 6 parts .*" + option),
        (2, {"layout": INTERLEAVED, "ahead": 3}, r"distill\.teacher_ahead=3 is not a multiple of the 2 stages"),
        (
            2,
            {"cache": "x", "ahead": 2},
            r"distill\.teacher_ahead and distill\.teacher_parallel are for a teacher that runs",
        ),
        (2, {"cache": "x", "teacher_offload": True}, r"distill\.teacher_offload is for a teacher that runs"),
        (2, {"teacher_fp8": "tensorwise", "teacher_offload": True}, "FP8 weights stay on the GPU: choose one"),
    ):
        cfg = options(sources, tmp_path / "run", **chosen)
        cfg.parallel.world_size, cfg.trainer.global_batch_size = world, 12
        with pytest.raises(UserError, match=says) as error:
            check_pair(teacher if cfg.teacher.path else None, student, cfg, Layout.from_config(cfg.parallel))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_parameters_in_cpu_memory_begin_at_multiples_and_do_not_overlap():
    module = torch.nn.Module()
    for number, size in enumerate((3, 130, 128)):
        module.register_parameter(str(number), torch.nn.Parameter(torch.full((size,), float(number))))
    layer = _Layer(module)
    assert layer.starts == [0, 512, 1536] and layer.bytes == 2048
    assert [set(p.tolist()) for p in module.parameters()] == [{0.0}, {1.0}, {2.0}]
    assert not any(p.requires_grad for p in module.parameters())
