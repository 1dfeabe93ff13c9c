"""Throughput: what is timed, in which form the engines get it, and what is made of their answers."""

import json
import os
import shutil
import stat
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron.checkpoints.hf import export_hf
from minitron_megatron.config import ExportHfConfig, ThroughputConfig
from minitron_megatron.errors import UserError
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.throughput import run as command
from minitron_megatron.throughput import sources, tensorrt_llm, work
from minitron_megatron.throughput.engines import transformers
from minitron_megatron.throughput.run import throughput
from minitron_megatron.throughput.show import add_ratios, best_rows
from minitron_megatron.throughput.sources import check_sources, open_sources
from minitron_megatron.throughput.work import Engine, Work, measure
from tests import jobs
from tests.test_bounds import SMALL_SHAPE
from tests.test_commands import run
from tests.tiny import hf_model, imported, model_option

WORK = Work(
    engine="transformers",
    folder="",
    vocab_size=300,
    batches=[1, 3],
    input_length=7,
    output_length=5,
    repeats=2,
    warmup=1,
    seed=1,
    dtype="float32",
    device="cpu",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """(a model folder, the same as a Hugging Face folder)."""
    folder = tmp_path_factory.mktemp("models")
    model = imported(hf_model(), folder)
    export_hf(ExportHfConfig(model=model_option(model), output=str(folder / "exported")))
    return model, folder / "exported"


def given(output: Path, **options) -> ThroughputConfig:
    lengths = {"input_length": 7, "output_length": 5, "batch": [1, 3], "repeats": 1, "warmup": 0}
    return ThroughputConfig(output=str(output), **{**lengths, **options})


def test_every_batch_size_is_a_row_of_the_timed_passes_alone():
    """Batches that run out of memory are rows too, and the others are measured; an engine that makes too little is refused."""

    class OutOfMemoryError(Exception):
        pass

    seen, rows = [], []

    def answer(prompts):
        seen.append(prompts)
        if len(prompts) == 2:
            raise OutOfMemoryError
        return len(prompts) * 5

    measure(replace(WORK, batches=[1, 2, 3]), Engine(answer, lambda: 0.5), rows.append)
    assert [len(prompts) for prompts in seen] == [1, 1, 1, 2, 3, 3, 3]
    assert all(len(prompt) == 7 and max(prompt) < 300 for prompts in seen for prompt in prompts)
    assert rows[1] == {"batch": 2, "tokens_per_second": None, "error": "out of memory"}
    for row in (rows[0], rows[2]):
        assert len(row["seconds_of_repeats"]) == 2 and row["memory_gib"] == 0.5
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 5 / row["seconds"])
    with pytest.raises(RuntimeError, match="4 tokens were made of 1 × 5"):
        measure(WORK, Engine(lambda prompts: 4, lambda: None), rows.append)


def test_a_text_does_not_end_before_its_length(folders, tmp_path):
    """Though the folder's own generation config calls every token the end."""
    shutil.copytree(folders[1], tmp_path / "hf")
    ends = {"eos_token_id": list(range(300)), "do_sample": True}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(ends))
    rows = []
    transformers(replace(WORK, folder=str(tmp_path / "hf")), rows.append)
    assert [row["batch"] for row in rows] == [1, 3] and all(row["tokens_per_second"] > 0 for row in rows)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=["tensor", "pipeline"])
def test_megatron_measures_in_a_layout(gloo, folders, layout):
    parallel = asdict(ThroughputConfig(output="").parallel) | layout
    work = asdict(replace(WORK, engine="megatron", folder=str(folders[0]), parallel=parallel))
    rows = gloo(2, jobs.throughput_rows, work)[0]
    assert [row["batch"] for row in rows] == [1, 3] and all(row["memory_gib"] > 0 for row in rows)


ROWS = [
    {"engine": "vllm", "batch": batch, "model": model, "tokens_per_second": rate}
    for model, rates in {"small": (30.0, 90.0), "large": (10.0, 40.0), "huge": (8.0, None)}.items()
    for batch, rate in zip((1, 8), rates, strict=True)
]


def test_ratios_are_over_the_first_model_at_the_same_batch_and_at_each_ones_best():
    rows = add_ratios([dict(row) for row in ROWS], ["large", "small", "huge"])
    assert [(row["batch"], row["model"]) for row in rows[:3]] == [(1, "large"), (1, "small"), (1, "huge")]
    assert [row["ratio"] for row in rows] == [1, 3, 0.8, 1, 2.25, None]
    best = best_rows(rows)["vllm"]
    assert {name: (row["batch"], row["ratio"]) for name, row in best.items()} == {
        "large": (8, 1.0),
        "small": (8, 2.25),
        "huge": (1, 0.2),
    }


def test_requests_of_trtllm_bench(tmp_path):
    """The form that prepare_dataset writes; as many as run at once, for each repeat."""
    tensorrt_llm.write_requests(WORK, 3, tmp_path / "requests.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [line["task_id"] for line in lines] == list(range(6))
    assert all(set(line) == {"task_id", "input_ids", "output_tokens"} and line["output_tokens"] == 5 for line in lines)
    assert [line["input_ids"] for line in lines] == WORK.prompts(3) * 2


def test_the_command_of_trtllm_bench_here_and_in_docker(tmp_path, monkeypatch):
    work = replace(WORK, folder="/models/small", parallel={"tensor": 2, "pipeline": 1})
    monkeypatch.setenv("PATH", str(tmp_path))
    docker = tensorrt_llm.command(work, "small", 3, tmp_path, "image:1")
    assert "neither is on the PATH" in tensorrt_llm.missing("image:1")
    program(tmp_path / "trtllm-bench", "exit 1")
    here = tensorrt_llm.command(work, "small", 3, tmp_path, "image:1")
    assert tensorrt_llm.missing("image:1") is None
    assert here[:6] == ["trtllm-bench", "--model", "small", "--model_path", "/models/small", "throughput"]
    options = dict(zip(here[6::2], here[7::2], strict=True))
    assert options == {
        "--backend": "pytorch",
        "--dataset": f"{tmp_path}/small_batch3_requests.jsonl",
        "--num_requests": "6",
        "--concurrency": "3",
        "--max_batch_size": "3",
        "--max_num_tokens": "8192",
        "--warmup": "3",
        "--tp": "2",
        "--pp": "1",
        "--report_json": f"{tmp_path}/small_batch3_report.json",
    }
    assert docker[:2] == ["docker", "run"] and docker[-len(here) - 1 :] == ["image:1", *here]
    assert "/models/small:/models/small" in docker and f"{tmp_path}:{tmp_path}" in docker


# The keys of trtllm-bench's report that are read, as its 1.2 writes them, and some that are not; the figures are made up.
REPORT = {
    "engine": {"model": "small", "version": "1.2.1", "backend": "Pytorch", "dtype": "bfloat16"},
    "world_info": {"tp_size": 1, "pp_size": 1, "max_batch_size": 3, "max_num_tokens": 8192},
    "request_info": {
        "num_requests": 6,
        "avg_num_concurrent_requests": 2.9,
        "avg_input_length": 7.0,
        "avg_output_length": 5.0,
    },
    "performance": {
        "total_latency_ms": 60.0,
        "request_throughput_req_s": 100.0,
        "system_output_throughput_tok_s": 500.0,
        "system_total_throughput_tok_s": 1200.0,
    },
}


def test_a_report_of_trtllm_bench_is_a_row(tmp_path):
    file = tmp_path / "report.json"
    file.write_text(json.dumps(REPORT))
    row = tensorrt_llm.read_report(file, WORK, 3)
    assert (row["tokens_per_second"], row["seconds"], row["version"]) == (500.0, 0.03, "1.2.1")
    assert row["tokens_per_second"] == pytest.approx(3 * 5 / row["seconds"])
    with pytest.raises(UserError, match="6 requests of 5 tokens, not 2 of 5"):
        tensorrt_llm.read_report(file, WORK, 1)
    file.write_text("{}")
    with pytest.raises(UserError, match="is not a report"):
        tensorrt_llm.read_report(file, WORK, 3)


def program(file: Path, *lines: str) -> None:
    file.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_what_cannot_be_measured_is_refused_in_a_line(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    one = {"models": {"a": str(folders[0])}}
    for options, why in (
        ({}, "models= is missing"),
        ({"models": {"a b": str(folders[0])}}, "a name of letters and digits"),
        ({"models": {"a": str(tmp_path / "none")}}, "does not exist"),
        ({**one, "engine": ["megatrom"]}, "did you mean megatron"),
        ({**one, "batch": [1, 1]}, "each once"),
        ({**one, "output_length": 122}, "= 129 is above the 128 positions"),
        ({**one, "engine": ["vllm"]}, "has no vLLM.*give vllm.python="),
        ({"models": {"a": str(folders[1])}, "engine": ["tensorrt_llm"]}, "needs trtllm-bench or docker"),
    ):
        with pytest.raises(UserError, match=why):
            throughput(given(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_command_for_elsewhere(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    throughput(given(tmp_path / "out", models={"a": str(folders[1])}, engine=["tensorrt_llm"], dry_run=True))
    shown = capsys.readouterr().out
    assert "docker run --rm --gpus all" in shown and "release:1.2.1 trtllm-bench --model a" in shown
    assert shown.count(f"--model_path {folders[1]}") == 2
    assert not (tmp_path / "out").exists()


def test_a_stopped_measurement_goes_on_with_the_missing_rows(folders, tmp_path, monkeypatch):
    done = []

    def worker(self, source, work, add, stop=True):
        for batch in work.batches:
            if stop and len(done) == 1:
                raise UserError("stopped")
            done.append((source.name, work.engine, batch))
            add({"batch": batch, "tokens_per_second": 10.0 * len(done), "seconds": 1.0, "memory_gib": None})

    cfg = given(tmp_path / "out", models={"a": str(folders[1]), "b": str(folders[1])}, engine=["transformers"])
    monkeypatch.setattr(command._Measuring, "_worker", worker)
    with pytest.raises(UserError, match="stopped"):
        throughput(cfg)
    monkeypatch.setattr(command._Measuring, "_worker", lambda *given: worker(*given, stop=False))
    throughput(cfg)
    assert done == [(name, "transformers", batch) for name in "ab" for batch in (1, 3)]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    throughput(cfg)
    assert len(done) == 4
    assert [(row["batch"], row["model"], row["ratio"]) for row in rows] == [
        (1, "a", 1),
        (1, "b", 3),
        (3, "a", 1),
        (3, "b", 2),
    ]


def test_every_engine_gets_the_form_that_it_reads(folders, tmp_path):
    for source in open_sources({"ours": str(folders[0]), "theirs": str(folders[1])}):
        for engine in ("megatron", "vllm"):
            source.prepare(engine, tmp_path)
            made = open_sources({source.name: str(source.form(engine, tmp_path))})[0]
            assert made.fits(engine) and made.shape == source.shape
            assert made.path.is_relative_to(tmp_path) == (not source.fits(engine))


@pytest.mark.slow
def test_the_whole_command(folders, tmp_path, monkeypatch):
    """Each engine in processes of its own; a program of trtllm-bench's form stands for it."""
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    program(tmp_path / "trtllm-bench", 'for word; do last=$word; done; cp "$(dirname "$0")/report.json" "$last"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    out = tmp_path / "out"
    done = run(
        "throughput",
        f"models={{ours: {folders[0]}}}",
        "engine=[megatron,transformers,tensorrt_llm]",
        *("input_length=7", "output_length=5", "batch=[3]", "repeats=2", "warmup=0", f"output={out}"),
    )
    assert done.returncode == 0, done.stderr
    assert "ours in megatron, batch 3" in done.stdout
    rows = json.loads((out / "results.json").read_text())
    assert [row["engine"] for row in rows] == ["megatron", "transformers", "tensorrt_llm"]
    assert all(row["ratio"] == 1 and row["tokens_per_second"] > 0 and row["dtype"] == "float32" for row in rows)
    assert "| tensorrt_llm | 3 | ours | 500.0 | 1.00 |" in (out / "table.md").read_text()
    assert (out / "throughput.svg").read_text().startswith("<svg")
    assert {path.name for path in out.iterdir()} == {
        "results.json",
        "table.md",
        "throughput.svg",
        "logs",
        "manifest.yaml",
    }
    assert (out / "logs" / "tensorrt_llm_ours_batch3_report.json").is_file()


PROGRAM = """import sys
print('{"batch": 3, "tokens_per_second": 1.5}'); print('not a row')
print('its own words', file=sys.stderr, flush=True)
sys.exit(int(sys.argv[1]))
"""


def test_what_a_program_says_is_rows_and_a_log_that_begins_with_its_command(tmp_path):
    """Each start's; the reason of a failure is the last of them that names an error."""
    measuring, rows = object.__new__(command._Measuring), []
    measuring.folder = tmp_path
    (tmp_path / command.LOGS).mkdir()
    source = SimpleNamespace(name="small")
    measuring._program(source, WORK, [sys.executable, "-c", PROGRAM, "0"], os.environ, rows.append)
    with pytest.raises(UserError, match=r"engine=transformers, small: (its own words|not a row) "):
        measuring._program(source, WORK, [sys.executable, "-c", PROGRAM, "3"], os.environ, rows.append)
    assert rows == [{"batch": 3, "tokens_per_second": 1.5}] * 2
    (file,) = (tmp_path / command.LOGS).iterdir()
    lines = [line for line in file.read_text().splitlines() if line[:1] in "$in"]
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    assert starts[0] == 0 and len(starts) == 2 and set(lines[1 : starts[1]]) >= {"its own words", "not a row"}


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_a_pass_takes_from_an_idle_device_to_an_idle_device(monkeypatch, warmup):
    """Work that is queued before belongs to no pass, and those of the warm-up count nowhere."""
    now, queued, passes = [0.0], [1000.0], iter([*[100.0] * warmup, 1.0, 5.0, 2.0])

    def wait():
        now[0], queued[0] = now[0] + queued[0], 0.0

    def answer(prompts):
        queued[0] += next(passes)
        return 5 * len(prompts)

    monkeypatch.setattr(work, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    rows = []
    asked = replace(WORK, batches=[2], repeats=3, warmup=warmup)
    work.measure(asked, work.Engine(answer, lambda: None, wait), rows.append)
    assert rows[0]["seconds_of_repeats"] == [1.0, 5.0, 2.0]
    assert rows[0]["seconds"] == 2.0 and rows[0]["tokens_per_second"] == 2 * 5 / 2.0


@pytest.mark.parametrize(("length", "taken"), [(60, True), (61, False)])
def test_a_prompt_and_its_answer_may_take_all_positions(length, taken):
    source = SimpleNamespace(name="m", path="p", shape=replace(SMALL_SHAPE, max_position_embeddings=64))
    cfg = SimpleNamespace(input_length=length, output_length=4, engine=[])
    if not taken:
        with pytest.raises(UserError, match=r"use input_length=60$"):
            check_sources(cfg, [source], Layout())
    else:
        check_sources(cfg, [source], Layout())


@pytest.mark.parametrize("order", [1, -1])
def test_room_is_for_the_largest_model_that_takes_another_form(monkeypatch, order):
    asked = []
    monkeypatch.setattr(sources, "check_space", lambda place, need, *_: asked.append(need))
    monkeypatch.setattr(sources, "total_bytes", lambda shape: shape)
    models = [SimpleNamespace(shape=size, fits=lambda engine, fits=fits: engine in fits) for size, fits in (
        (5, ["a"]), (7, ["b"]), (9, ["a", "b"])
    )][::order]  # fmt: skip
    for engine, need in ((["a", "b"], 7), (["a"], 7), (["b"], 5)):
        sources.check_room(SimpleNamespace(output="o", engine=engine), models)
        assert asked.pop() == need
    sources.check_room(SimpleNamespace(output="o", engine=["a"]), [])
    assert asked == [0]
