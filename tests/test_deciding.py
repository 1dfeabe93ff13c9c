"""One rank decides: ranks that see other files, other clocks or other signals do one thing all the same."""

import ast
import builtins
import io
import os
import re
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from minitron_megatron.checkpoints.folder import open_model_folder, output_folder
from minitron_megatron.checkpoints.stamps import PREFIX, for_all_nodes
from minitron_megatron.data.datasets import training_samples
from minitron_megatron.data.folder import open_data
from minitron_megatron.errors import UserError
from minitron_megatron.parallel import collectives, deciding
from minitron_megatron.parallel.deciding import ask_rank_zero, check_same, from_rank_zero, wait_until_seen
from minitron_megatron.parallel.job import check_device_type
from minitron_megatron.train import run, saved
from tests import test_train
from tests.test_train import checkpoints, exit_code, options, signalled, untimed

PACKAGE = Path(__file__).resolve().parent.parent / "minitron_megatron"
sources = test_train.sources


@contextmanager
def blind(rank: int, pattern: str, seconds: float = 1e9, *, listings_alone: bool = False):
    """One rank does not see paths that match, for so long, as on a file system that several machines share."""
    until, hidden = time.monotonic() + seconds, re.compile(pattern)
    kept = {(os, name): getattr(os, name) for name in ("stat", "listdir", "scandir")}
    kept |= {(io, "open"): io.open, (builtins, "open"): builtins.open}

    def hides(path) -> bool:
        return bool(hidden.search(os.fsdecode(path))) if isinstance(path, str | bytes | os.PathLike) else False

    def looking(name, path, *rest, **how):
        if hides(path) and time.monotonic() < until and not listings_alone:
            raise FileNotFoundError(2, "No such file or directory", os.fsdecode(path))
        found = kept[io if name == "open" else os, name](path, *rest, **how)
        if name in ("stat", "open") or time.monotonic() >= until:
            return found
        where = os.fsdecode(path)
        left = [one for one in found if not hides(os.path.join(where, getattr(one, "name", one)))]
        return left if name == "listdir" else _Entries(left)

    def patched(name):
        return lambda path=".", *rest, **how: looking(name, path, *rest, **how)

    if collectives.rank() == rank:
        for owner, name in kept:
            setattr(owner, name, patched(name))
    try:
        yield
    finally:
        for (owner, name), whole in kept.items():
            setattr(owner, name, whole)


class _Entries(list):
    """What os.scandir gives, with fewer entries."""

    def __enter__(self):
        return iter(self)

    def __exit__(self, *_):
        pass

    def close(self):
        pass


# The helpers


def everywhere(folder: str) -> list:
    """What this rank has of each helper, where the ranks have different things to say."""
    rank, found = collectives.rank(), []
    found.append(ask_rank_zero(lambda: f"rank {rank}"))
    found.append(from_rank_zero(lambda: f"rank {rank}"))

    def wrong():
        raise UserError(f"rank {rank} has not found it")

    for look in (
        lambda: ask_rank_zero(wrong),
        lambda: from_rank_zero(wrong),
        lambda: check_same({"n": rank}, "things"),
    ):
        with pytest.raises(UserError) as error:
            look()
        found.append(str(error.value))
    check_same({"n": 1, "folder": folder}, "things")
    late = Path(folder) / "late"
    if rank == 0:
        late.touch()
    with blind(1, "late$", 0.3):
        wait_until_seen(late)
        found.append(late.exists())
    deciding.SECONDS_UNTIL_SEEN = 0.2
    with blind(1, "late$"), pytest.raises(UserError) as error:
        wait_until_seen(late)
    deciding.SECONDS_UNTIL_SEEN = 120.0
    return [*found, str(error.value)]


def test_one_answer_whatever_each_rank_would_say(gloo, tmp_path):
    first, second = gloo(2, everywhere, str(tmp_path))
    assert first[1:2] == ["rank 0"] and second[1:2] == [None]
    assert first[0] == second[0] == "rank 0" and first[2:] == second[2:]
    assert first[2] == first[3] == "rank 0 has not found it"
    assert re.fullmatch(
        r"the ranks of this job have different things: n is 0 on rank 0 \(.+\), 1 on rank 1 \(.+\): .+", first[4]
    )
    assert first[5] is True and re.match(r"rank 1 \(.+\) does not see .*/late, which rank 0 \(.+\) does: ", first[6])


def test_without_other_ranks_the_helpers_are_what_they_ask_for(tmp_path):
    assert ask_rank_zero(lambda: 3) == from_rank_zero(lambda: 3) == 3
    check_same({"any": 1}, "things")
    wait_until_seen(tmp_path / "nowhere")


def test_ranks_of_two_kinds_of_devices_do_not_wait_for_each_other():
    store = dist.HashStore()
    check_device_type(store, 0, "cuda")
    check_device_type(store, 3, "cuda")
    with pytest.raises(UserError, match=r"rank 3 \(.+\) would run on cpu, rank 0 on cuda"):
        check_device_type(store, 3, "cpu")


def test_copies_of_large_files_on_two_nodes_are_the_same_input():
    one, other = ({PREFIX + "a": f"5 bytes of {time}", PREFIX + "b": "sha256:1", "model": "x"} for time in (1, 2))
    assert for_all_nodes(one) == for_all_nodes(other)
    assert for_all_nodes(one) != for_all_nodes({**other, PREFIX + "a": "6 bytes of 1"})


# Output folders


def written_twice(folder: str, inputs: dict[str, str]) -> list:
    """Whether an output is done, the first time and the second; what is said where one rank has read another input."""
    found, given = [], {"command": "make", "config": {}, "inputs": inputs, "resume": True}
    path = Path(folder) / "out"
    with blind(1, r"out/manifest\.yaml$", 0.5), output_folder(path, **given) as out:
        found.append(out.done)
        if collectives.is_rank_zero():
            (out.path / "file").write_text("whole")
            out.results = {"made": 1}
    # Rank 1 still has an old listing: for it there is no such folder.
    with blind(1, "/out($|/)"), output_folder(path, **given) as out:
        found.append((out.done, out.results))
    other = {**inputs, "data": f"of rank {collectives.rank()}"}
    with pytest.raises(UserError) as error, output_folder(path.with_name("next"), **{**given, "inputs": other}):
        pass
    return [*found, str(error.value)]


def test_an_output_is_done_for_all_ranks_or_for_none(gloo, tmp_path):
    first, second = gloo(2, written_twice, str(tmp_path), {"model": "sha256:1"})
    assert first == second and first[:2] == [False, (True, {"made": 1})]
    assert "different options or inputs: data is of rank 0 on rank 0" in first[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def samples_seen_late(model: str, data: str) -> list:
    """Samples of an index that appears a moment later for the last rank."""
    folder = open_data(data, "train", open_model_folder(model).shape, 16)
    with blind(collectives.world_size() - 1, "/cache(/|$)", 0.5):
        samples = training_samples(folder, "train", sequence_length=16, seed=11, count=4)
    return [samples[i]["tokens"].tolist() for i in range(4)]


def test_an_index_of_samples_may_appear_late(gloo, sources):
    first, second = gloo(2, samples_seen_late, str(sources / "teacher" / "model"), str(sources / "data"))
    assert first == second


# Training


def other_listing(cfg) -> int | None:
    """Run the command, while rank 1 has old listings and sees no best checkpoint."""
    find_best = saved.find_best
    if collectives.rank() == 1:
        saved.find_best = lambda folder, **_: None
    try:
        with blind(1, r"step_00000003$", listings_alone=True):
            return exit_code(cfg)
    finally:
        saved.find_best = find_best


@pytest.mark.slow
def test_ranks_that_list_other_checkpoints_go_on_from_one(gloo, sources, tmp_path):
    """Of steps 2 and 3 rank 1 lists the first alone, and cannot see that its loss is one than which none is better."""
    options_of = {"keep_best": True, "publish": "best", "validation_interval": 1, "save_interval": 2}
    whole, stopped = (options(sources, tmp_path / name, {"tensor": 2}, **options_of) for name in ("whole", "stopped"))
    assert gloo(2, exit_code, whole) == [None] * 2
    assert gloo(2, signalled, stopped, signal.SIGTERM, 2) == [75] * 2
    second = tmp_path / "stopped" / "checkpoints" / "step_00000002"
    replace(saved.Written.read(second), figures={"validation_loss": 0.0}).write(second)
    assert gloo(2, other_listing, stopped) == [None] * 2
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "whole")
    assert checkpoints(tmp_path / "stopped") == [f"step_0000000{step}" for step in (2, 4, 6)]
    one, other = (open_model_folder(tmp_path / name / "model").digest for name in ("whole", "stopped"))
    assert one != other


def on_another_clock(cfg, rank: int) -> int | None:
    """Run the command, while an hour passes at once on one rank, after its start."""
    began, kept = [], run.time

    def monotonic() -> float:
        began.append(kept.monotonic())
        return began[-1] + (3600 if len(began) > 1 and collectives.rank() == rank else 0)

    run.time = SimpleNamespace(monotonic=monotonic)
    try:
        return exit_code(cfg)
    finally:
        run.time = kept


@pytest.mark.slow
def test_the_clock_of_one_rank_ends_a_run_or_none(gloo, sources, tmp_path):
    cfg = options(sources, tmp_path / "run", steps=3, validation_samples=0, time_limit_minutes=30)
    assert gloo(2, on_another_clock, cfg, 1) == [None] * 2
    cfg = replace(cfg, output=str(tmp_path / "stopped"))
    assert gloo(2, on_another_clock, cfg, 0) == [75] * 2
    assert checkpoints(tmp_path / "stopped") == ["step_00000001"]


@pytest.mark.slow
def test_ctrl_c_on_one_rank_is_the_exit_status_of_all(gloo, sources, tmp_path):
    cfg = options(sources, tmp_path / "run", steps=3, validation_samples=0)
    assert gloo(2, signalled, cfg, signal.SIGINT, 0) == [130] * 2


# The rule: nobody decides alone

# Looks at files, at the machine's memory, at the environment; comparisons with a clock are looked for too.
LOOKS = set(
    """exists is_file is_dir iterdir glob rglob listdir scandir walk disk_usage stat lstat access getsize find_checkpoints
    find_best has_work environ getenv number_of mem_get_info""".split()
)
CLOCKS = {"monotonic", "time", "perf_counter"}
ASKS = {"ask_rank_zero", "from_rank_zero", "keep"}
# Modules whose looks are nobody else's affair, and why.
ONE_PROCESS = "a command of one process, which starts others"
BEFORE = "before the ranks meet: it refuses, and what it has read is compared when they do (output_folder)"
RANK_ZERO = "called by rank 0 alone"
MODULES = {
    ONE_PROCESS: """candidates.run candidates.rungs composing compress_source pace demo demo_plan demo_speed stages status
    submit report.folders
    report.report report.trials throughput.run throughput.sources throughput.tensorrt_llm throughput.work benchmark.mistakes
    benchmark.loss machine witness""",
    "data are prepared by one process": "data.estimate data.prepare data.text data.tokenizer data.vocabulary",
    BEFORE: """cli.main cli.arguments cli.logs cli.spelling launcher evaluate.checks distill.cache_checks train.checks train.begin
    checkpoints.export_checks checkpoints.hf_folder checkpoints.nemo_folder checkpoints.stamps checkpoints.task_stamps
    data.folder data.indexed data.same_tokenizer prune.named prune.plan checkpoints.unfinished checkpoints.places""",
    RANK_ZERO: """checkpoints.card checkpoints.lineage checkpoints.tokenizer cli.next_command train.metrics starts
    evaluate.harness evaluate.answers""",
    "ends a process, and lets one of them speak": "claims first_moments unheard parallel.torchrun console",
    "the helpers themselves": "parallel.deciding",
}
# Functions elsewhere.
FUNCTIONS = {
    BEFORE: """checkpoints.folder.read_manifest checkpoints.folder._of_another_kind checkpoints.folder.open_model_folder
    checkpoints.folder.check_space
    checkpoints.folder.check_place checkpoints.folder.is_output asked._copied asked._names_file
    train.overlap.check_overlap_device parallel.job.pick_device parallel.job.process_group
    parallel.job._of_this_start parallel.job.check_device_type parallel.tools.tool_job
    parallel.precision.recalled train.saved.check_room train.saved.newest_whole train.saved._sized
    checkpoints.index.check_files checkpoints.index.read_index""",
    RANK_ZERO: """checkpoints.folder._already_there checkpoints.folder._finish checkpoints.locks.another_run
    checkpoints.locks.holder
    checkpoints.hf._write_companions checkpoints.hf._generation_config prune.prune._write_companions
    checkpoints.megatron_lm.all_arguments checkpoints.megatron_lm._write_companions checkpoints.nemo._write_context
    train.checkpoint._drop_old train.saved.find_checkpoints train.saved.described parallel.precision._machine
    parallel.precision._cache_folder parallel.precision._least_seconds checkpoints.archive.Archive.extract
    evaluate.hf.digest_of train.checkpoint.Saver._describe train.saved.best_whole
    train.saved.set_aside data.sample_index.what_is_odd data.sample_index._build""",
    "of files that this rank has written, and rank 0 is told of": """checkpoints.digests.digest_files
    train.checkpoint._write_and_digest train.checkpoint.Saver._complete""",
    "how many threads digest: no result depends on it": "train.checkpoint._threads",
    "all ranks agree on the choices that come of it": "automatic.graph_obstacles_of_machine",
    "which kernels: the same figures, or releases that are compared when a job begins (parallel/job.py)": """models.build._te_spec
    models.build.attention_in_fixed_order models.vocab_parallel.have_kernels models.build.pick_engine""",
    "each chunk is looked at by one rank, and all are told": "distill.cache.check_chunk",
    "sets what rank 0 was asked for": "train.overlap.user_buffers",
    "how many there are is the same for all": "parallel.layout.world_size_from_env",
    "for a message": "train.checkpoint._telling train.run._what_is_saved checkpoints.damage._is_there",
    "reads, and decides nothing": """checkpoints.archive.Archive._members checkpoints.zarr_arrays.ZarrArrays.__init__
    checkpoints.zarr_arrays.ZarrArrays._chunk""",
}


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


class Looking(ast.NodeVisitor):
    """Functions of a module that look for themselves: not in what rank 0 is asked, nor where it is known to be rank 0."""

    def __init__(self, tree: ast.Module) -> None:
        self.found: set[str] = set()
        self.where: list[str] = []
        asks = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and called(node) in ASKS]
        self.asked = {one.id for ask in asks for one in ask.args if isinstance(one, ast.Name)}
        self.visit(tree)

    def visit_Call(self, node):
        if called(node) not in ASKS:
            self.generic_visit(node)

    def visit_FunctionDef(self, node):
        if node.name not in self.asked:
            self.where.append(node.name)
            self.generic_visit(node)
            self.where.pop()

    visit_ClassDef = visit_FunctionDef

    def visit_If(self, node):
        if ast.unparse(node.test).startswith("collectives.is_rank_zero()"):
            for one in node.orelse:
                self.visit(one)
        else:
            self.generic_visit(node)

    def visit_Attribute(self, node):
        self._note(node.attr)
        self.generic_visit(node)

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load):
            self._note(node.id)

    def visit_Compare(self, node):
        if any(isinstance(one, ast.Attribute) and one.attr in CLOCKS for one in ast.walk(node)):
            self.found.add(".".join(self.where))
        self.generic_visit(node)

    def _note(self, name: str) -> None:
        if name in LOOKS:
            self.found.add(".".join(self.where))


def test_no_module_that_runs_in_a_group_decides_by_itself():
    alone = {name for names in MODULES.values() for name in names.split()}
    allowed = {name for names in FUNCTIONS.values() for name in names.split()}
    looking, modules = set(), set()
    for file in PACKAGE.rglob("*.py"):
        module = file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        found = Looking(ast.parse(file.read_text())).found
        modules |= {module} if found else set()
        looking |= {f"{module}.{function}" for function in found} if module not in alone else set()
    assert sorted(looking - allowed) == [], "ask rank 0 (parallel/deciding.py), or say here why it need not be asked"
    assert sorted(allowed - looking) == [] and sorted(alone - modules) == [], "nothing to be said of these any more"


def test_numbers_in_the_environment_are_read_in_one_place():
    """Whoever reads one by itself ends with a trace where somebody else's variable holds no number."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and called(node) in ("int", "float") and "os.environ" in ast.unparse(node):
                found.add(f"{file.relative_to(PACKAGE)}: {ast.unparse(node)}")
    # The address of a store that the job's launcher made; and number_of itself.
    assert found == {"claims.py: int(os.environ['MASTER_PORT'])", "claims.py: int(os.environ[variable])"}


@pytest.mark.parametrize("value", ["", "x", "0", "-1"])
def test_what_is_no_number_there_is_as_not_given(monkeypatch, value):
    from minitron_megatron.cli.next_command import _processes
    from minitron_megatron.train.checkpoint import _threads

    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert _threads() >= 1 and _processes() == 1


@pytest.mark.parametrize(
    "code",
    [
        "def f(p):\n    return [*p.iterdir()]",
        "def f(p):\n    return number_of('RANK', 0) + p",
        "def f(p):\n    if not collectives.is_rank_zero():\n        p.exists()",
        "def f(t):\n    while time.monotonic() < t:\n        pass",
        "def f(p):\n    return ask_rank_zero(lambda: 1) and os.path.getsize(p)",
    ],
)
def test_the_rule_sees(code):
    assert Looking(ast.parse(code)).found == {"f"}


@pytest.mark.parametrize(
    "code",
    [
        "def f(p):\n    return ask_rank_zero(lambda: [*p.iterdir()])",
        "def f(p):\n    def look():\n        return p.exists()\n    return from_rank_zero(look)",
        "def f(p):\n    if collectives.is_rank_zero():\n        p.exists()",
        "def f():\n    began = time.monotonic()\n    return time.monotonic() - began",
    ],
)
def test_the_rule_lets_pass(code):
    assert Looking(ast.parse(code)).found == set()
