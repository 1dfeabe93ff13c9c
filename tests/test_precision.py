"""What `precision=auto` computes in: measured once a machine, one answer for all ranks, kept by what continues."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minitron_megatron.automatic import Choice
from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.config import (
    CacheTeacherConfig,
    DataConfig,
    DistillOptions,
    EvaluateConfig,
    ImportanceConfig,
    TrainerConfig,
)
from minitron_megatron.distill import cache_teacher
from minitron_megatron.evaluate.evaluate import evaluate
from minitron_megatron.importance.measure import measure_importance
from minitron_megatron.models import build
from minitron_megatron.models.build import model_dtype
from minitron_megatron.parallel import precision
from minitron_megatron.parallel.job import parallel_job
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.precision import DTYPES, PRODUCTS, Products
from minitron_megatron.train import saved
from minitron_megatron.train.distill import distill
from tests import computing
from tests.test_train import exit_code, options, untimed
from tests.tiny import data_folder, data_option, hf_model, imported, model_option

LENGTH = 32


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A teacher and a student in bfloat16, and data."""
    folder = tmp_path_factory.mktemp("sources")
    teacher = imported(hf_model(0), folder / "teacher", torch.bfloat16)
    imported(hf_model(1, hidden_size=24, intermediate_size=24), folder / "bfloat16", torch.bfloat16)
    data_folder(folder, teacher)
    return folder


def on_a_machine_for(dtypes: list[str], function, *args):
    """Call a function where each rank's own machine would choose a dtype, and say this."""
    own, before = dtypes[int(os.environ["RANK"])], precision.of_this_machine
    precision.of_this_machine = lambda: Choice("precision", own, f"since this machine is for {own}")
    try:
        return function(*args)
    finally:
        precision.of_this_machine = before


def dtypes_of_a_job(shapes) -> list[list[str]]:
    """What models of these shapes are computed in by each `precision=`, outside of a job and then in one."""

    def now():
        return [str(model_dtype(shape, how))[6:] for how in ("auto", "bf16", "fp32") for shape in shapes]

    before = now()
    with parallel_job(Layout(world_size=int(os.environ["WORLD_SIZE"])), seed=1, device="cpu"):
        return [before, now()]


@pytest.mark.parametrize("dtypes", [["bfloat16", "float32"], ["float32", "bfloat16"]])
def test_rank_zeros_machine_decides_for_all(gloo, sources, dtypes):
    """Ranks whose own measurements differ see one answer; it is about bfloat16 folders and `auto` alone."""
    stored = open_model_folder(sources / "teacher" / "model").shape
    shapes = [stored, replace(stored, dtype="float32")]
    asked = ["bfloat16"] * 2 + ["float32"] * 2
    answers = gloo(2, on_a_machine_for, dtypes, dtypes_of_a_job, shapes)
    assert answers == [[["bfloat16", "float32", *asked], [dtypes[0], "float32", *asked]]] * 2


@pytest.mark.bf16
@pytest.mark.parametrize("began", DTYPES)
def test_a_run_keeps_the_precision_it_began_with(gloo, sources, tmp_path, began):
    """On a machine for another one it goes on bit for bit as where it began, and a finished one is left as it is."""
    (other,) = set(DTYPES) - {began}
    how = {"dtype": "bfloat16", "steps": 4, "validation_samples": 0}
    whole, stopped = (options(sources, tmp_path / name, **how) for name in ("whole", "stopped"))
    gloo(1, on_a_machine_for, [began], distill, whole)
    gloo(1, on_a_machine_for, [began], exit_code, replace(stopped, trainer=replace(stopped.trainer, stop_after=2)))
    gloo(1, on_a_machine_for, [other], exit_code, stopped)
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "whole")
    manifest, of_whole = (read_manifest(tmp_path / name / "model") for name in ("stopped", "whole"))
    assert manifest["digest"] == of_whole["digest"]
    assert of_whole["precision"] == {"computed_in": began, "why": f"since this machine is for {began}"}
    assert manifest["precision"]["computed_in"] == began
    assert manifest["precision"]["why"].startswith(f"in which {tmp_path / 'stopped'} was begun; since this machine is")
    assert ("precision=fp32 would be faster" in manifest["precision"]["why"]) == (began == "bfloat16")
    made = manifest["made"]
    gloo(1, on_a_machine_for, [other], distill, stopped)
    assert read_manifest(tmp_path / "stopped" / "model")["made"] == made


@pytest.mark.bf16
def test_the_choice_shows_in_the_sums_and_not_on_disk(gloo, sources, tmp_path):
    """A student computed in float32 is published in its folder's bfloat16."""
    for dtype in DTYPES:
        cfg = options(sources, tmp_path / dtype, dtype="bfloat16", steps=1, validation_samples=0)
        gloo(1, on_a_machine_for, [dtype], distill, cfg)
    assert untimed(tmp_path / "float32") != untimed(tmp_path / "bfloat16")
    for dtype in DTYPES:
        folder = open_model_folder(tmp_path / dtype / "model")
        stored = WeightReader(folder.weights).metadata.state_dict_metadata
        assert folder.shape.dtype == "bfloat16"
        assert {v.properties.dtype for v in stored.values() if hasattr(v, "properties")} == {torch.bfloat16}


@pytest.mark.bf16
def test_a_run_from_before_machines_decided_is_in_its_folders_dtype(gloo, sources, tmp_path):
    cfg = options(sources, tmp_path / "run", dtype="bfloat16", steps=2, validation_samples=0)
    gloo(1, on_a_machine_for, ["bfloat16"], exit_code, replace(cfg, trainer=replace(cfg.trainer, stop_after=1)))
    (tmp_path / "run" / precision.FILE).unlink()
    first = tmp_path / "run" / "checkpoints" / "step_00000001"
    replace(saved.Written.read(first), computed_in=None).write(first)
    gloo(1, on_a_machine_for, ["float32"], exit_code, cfg)
    assert read_manifest(tmp_path / "run" / "model")["precision"]["computed_in"] == "bfloat16"


def test_a_run_goes_on_in_what_its_checkpoint_was_computed_in(gloo, sources, tmp_path):
    """Whatever the file beside it says, or though it is gone."""
    cfg = options(sources, tmp_path / "run", dtype="bfloat16", steps=2, validation_samples=0)
    gloo(1, on_a_machine_for, ["float32"], exit_code, replace(cfg, trainer=replace(cfg.trainer, stop_after=1)))
    assert saved.computed_in(tmp_path / "run" / "checkpoints") == "float32"
    (tmp_path / "run" / precision.FILE).unlink()
    gloo(1, on_a_machine_for, ["bfloat16"], exit_code, cfg)
    assert read_manifest(tmp_path / "run" / "model")["precision"]["computed_in"] == "float32"


@pytest.mark.bf16
def test_a_damaged_record_of_a_run_is_one_line(gloo, sources, tmp_path):
    cfg = options(sources, tmp_path / "run", dtype="bfloat16", steps=2, validation_samples=0)
    gloo(1, on_a_machine_for, ["bfloat16"], exit_code, replace(cfg, trainer=replace(cfg.trainer, stop_after=1)))
    (tmp_path / "run" / precision.FILE).write_text('{"computed_in": "float8"}')
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(Exception, match=r"precision.json cannot be read .*write \{\"computed_in\": \"bfloat16\"\}"):
        gloo(1, exit_code, cfg)


def cached_until(cfg: CacheTeacherConfig, files: int) -> None:
    """Make a cache, and be killed before file number `files`."""
    write, written = cache_teacher.write_chunk, []

    def writing(*rest):
        if len(written) == files:
            raise RuntimeError("killed")
        written.append(rest)
        return write(*rest)

    cache_teacher.write_chunk = writing
    try:
        cache_teacher.cache_teacher(cfg)
    except RuntimeError:
        pass
    finally:
        cache_teacher.write_chunk = write


@pytest.mark.bf16
def test_a_killed_cache_goes_on_in_what_it_began_with(gloo, sources, tmp_path):
    """The same bytes as one that was made at once; made in the other dtype they differ."""
    cfg = CacheTeacherConfig(
        output="",
        teacher=model_option(sources / "teacher" / "model"),
        data=data_option(sources / "data", LENGTH),
        trainer=TrainerConfig(steps=2, global_batch_size=4, micro_batch_size=2, validation_samples=0),
        distill=DistillOptions(top_k=8),
        chunk_samples=2,
    )
    at = {name: replace(cfg, output=str(tmp_path / name)) for name in ("whole", "killed", "other")}
    gloo(1, on_a_machine_for, ["bfloat16"], cache_teacher.cache_teacher, at["whole"])
    gloo(1, on_a_machine_for, ["float32"], cache_teacher.cache_teacher, at["other"])
    gloo(1, on_a_machine_for, ["bfloat16"], cached_until, at["killed"], 2)
    gloo(1, on_a_machine_for, ["float32"], cache_teacher.cache_teacher, at["killed"])
    found = {name: read_manifest(tmp_path / name) for name in at}
    assert found["killed"]["digest"] == found["whole"]["digest"] != found["other"]["digest"]
    assert found["killed"]["precision"]["computed_in"] == "bfloat16"
    assert found["other"]["precision"]["computed_in"] == "float32"
    assert not list((tmp_path / "killed").glob(".*"))


@pytest.mark.bf16
def test_a_finished_output_is_the_same_on_every_machine(gloo, sources, tmp_path):
    """The same words find it, whatever this machine would compute in."""
    given = {"model": model_option(sources / "teacher" / "model"), "data": DataConfig(str(sources / "data"), LENGTH)}
    for work, cfg in (
        (measure_importance, ImportanceConfig(output=str(tmp_path / "scores"), samples=4, **given)),
        (evaluate, EvaluateConfig(output=str(tmp_path / "evaluated"), samples=2, **given)),
    ):
        gloo(1, on_a_machine_for, ["float32"], work, cfg)
        manifest = read_manifest(cfg.output)
        assert manifest["precision"]["computed_in"] == "float32" and manifest["config"]["precision"] == "auto"
        gloo(1, on_a_machine_for, ["bfloat16"], work, cfg)
        assert read_manifest(cfg.output) == manifest


@pytest.mark.bf16
def test_what_is_asked_for_is_what_is_done(gloo, sources, tmp_path):
    """precision=fp32 and bf16 ask no machine, and the manifest's options say so already."""
    given = {"model": model_option(sources / "teacher" / "model"), "data": DataConfig(str(sources / "data"), LENGTH)}
    cfg = ImportanceConfig(output=str(tmp_path / "scores"), samples=4, precision="bf16", **given)
    gloo(1, on_a_machine_for, ["float32"], measure_importance, cfg)
    assert "precision" not in read_manifest(cfg.output)


# The measurement, and where it is kept.


def rates(gain: float) -> dict[str, dict[str, float]]:
    """GFLOP/s of products that are `gain` times as fast in bfloat16."""
    return {"float32": dict.fromkeys(PRODUCTS, 50.0), "bfloat16": dict.fromkeys(PRODUCTS, 50.0 * gain)}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder of one's own, and a machine whose products are counted rather than timed: bfloat16 is fast."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured = []

    def measure(sizes):
        measured.append(sizes)
        return rates(2.0)

    monkeypatch.setattr(precision, "measure", measure)
    return measured


def test_bfloat16_is_taken_only_where_it_is_clearly_faster():
    for gain, dtype in ((0.04, "float32"), (1.0, "float32"), (1.1, "float32"), (1.3, "bfloat16"), (2.5, "bfloat16")):
        assert Products(rates(gain), "here").dtype == dtype
    # One slow product of three is what a step waits for.
    uneven = rates(2.0)
    uneven["bfloat16"]["gradient of inputs"] = 5.0
    assert Products(uneven, "here").dtype == "float32"


def test_a_machine_is_measured_once(home):
    first = precision.products()
    assert precision.products() == first and home == [precision.SMALL]


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41"),
        lambda patch: patch.setenv("ATEN_CPU_CAPABILITY", "avx2"),
        lambda patch: patch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
        lambda patch: patch.setattr(torch, "__version__", "9.9.9"),
        lambda patch: patch.setattr(precision, "processor", lambda: ("another", "flags")),
        lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
    ],
    ids=["onednn", "aten", "mkl", "torch", "processor", "capability"],
)
def test_what_changes_the_answer_is_measured_anew(home, monkeypatch, change):
    precision.products()
    with monkeypatch.context() as patch:
        change(patch)
        precision.products()
        assert len(home) == 2
    precision.products()
    assert len(home) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "\x00\xff",
        lambda text: json.dumps({**json.loads(text), "of": "another machine"}),
        lambda text: json.dumps({**json.loads(text), "gflops": {"float32": {}}}),
        lambda text: text.replace("50.0", "-1"),
        lambda text: text.replace("50.0", "NaN"),
    ],
)
def test_a_damaged_cache_is_measured_again(home, tmp_path, damage):
    first = precision.products()
    (file,) = (tmp_path / "cache" / "minitron_megatron").iterdir()
    file.write_text(damage(file.read_text()))
    assert precision.products() == first and len(home) == 2
    assert precision.products() == first and len(home) == 2


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null/x", "relative"])
def test_no_place_for_the_cache_is_no_error(home, tmp_path, monkeypatch, place):
    """A read-only home, a file in its place; a relative XDG_CACHE_HOME counts as none, as its standard says."""
    monkeypatch.setenv("XDG_CACHE_HOME", place)
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.chdir(tmp_path)
    assert precision.products() == precision.products() and len(home) == 2
    assert not (tmp_path / "relative").exists()


def test_no_home_at_all_is_no_error(home, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert precision.products().dtype == "bfloat16"


def test_an_unclear_answer_is_asked_for_with_larger_products(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(precision, "measure", lambda sizes: rates(1.1 if sizes == precision.SMALL else 1.9))
    assert precision.products().dtype == "bfloat16"


@pytest.mark.parametrize("fast", DTYPES)
def test_a_loaded_machine_does_not_change_the_answer(monkeypatch, fast):
    """Other work makes six of seven times fifty times as long, of either dtype: the least ones count, and dtypes take turns."""
    clock = iter(range(10**6))
    monkeypatch.setattr(precision, "_products", lambda sizes, dtype: [lambda: 1e-3 if dtype == fast else 2e-3] * 3)
    monkeypatch.setattr(precision, "_seconds", lambda work: work() * (50 if next(clock) % 7 else 1))
    monkeypatch.setattr(precision, "_TIMES", 7)
    assert Products(precision.measure(precision.SMALL), "here").dtype == fast


def test_measuring_leaves_no_trace_in_a_run():
    torch.manual_seed(5)
    expected, threads = torch.randn(3), torch.get_num_threads()
    torch.manual_seed(5)
    precision.measure(precision.SMALL)
    assert torch.equal(torch.randn(3), expected) and torch.get_num_threads() == threads


def test_without_instructions_for_bfloat16_float32_is_taken(tmp_path):
    """oneDNN held to AVX2 multiplies bfloat16 as processors without AVX-512 do, though torch says AVX512."""
    code = "from minitron_megatron.parallel.precision import of_this_machine as f; print(f().value)"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "XDG_CACHE_HOME": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "float32"


def test_a_dry_run_says_what_it_would_be(sources, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        "minitron_megatron.models.build.of_this_machine", lambda: Choice("precision", "float32", "since it is faster")
    )
    cfg = ImportanceConfig(
        output=str(tmp_path / "scores"),
        samples=4,
        dry_run=True,
        device="cpu",
        model=model_option(sources / "teacher" / "model"),
        data=DataConfig(str(sources / "data"), LENGTH),
    )
    with caplog.at_level("INFO"):
        measure_importance(cfg)
    assert "precision=auto: would compute in float32, since it is faster" in caplog.text


def test_a_run_that_goes_on_says_once_what_it_computes_in(tmp_path, caplog):
    file = tmp_path / "precision.json"
    file.write_text('{"computed_in": "float32"}')
    with caplog.at_level("INFO", logger="minitron_megatron"):
        with precision.recalled(file):
            assert precision.auto_dtype("bfloat16") == "float32"
        assert not caplog.records
        with precision.settled("cpu"):
            precision.keep(file, begun=lambda: True)
            assert [precision.auto_dtype("bfloat16") for _ in range(2)] == ["float32"] * 2
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("device", "dtype", "noticed"),
    [("cpu", "bfloat16", True), ("cpu", "float32", False), ("meta", "bfloat16", False), ("cuda", "bfloat16", False)],
)
def test_the_mark_bf16_is_for_models_that_a_cpu_computes(tmp_path, monkeypatch, device, dtype, noticed):
    """Tests in tests/gpu have bfloat16 models on a GPU, and no mark."""
    made = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=torch.device(device))])
    monkeypatch.setattr(build, "build_gpt", lambda *_: made)
    monkeypatch.setenv(computing.VARIABLE, str(tmp_path / "bf16"))
    computing.watch()
    assert build.build_gpt(None, None, build.DTYPES[dtype]) is made
    assert computing.seen() is noticed
