"""The parts of a job, one by one: layouts, devices, process groups, one rank's decisions, and what stands in for a GPU."""

import datetime
import math
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from minitron_megatron.config import HardwareConfig, ParallelConfig
from minitron_megatron.errors import UserError
from minitron_megatron.parallel import collectives, cpu, deciding, hardware, job, tools
from minitron_megatron.parallel.cpu import adapter, import_megatron, without_adapter
from minitron_megatron.parallel.deciding import check_same, wait_until_seen
from minitron_megatron.parallel.fake import fake_job
from minitron_megatron.parallel.job import (
    check_device_type,
    model_parallel,
    parallel_job,
    pick_device,
    process_group,
    process_groups,
)
from minitron_megatron.parallel.layout import Layout, world_size_from_env
from minitron_megatron.parallel.tools import check_device, tool_job
from tests.test_bounds import refused

SOON = datetime.timedelta(seconds=20)


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No variables of torchrun."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


# Layouts


def test_a_layout_of_nothing_is_one_process():
    assert Layout() == Layout(1, 1, None, False, 1, 1, False, False, None, "another option")
    assert (Layout().data, Layout().stages, Layout().rank(tensor=0, pipeline=0, data=0)) == (1, 1, 0)
    found = Layout(tensor=2, pipeline=3, context=2, virtual_pipeline=2, world_size=24)
    assert (found.data, found.stages) == (2, 6) and Layout(pipeline=3, world_size=3).stages == 3
    assert found.rank(tensor=1, pipeline=2, data=1) == 1 + 2 * (0 + 2 * (1 + 2 * 2))


@pytest.mark.parametrize(
    ("sizes", "taken"),
    [
        ({"world_size": 2**20}, True),
        ({"world_size": 2**20 + 1}, False),
        ({"context": 0}, False),
        ({"pipeline": 2, "world_size": 2, "virtual_pipeline": 2}, True),
        ({"pipeline": 2, "world_size": 2, "virtual_pipeline": 1}, False),
        ({"virtual_pipeline": 2}, False),
        ({"tensor": 2, "context": 3, "pipeline": 2, "world_size": 12}, True),
        ({"tensor": 2, "context": 3, "pipeline": 2, "world_size": 6}, False),
    ],
)
def test_layouts_that_are_taken(sizes, taken):
    assert refused(Layout, **sizes) is not taken


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"tensor": 3, "pipeline": 2, "world_size": 8}, "4 × 2 × 1 or 2 × 2 × 1 or 4 × 1 × 1"),
        ({"tensor": 2, "context": 3, "world_size": 4}, "2 × 1 × 2 or 1 × 1 × 4 or 1 × 1 × 2"),
        ({"tensor": 16, "world_size": 4}, "4 × 1 × 1 or 2 × 1 × 1 or 1 × 1 × 1"),
    ],
)
def test_the_three_nearest_layouts_that_fit_are_named(sizes, says):
    """By how many times as large each size is; context parallelism is proposed to whom asks for it."""
    with pytest.raises(UserError, match=rf"or use {says}$"):
        Layout(**sizes)


def test_layouts_are_named_by_what_is_split():
    assert str(Layout(tensor=2, pipeline=2, context=2, world_size=16)) == "tensor 2 × pipeline 2 × context 2 × data 2"
    assert str(Layout(sequence=True)) == "one process, sequence parallel"


def test_a_layout_without_a_split_context_has_neighbours_without_one():
    with pytest.raises(UserError, match=r"or use 4 × 1 × 1 or 2 × 1 × 1 or 4 × 2 × 1$"):
        Layout(tensor=3, world_size=8)


@pytest.mark.parametrize(
    ("given", "planned", "started", "found"),
    [(8, 4, "2", 8), (None, 4, "2", 4), (None, None, "2", 2), (None, None, None, 1)],
)
def test_processes_are_those_that_are_said_then_planned_then_started(monkeypatch, given, planned, started, found):
    if started:
        monkeypatch.setenv("WORLD_SIZE", started)
    assert Layout.from_config(ParallelConfig(world_size=planned), given).world_size == found
    assert world_size_from_env() == int(started or 1)


# Devices and groups


@pytest.mark.parametrize("cuda", [False, True])
def test_devices(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("cpu").type == "cpu"
    for name in ("auto", "cuda"):
        if cuda:
            assert pick_device(name) == torch.device("cuda", 3)
        elif name == "cuda":
            assert refused(pick_device, name) and refused(check_device, name)
        else:
            assert pick_device(name).type == "cpu"
    assert not refused(check_device, "auto") and not refused(check_device, "cpu")
    monkeypatch.delenv("LOCAL_RANK")
    assert not cuda or pick_device("auto") == torch.device("cuda", 0)


@pytest.mark.parametrize(("device", "context", "taken"), [("cpu", 1, True), ("cpu", 2, False), ("cuda", 2, True)])
def test_what_a_job_is_made_of_in_its_order(monkeypatch, device, context, taken):
    """Processors first, then the group, whose ranks compare what they compute with; Megatron's groups; the precision."""
    said, layout = [], Layout(context=context, world_size=context)

    def part(name):
        class Part:
            def __init__(self, *given):
                self.given = given

            def __enter__(self):
                said.append((name, *self.given))

            def __exit__(self, *_):
                said.append(f"no {name}")

        return Part

    for name in ("adapter", "process_group", "model_parallel", "settled"):
        monkeypatch.setattr(job, name, part(name))
    monkeypatch.setattr(job, "pick_device", lambda name: torch.device(name))
    monkeypatch.setattr(job, "check_same", lambda given, what: said.append(("check_same", what, sorted(given)[0])))
    monkeypatch.setattr(torch.cuda, "set_device", lambda where: said.append(("set_device", where.type)))
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    if not taken:
        with (
            pytest.raises(UserError, match=r"parallel\.context=2 needs Transformer Engine"),
            parallel_job(layout, seed=1, device=device),
        ):
            pass
        return
    with parallel_job(layout, seed=7, device=device, timeout=SOON) as found:
        assert (found.layout, found.device.type, found.rank) == (layout, device, 5)
    first = ("adapter",) if device == "cpu" else ("set_device", "cuda")
    where = torch.device(device)
    assert said == [
        first,
        ("process_group", where, SOON),
        ("check_same", "software", "megatron-core"),
        ("model_parallel", layout, 7, SOON),
        ("settled", device),
        *("no settled", "no model_parallel", "no process_group", *(["no adapter"] * (device == "cpu"))),
    ]


def test_ranks_compare_the_releases_that_they_compute_with():
    found = job._software()
    assert found["torch"].startswith("2.") and found["megatron-core"].startswith("0.19")
    assert set(found) == {"torch", "megatron-core", "transformer-engine", "triton", "minitron-megatron"}


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_a_process_group_is_over_what_torchrun_started_or_this_process_alone(monkeypatch, started, alone):
    """It ends with its context; within another one it is that."""
    store, asked = dist.HashStore(), []
    monkeypatch.setattr(job, "ending_with_others", lambda seconds: asked.append(seconds) or warnings.catch_warnings())
    monkeypatch.setattr(job, "said_at_once", lambda: asked.append("said at once") or warnings.catch_warnings())
    monkeypatch.setattr(dist, "rendezvous", lambda where, timeout: iter([(store, 0, 1)]))
    if started:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "1")
    for _ in range(2):
        with process_group(torch.device("cpu"), SOON, alone=alone):
            assert dist.get_backend() == "gloo" and (dist.get_rank(), dist.get_world_size()) == (0, 1)
            group = dist.group.WORLD
            with process_group(torch.device("cpu"), alone=True):
                assert dist.group.WORLD is group
            assert dist.is_initialized()
        assert not dist.is_initialized()
    assert asked == [*([20.0] * (started and not alone)), "said at once"] * 2
    assert store.check(["start_0/device type"]) is (started and not alone)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE"])
def test_half_of_torchruns_variables_are_none(monkeypatch, missing):
    for name in {"RANK", "WORLD_SIZE"} - {missing}:
        monkeypatch.setenv(name, "1")
    with process_group(torch.device("cpu"), SOON):
        assert dist.get_world_size() == 1


def test_a_process_of_several_is_not_alone(monkeypatch):
    with process_group(torch.device("cpu"), SOON):
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        with process_group(torch.device("cpu")):
            pass
        with pytest.raises(ValueError, match="a group of 2"), process_group(torch.device("cpu"), alone=True):
            pass
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("nodes", "restarts", "key"), [(None, None, "start_0/k"), ("1", "2", "start_2/k"), ("2", "1", "k")]
)
def test_each_start_on_one_node_has_keys_of_its_own(monkeypatch, nodes, restarts, key):
    for name, value in (("GROUP_WORLD_SIZE", nodes), ("TORCHELASTIC_RESTART_COUNT", restarts)):
        if value:
            monkeypatch.setenv(name, value)
    store = dist.HashStore()
    job._of_this_start(store).set("k", "v")
    assert store.check([key])


def test_a_rank_waits_for_the_first_ones_device_and_not_for_ever():
    store = dist.HashStore()
    timer = threading.Timer(0.1, lambda: store.set("device type", "cuda"))
    timer.start()
    with pytest.raises(UserError, match=r"rank 1 .* would run on cpu, rank 0 on cuda"):
        check_device_type(store, 1, "cpu", SOON)
    timer.join()
    began = time.monotonic()
    check_device_type(dist.HashStore(), 1, "cpu", datetime.timedelta(seconds=0.1))
    assert 0.1 <= time.monotonic() - began < 5


@pytest.mark.parametrize("gloo", [False, True])
def test_megatrons_groups_are_made_seeded_and_ended(monkeypatch, gloo):
    from megatron.core import parallel_state, tensor_parallel

    asked, seeded = [], []
    made = parallel_state.initialize_model_parallel
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", lambda **how: asked.append(how) or made(**how))
    monkeypatch.setattr(
        tensor_parallel, "model_parallel_cuda_manual_seed", lambda seed, **how: seeded.append((seed, how))
    )
    with process_group(torch.device("cpu"), SOON):
        before = set(dist.distributed_c10d._world.pg_map)
        with pytest.raises(ValueError, match="on 1 processes"), model_parallel(Layout(world_size=2), 1):
            pass
        with model_parallel(Layout(), 7, datetime.timedelta(minutes=3), gloo_groups=gloo):
            assert torch.initial_seed() == 7 and len(set(dist.distributed_c10d._world.pg_map) - before) > 5
            groups = process_groups(Layout(), SOON)
            assert {
                name: getattr(groups, name).size() for name in ("tp", "cp", "pp", "dp", "dp_cp", "mp")
            } == dict.fromkeys(("tp", "cp", "pp", "dp", "dp_cp", "mp"), 1)
        assert set(dist.distributed_c10d._world.pg_map) == before
        assert not parallel_state.model_parallel_is_initialized()
    assert asked[0]["distributed_timeout_minutes"] == 3 and asked[0]["create_gloo_process_groups"] is gloo
    assert seeded == [(7, {"te_rng_tracker": False, "force_reset_rng": True})]


def test_groups_of_another_layout_are_along_its_axes(monkeypatch):
    """Tensor-parallel ranks are neighbours, then context, data and pipeline."""
    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", lambda groups, timeout: [groups])
    found = process_groups(Layout(tensor=2, context=2, pipeline=2, world_size=16))
    assert found.tp[:2] == [[0, 1], [2, 3]] and found.cp[:2] == [[0, 2], [1, 3]]
    assert found.dp[:2] == [[0, 4], [1, 5]] and found.pp[:2] == [[0, 8], [1, 9]]
    assert found.dp_cp[:2] == [[0, 2, 4, 6], [1, 3, 5, 7]] and found.tp_cp[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert found.tp_dp_cp[0] == [*range(8)] and found.mp[:2] == [[0, 1, 8, 9], [2, 3, 10, 11]]
    for name in ("tp", "cp", "dp", "pp", "dp_cp", "tp_cp", "tp_dp_cp", "mp"):
        assert sorted(rank for group in getattr(found, name) for rank in group) == [*range(16)]


@pytest.mark.parametrize(("size", "address", "grouped"), [(None, "x", 0), ("1", "x", 0), ("2", None, 0), ("2", "x", 1)])
def test_work_on_files_has_a_group_where_processes_can_meet(monkeypatch, size, address, grouped):
    asked = []
    monkeypatch.setattr(job, "process_group", lambda device: asked.append(device.type) or warnings.catch_warnings())
    for name, value in (("WORLD_SIZE", size), ("MASTER_ADDR", address)):
        if value:
            monkeypatch.setenv(name, value)
    with tool_job():
        pass
    assert asked == ["cpu"] * grouped and tools.__doc__


def test_a_rank_of_any_job_stands_in_one_process():
    with fake_job(Layout(tensor=2, pipeline=2, world_size=8), 5):
        assert (dist.get_rank(), dist.get_world_size()) == (5, 8) and dist.get_backend() == "fake"
        assert torch.empty(1).device.type == "meta" and collectives.on_last_stage()
        assert torch.initial_seed() == 0
    assert not dist.is_initialized() and torch.empty(1).device.type == "cpu"


# What a GPU can do


@pytest.mark.parametrize(("here", "wanted"), [("NVIDIA H200", "h200"), ("Tesla T4", "h100"), (None, "h100")])
def test_the_gpu_of_this_machine_is_meant_unless_another_is_named(monkeypatch, here, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: here)
    assert hardware.hardware(HardwareConfig()).gpu == wanted
    found = hardware.hardware(HardwareConfig(gpu="a100", gpus_per_node=0))
    assert (found.gpu, found.gpus_per_node, found.memory_gib) == ("a100", 0, 80)
    assert hardware.peak_flops(found, torch.bfloat16) == 1e12 * found.bf16_tflops > 1e14
    assert hardware.peak_flops(found, torch.float32) == 1e12 * found.fp32_tflops
    assert hardware.gpu_of("NVIDIA GB200") == "gb200" and hardware.gpu_of("NVIDIA L4") is None


# One rank decides


def test_ranks_that_have_read_other_things_are_named_by_the_first_of_them(monkeypatch):
    said = [("a", {"x": 1, "z": 2}), ("b", {"x": 1, "z": 2}), ("c", {"x": 1, "y": "n" * 99, "z": 3})]
    answers = [[b"1", b"1", b"2"], said]
    monkeypatch.setattr(collectives, "all_gather_objects", lambda mine: answers.pop(0))
    with pytest.raises(UserError) as error:
        check_same({}, "things")
    assert str(error.value) == (
        f"the ranks of this job have different things: y is not there on rank 0 (a), {'n' * 80} on rank 2 (c): give all "
        "nodes the same, and start again"
    )


def test_a_rank_looks_again_and_again_with_longer_pauses(tmp_path, monkeypatch):
    """A tenth of a second at first, a second at the most; each time the server is asked anew."""
    now, slept, looked = [0.0], [], []

    def sleep(seconds):
        slept.append(round(seconds, 2))
        now[0] += seconds
        if len(slept) == 9:
            (tmp_path / "late").touch()

    monkeypatch.setattr(deciding, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(deciding, "_look_anew", looked.append)
    assert deciding._not_seen((tmp_path, tmp_path / "late")) is None
    assert slept == [0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0, 1.0] and looked == [tmp_path] * 9
    slept[:] = [0.0] * 10
    assert deciding._not_seen((tmp_path, tmp_path / "none", tmp_path / "other")) == str(tmp_path / "none")
    assert 120 < now[0] - 4.26 < 123
    monkeypatch.undo()
    listed, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scan(folder))
    deciding._look_anew(tmp_path)
    deciding._look_anew(tmp_path / "none")
    assert listed == [tmp_path, tmp_path / "none"]


def test_who_does_not_see_a_file_is_named(monkeypatch):
    """Rank 0, which has made it, does not look."""
    said, first = [], [True, False]
    monkeypatch.setattr(deciding, "_not_seen", lambda paths: str(*paths))
    monkeypatch.setattr(collectives, "is_rank_zero", lambda: first.pop(0))
    monkeypatch.setattr(
        collectives, "all_gather_objects", lambda mine: said.append(mine[1]) or [("a", None), ("b", "x"), ("c", "y")]
    )
    for _ in range(2):
        with pytest.raises(UserError, match=r"^rank 1 \(b\) does not see x, which rank 0 \(a\) does"):
            wait_until_seen(Path("x"))
    assert said == [None, "x"]


# Without a group, and without a GPU


def test_collectives_do_not_need_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    monkeypatch.delitem(sys.modules, "torch.distributed")
    assert (collectives.rank(), collectives.world_size(), collectives.is_rank_zero()) == (0, 1, True)
    assert collectives.gather_objects(3) == collectives.all_gather_objects(3) == [3]
    assert collectives.broadcast_object(3) == 3 and collectives.on_last_stage()
    collectives.barrier()


@pytest.mark.parametrize(("backend", "devices"), [("nccl", [2]), ("gloo", None)])
def test_ranks_on_gpus_say_which_one_they_wait_on(monkeypatch, backend, devices):
    said = []
    live = SimpleNamespace(get_backend=lambda: backend, barrier=lambda *, device_ids: said.append(device_ids))
    monkeypatch.setattr(collectives, "_live", lambda: live)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    collectives.barrier()
    assert said == [devices]


def test_under_the_adapter_devices_that_are_no_gpu_stay():
    with adapter():
        assert torch.zeros(1, device="meta").device.type == "meta"
        assert torch.zeros(2).to(torch.float64).dtype is torch.float64 and torch.zeros(2).to("meta").is_meta
        assert torch.zeros(2).to(0, torch.float64, True).dtype is torch.float64
        assert torch.zeros(2).to("cuda", torch.float64).dtype is torch.float64
        assert torch.zeros(2).to(torch.ones(1, dtype=torch.int64)).dtype is torch.int64
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert not torch.cuda.is_available() and torch.cuda.device_count() == 1 and torch.cuda.memory_allocated() == 0
        event = torch.cuda.current_stream().record_event()
        assert event.query() is True and torch.cuda.Event().wait() is None
        seen = []
        without_adapter(lambda: seen.append(torch.zeros(1).type()))()
        assert seen == ["torch.FloatTensor"] and cpu._Active.depth == 1
        with adapter():
            assert cpu._Active.depth == 2
        assert cpu._Active.depth == 1 and torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert cpu._Active.depth == 0 and torch.zeros(1).type() == "torch.FloatTensor"


@pytest.mark.parametrize("device", [False, True, None, "cpu", "meta", torch.device("cpu")])
def test_what_is_no_cuda_device(device):
    assert not cpu._is_cuda(device)
    assert all(map(cpu._is_cuda, (0, 1, "cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 1))))


def test_functions_are_marked_by_nothing():
    assert cpu._marks_nothing(math.sqrt) is math.sqrt and cpu._marks_nothing(dynamic=True)(math.sqrt) is math.sqrt
    assert import_megatron("parallel_state").__name__ == "megatron.core.parallel_state"
    assert import_megatron().__name__ == "megatron.core"
