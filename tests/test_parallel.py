"""Layouts, the CPU adapter under real Megatron training, collectives, and the pool that the tests themselves run in."""

import os
import time
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist

from minitron_megatron.config import ParallelConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.cpu import adapter
from minitron_megatron.parallel.job import before_groups_end, parallel_job
from minitron_megatron.parallel.layout import Layout
from tests.pool import Pool, WorkerError

SHAPE = ModelShape(
    family="llama",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=128,
    max_position_embeddings=16,
    rope_theta=1e4,
    norm_eps=1e-5,
    tied_embeddings=False,
    dtype="float32",
)
SAMPLES = 4
SEQUENCE = 16


# Layouts


def test_data_parallel_size_is_what_the_model_leaves():
    assert Layout.from_config(ParallelConfig(tensor=2, pipeline=2), 16).data == 4


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (
            {"tensor": 3, "world_size": 4},
            r"3 × 1 × 1 = 3 does not divide .* 4: .* multiple of 3 .* or use 4 × 1 × 1 or 2 × 1 × 1 or 1",
        ),
        ({"tensor": 2}, r"torchrun.* or use 1 × 1 × 1$"),
        ({"tensor": 2, "pipeline": 3, "world_size": 8}, "2 × 2 × 1"),
        ({"context": 3, "world_size": 4}, "1 × 1 × 2"),
        ({"tensor": 0}, "tensor=0 must be at least 1"),
        ({"virtual_pipeline": 2}, "virtual_pipeline=2 .* needs parallel.pipeline"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_impossible_layouts_are_refused_in_one_line(sizes, says):
    with pytest.raises(UserError, match=says) as error:
        Layout(**sizes)
    assert "\n" not in str(error.value)


def test_context_parallelism_is_refused_on_cpus():
    layout = Layout(context=2, world_size=2)
    with pytest.raises(UserError, match="Transformer Engine"), parallel_job(layout, seed=1, device="cpu"):
        pass


# The CPU adapter


def test_under_the_adapter_cuda_is_the_cpu():
    with adapter(), adapter():
        tensors = [torch.zeros(2, device=where) for where in ("cuda", "cuda:0", 0, torch.device("cuda"), "cpu")]
        tensors += [tensors[0].to("cuda"), tensors[0].to(0), tensors[0].to(device="cuda"), torch.randn(2).cuda()]
        tensors += list(torch.nn.Linear(2, 2).cuda().to("cuda:0").parameters())
        assert {t.device.type for t in tensors} == {"cpu"}
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1).type(torch.float64).dtype is torch.float64
        assert tensors[0].to(torch.float64).dtype is torch.float64
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            torch.cuda.synchronize()
        state = torch.cuda.get_rng_state()
        first = torch.randn(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(first, torch.randn(3))


def test_the_adapter_puts_everything_back_after_an_exception():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random

    owners = (torch.cuda, random, DistributedOptimizer)
    before = [dict(vars(owner)) for owner in owners]
    with pytest.raises(ZeroDivisionError), adapter(), adapter():
        raise ZeroDivisionError
    assert [dict(vars(owner)) for owner in owners] == before
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_layouts_have_readable_names():
    assert str(Layout()) == "one process"
    assert str(Layout(tensor=2, sequence=True, world_size=8)) == "tensor 2 × data 4, sequence parallel"
    assert str(Layout(pipeline=2, virtual_pipeline=3, world_size=2)) == "pipeline 2 in 3 chunks"


def test_a_job_needs_no_torchrun_and_leaves_nothing_behind():
    from megatron.core import parallel_state

    for _ in range(2):
        with pytest.raises(ZeroDivisionError), parallel_job(Layout(), seed=1, device="cpu") as job:
            assert (job.rank, job.device.type, dist.get_world_size()) == (0, "cpu", 1)
            assert parallel_state.model_parallel_is_initialized()
            raise ZeroDivisionError
        assert not dist.is_initialized()
        assert not parallel_state.model_parallel_is_initialized()


def test_what_holds_communicators_is_given_up_before_they_are_ended():
    """As CUDA graphs are, last first, and once: NCCL would wait for them for ever (tests/gpu/test_graphs.py)."""
    from megatron.core import parallel_state

    seen = []
    with pytest.raises(ZeroDivisionError), parallel_job(Layout(), seed=1, device="cpu"):
        for name in ("first", "last"):
            before_groups_end(lambda name=name: seen.append((name, parallel_state.model_parallel_is_initialized())))
        raise ZeroDivisionError
    with parallel_job(Layout(), seed=1, device="cpu"):
        pass
    assert seen == [("last", True), ("first", True)]


class Trainer:
    """A tiny model under Megatron's schedule, data parallelism and distributed optimizer."""

    def __init__(self, layout: Layout, dtype: torch.dtype, overlap: bool = False) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from minitron_megatron.models.build import build_model_chunks

        bare = build_model_chunks(SHAPE, layout, dtype)
        for name, parameter in (pair for chunk in bare for pair in chunk.named_parameters()):
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(sum(name.encode())))
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap
        )
        self.chunks = [DistributedDataParallel(c.config, ddp, c, disable_bucketing=i > 0) for i, c in enumerate(bare)]
        bf16 = dtype is torch.bfloat16
        config = OptimizerConfig(lr=1e-2, bf16=bf16, use_distributed_optimizer=True, overlap_param_gather=overlap)
        self.optimizer = get_megatron_optimizer(config, self.chunks)
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
            if overlap:
                chunk.config.no_sync_func = chunk.no_sync
        self.samples = SAMPLES // layout.data

    def step(self) -> float:
        """One step on the same global batch; its mean loss, on every rank."""
        from megatron.core import parallel_state as ps
        from megatron.core.pipeline_parallel import get_forward_backward_func

        tokens = torch.randint(0, SHAPE.vocab_size, (SAMPLES, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))
        mine = tokens[ps.get_data_parallel_rank() * self.samples :][: self.samples]
        positions = torch.arange(SEQUENCE)[None]

        def forward(rows, model):
            row = next(rows)[None]
            losses = model(row[:, :-1], positions, None, labels=row[:, 1:])
            return losses, lambda out: (
                out.sum(),
                torch.tensor(out.numel(), dtype=torch.int),
                {"sum": out.sum().detach()},
            )

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        rows = [iter(mine) for _ in self.chunks]
        reported = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=rows if len(rows) > 1 else rows[0],
            model=self.chunks,
            num_microbatches=self.samples,
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=False,
        )
        assert self.optimizer.step()[0]
        total = torch.tensor(sum((float(r["sum"]) for r in reported), 0.0))
        dist.all_reduce(total, group=ps.get_data_parallel_group())
        collectives.broadcast_from_last_stage(total)
        return total.item() / SAMPLES / SEQUENCE


def _losses(layout, dtype, overlap=False):
    trainer = Trainer(layout, dtype, overlap)
    return [trainer.step() for _ in range(4)]


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=[pytest.mark.slow, pytest.mark.bf16])],
    ids=["fp32", "bf16"],
)
@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        (1, {}),
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence": True}),
        (2, {"pipeline": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (4, {"tensor": 2, "pipeline": 2, "sequence": True}),
        (4, {"tensor": 2}),
    ],
    ids=str,
)
def test_megatron_trains_on_cpus_in_every_layout(gloo, world_size, sizes, dtype):
    layout = Layout(**sizes, world_size=world_size)
    losses = gloo(world_size, _losses, layout, dtype, layout=layout)
    assert losses == losses[:1] * world_size
    assert losses[0] == sorted(losses[0], reverse=True)
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_data_parallel_training_is_that_of_one_process(gloo, overlap):
    one = gloo(1, _losses, Layout(), torch.float32, layout={})[0]
    for ranks in (2, 4):
        layout = Layout(world_size=ranks)
        assert gloo(ranks, _losses, layout, torch.float32, overlap, layout=layout)[0] == pytest.approx(one, rel=1e-5)


def _optimizer_resumes(folder, kind, dtype, layout):
    """Losses of three more steps: of the trainer that goes on, and of a new one that loaded its checkpoint."""
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as ps

    def state(trainer, loading):
        metadata = {
            "distrib_optim_sharding_type": kind,
            "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
        }
        model = trainer.chunks[0].module.sharded_state_dict(metadata=metadata)
        return {"model": model, "optimizer": trainer.optimizer.sharded_state_dict(model, loading, metadata=metadata)}

    first = Trainer(layout, dtype)
    first.step()
    first.step()
    if collectives.is_rank_zero():
        os.makedirs(folder)
    collectives.barrier()
    dist_checkpointing.save(state(first, False), folder)
    second = Trainer(layout, dtype)
    loaded = dist_checkpointing.load(state(second, True), folder)
    second.chunks[0].module.load_state_dict(loaded["model"])
    second.optimizer.load_state_dict(loaded["optimizer"])
    return [first.step() for _ in range(3)], [second.step() for _ in range(3)]


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.bf16)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize(
    ("world_size", "sizes", "kind"),
    [(1, {}, "dp_reshardable"), (4, {"tensor": 2}, "dp_reshardable"), (4, {"tensor": 2}, "fully_reshardable")],
    ids=str,
)
def test_the_distributed_optimizer_resumes_exactly_on_cpus(gloo, tmp_path, world_size, sizes, kind, dtype):
    layout = Layout(**sizes, world_size=world_size)
    results = gloo(world_size, _optimizer_resumes, str(tmp_path / "x"), kind, dtype, layout, layout=layout)
    assert all(gone_on == resumed for gone_on, resumed in results)


# Collectives


def _collect():
    rank = collectives.rank()
    return {
        "all together": collectives.sum_over_all(torch.tensor([10.0**rank])),
        "last": collectives.broadcast_from_last_stage(float(rank)),
        "last_tensor": collectives.broadcast_from_last_stage(torch.tensor([rank])),
        "gathered": collectives.gather_objects({"rank": rank}),
        "all": collectives.all_gather_objects(rank),
        "first": collectives.broadcast_object(rank),
        "last stage": collectives.on_last_stage(),
    }


def test_collectives_run_over_the_groups_in_their_names(gloo):
    """Four ranks, tensor 2 and pipeline 2: [0 1] then [2 3]."""
    tensor = gloo(4, _collect, layout={"tensor": 2, "pipeline": 2})
    assert [r["all together"].item() for r in tensor] == [1111] * 4
    assert [r["last"] for r in tensor] == [r["last_tensor"].item() for r in tensor] == [2, 3, 2, 3]
    assert tensor[0]["gathered"] == [{"rank": i} for i in range(4)]
    assert [r["gathered"] for r in tensor[1:]] == [None] * 3
    assert all(r["all"] == [0, 1, 2, 3] and r["first"] == 0 for r in tensor)
    assert [r["last stage"] for r in tensor] == [False, False, True, True]


def test_collectives_are_no_ops_in_a_single_process():
    result = _collect()
    assert result["all together"] == 1 and result["last stage"]
    assert (result["last"], result["gathered"], result["all"], result["first"]) == (0.0, [{"rank": 0}], [0], 0)
    collectives.barrier()


# The pool


def _jobs():
    """A job inside a worker, as commands start it; then one that fails; then another."""
    layout = Layout.from_config(ParallelConfig(tensor=2))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), parallel_job(layout, seed=1) as job:
            assert dist.get_world_size(collectives.tensor_parallel_group()) == 2
            raise ZeroDivisionError
    return job.rank, os.getpid()


def _one_fails():
    if collectives.rank() == 1:
        raise UserError("no such thing")
    dist.all_reduce(torch.zeros(1))


def _one_hangs():
    if collectives.rank() == 1:
        time.sleep(60)
    dist.barrier()


def _one_dies():
    if collectives.rank() == 1:
        os._exit(3)
    dist.barrier()


def _has_a_child():
    """Like Megatron's checkpoint writer: it would outlive a killed parent."""
    child = get_context("spawn").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    return child.pid


def test_a_failing_rank_is_reported_and_the_pool_goes_on(gloo):
    before = gloo(2, _jobs)
    assert [rank for rank, _ in before] == [0, 1]
    with pytest.raises(WorkerError, match=r"(?s)rank 1 of 2:.*in _one_fails.*UserError: no such thing"):
        gloo(2, _one_fails, layout={"tensor": 2})
    assert gloo(2, _jobs) == before


@pytest.mark.slow
def test_a_rank_that_hangs_or_dies_is_replaced(gloo):
    with pytest.raises(WorkerError, match=r"(?s)no answer within 5 s.*_one_hangs"):
        gloo(2, _one_hangs, timeout=5)
    with pytest.raises(WorkerError, match="rank 1 of 2:\nthe process died"):
        gloo(2, _one_dies)
    assert [rank for rank, _ in gloo(2, _jobs)] == [0, 1]


@pytest.mark.slow
def test_closing_a_pool_leaves_no_process_behind():
    with Pool() as pool:
        (child,) = pool(1, _has_a_child)
        assert os.path.exists(f"/proc/{child}")
    assert not os.path.exists(f"/proc/{child}")


def told(rank: int) -> dict:
    """What every collective of control data gives a rank, of its number or its place."""
    from megatron.core import parallel_state as ps

    stage, data = ps.get_pipeline_model_parallel_rank(), ps.get_data_parallel_rank()
    mine = torch.full((2,), float(stage)) if stage == 0 else None
    moved = collectives.move_between_stages(mine, (2,), torch.float32, source=0, target=1)
    return {
        "rank": collectives.rank(),
        "last": collectives.on_last_stage(),
        "over data": collectives.gather_over_data_parallel(("data", data)),
        "over stages": collectives.gather_over_pipeline(("stage", stage)),
        "sum of stages": collectives.sum_over_pipeline(torch.tensor([stage + 1.0])).tolist(),
        "moved": None if moved is None else moved.tolist(),
        "of the last": collectives.broadcast_from_last_stage(float(10 + stage)),
        "of all": collectives.all_gather_objects(rank_of := collectives.rank()),
        "on the first": collectives.gather_objects(rank_of),
        "of the first": collectives.broadcast_object(("from", rank_of)),
        "summed": collectives.sum_from_last_stage([1.0 + data], [1.0]),
        "whole": collectives.sum_over_all(torch.tensor([1.0, rank_of])).tolist(),
    }


def test_what_each_collective_tells_each_rank(gloo):
    """Of two stages by two data-parallel ranks: ranks 0 and 1 are the first stage."""
    for rank, found in enumerate(gloo(4, told, 0, layout={"pipeline": 2})):
        assert found == {
            "rank": rank,
            "last": rank >= 2,
            "over data": [("data", 0), ("data", 1)],
            "over stages": [("stage", 0), ("stage", 1)],
            "sum of stages": [3.0],
            "moved": [0.0, 0.0] if rank >= 2 else None,
            "of the last": 11.0,
            "of all": [0, 1, 2, 3],
            "on the first": [0, 1, 2, 3] if rank == 0 else None,
            "of the first": ("from", 0),
            "summed": [3.0, 4.0],
            "whole": [4.0, 6.0],
        }
