"""Throughput without a model that generates: options that can be, processes and their words, rows as they come and are shown."""

import io
import json
import os
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron.checkpoints.folder import Output
from minitron_megatron.config import ParallelConfig, ThroughputConfig, VllmConfig
from minitron_megatron.errors import UserError
from minitron_megatron.throughput import engines, sources, tensorrt_llm, work
from minitron_megatron.throughput import run as command
from minitron_megatron.throughput import show as shown
from minitron_megatron.throughput.sources import MADE, Source, check_sources, open_sources
from minitron_megatron.throughput.work import Work
from tests.test_axes import shape
from tests.test_throughput import WORK

SMALL = shape(
    num_layers=2, hidden_size=8, ffn_hidden_size=8, num_attention_heads=4, num_query_groups=2, head_dim=4, vocab_size=9,
    max_position_embeddings=64, dtype="float32",
)  # fmt: skip


def config(**options) -> ThroughputConfig:
    return ThroughputConfig(**{"output": "out", "input_length": 7, "output_length": 5, "batch": [3, 1], **options})


def source(name: str = "a", ours: bool = True, **sizes) -> Source:
    return Source(name, Path(f"/models/{name}"), SMALL.resized(**sizes), "digest", ours)


# Options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, None),
        ({"engine": ["vllm", "megatron"]}, None),
        ({"engine": []}, "engine=[]: name one or several engines, each once"),
        ({"engine": ["vllm", "vllm"]}, "name one or several engines, each once"),
        (
            {"engine": ["vlm"]},
            "engine=vlm is not one of megatron, transformers, vllm, tensorrt_llm: did you mean vllm?",
        ),
        ({"engine": ["vllm", "0"]}, "engine=0 is not one of megatron, transformers, vllm, tensorrt_llm"),
        ({"batch": []}, "batch=[]: give numbers of prompts above 0, each once"),
        ({"batch": [1, 0]}, "batch=[1, 0]: give numbers"),
        ({"batch": [2, 1, 2]}, "each once"),
    ],
)
def test_lists_of_engines_and_batches(options, says):
    if says is None:
        command._check_options(config(**options))
        return
    with pytest.raises(UserError) as refused:
        command._check_options(config(**options))
    assert says in str(refused.value) and (says.endswith("?") or not str(refused.value).endswith("?"))


@pytest.mark.parametrize(
    ("sizes", "engine", "says"),
    [
        ({}, ["transformers"], None),
        ({"tensor": 2, "pipeline": 2}, ["megatron"], None),
        ({"tensor": 2, "pipeline": 2, "world_size": 4}, ["vllm"], None),
        (
            {"tensor": 2, "pipeline": 2, "world_size": 8},
            ["megatron"],
            "parallel.tensor × pipeline = 4 processes have one model",
        ),
        ({"context": 2}, ["megatron"], "leave parallel.context and world_size out"),
        (
            {"tensor": 2},
            ["megatron", "transformers"],
            "engine=transformers runs in one process: leave it out of a layout of 2",
        ),
    ],
)
def test_a_model_has_the_processes_of_its_layout(sizes, engine, says):
    cfg = config(parallel=ParallelConfig(**sizes), engine=engine)
    if says is None:
        assert command._layout(cfg).world_size == sizes.get("tensor", 1) * sizes.get("pipeline", 1)
        return
    with pytest.raises(UserError) as refused:
        command._layout(cfg)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("of", "engine", "says"),
    [
        (source(), ["megatron"], None),
        (source(ffn_hidden_size=(8, 4)), ["megatron"], None),
        (source(ffn_hidden_size=(8, 4)), ["megatron", "vllm"], "has layers of different ffn_hidden_size"),
        (source(ffn_hidden_size=7), ["megatron"], "parallel.tensor=2 does not divide ffn_hidden_size=7 of models.a=/models/a"),
        (source(ffn_hidden_size=7), ["vllm"], None),
        (source(hidden_size=10), ["vllm"], None),
        (source(hidden_size=10, ours=False), ["megatron"], None),
        (source(hidden_size=10, ours=False), ["vllm"], "hidden_size=10 is not a multiple of num_attention_heads=4"),
        (source(), ["tensorrt_llm"], "no tokenizer"),
    ],
)  # fmt: skip
def test_engines_take_the_models_that_they_can(monkeypatch, of, engine, says):
    """Megatron what its layout divides, others what a Hugging Face config can say; trtllm-bench wants a tokenizer."""

    def without_tokenizer(path):
        raise UserError(f"{path} has no tokenizer")

    monkeypatch.setattr(sources, "check_tokenizer", without_tokenizer)
    cfg = config(engine=engine, parallel=ParallelConfig(tensor=2))
    layout = command._layout(cfg)
    if says is None:
        check_sources(cfg, [of], layout)
        return
    with pytest.raises(UserError) as refused:
        check_sources(cfg, [of], layout)
    assert says in str(refused.value)


@pytest.mark.parametrize("models", [None, {}, ["a"], {"a/b": "x"}, {"": "x"}, {"a": None}, {"a": 3}])
def test_models_are_folders_by_name(models):
    with pytest.raises(UserError, match=r"models= is missing|give a name of letters and digits, and a folder"):
        open_sources(models)


@pytest.mark.parametrize(("engine", "dry_run", "precision", "says"), [
    ("megatron", False, "bf16", None),
    ("vllm", True, "auto", "engine=vllm: python-of-vllm has no vLLM"),
    ("tensorrt_llm", True, "auto", None),
    ("tensorrt_llm", False, "auto", "it is missing in nvcr"),
    ("tensorrt_llm", True, "bf16", "precision=bf16: trtllm-bench computes in the dtype of models.a, float32: leave"),
    ("tensorrt_llm", True, "fp32", None),
])  # fmt: skip
def test_engines_are_here(monkeypatch, engine, dry_run, precision, says):
    """Of TensorRT-LLM a dry run shows the commands for elsewhere, in the dtype that it computes in."""
    monkeypatch.setattr(command, "_has_vllm", lambda python: python != "python-of-vllm")
    monkeypatch.setattr(tensorrt_llm, "missing", lambda image: f"it is missing in {image}")
    cfg = config(engine=[engine], dry_run=dry_run, precision=precision, vllm=VllmConfig(python="python-of-vllm"))
    if says is None:
        command._check_engines(cfg, [source()])
        return
    with pytest.raises(UserError) as refused:
        command._check_engines(cfg, [source()])
    assert says in str(refused.value)


# What is measured


def test_work_is_what_the_options_say_of_the_form_that_the_engine_reads(tmp_path):
    cfg = config(seed=9, repeats=4, warmup=2, precision="bf16", parallel=ParallelConfig(tensor=2))
    for engine, folder in (("megatron", "/models/a"), ("vllm", str(tmp_path / MADE / "a"))):
        found = command._work(cfg, source(), engine, SimpleNamespace(type="cuda"), tmp_path)
        assert found == Work(
            engine=engine, folder=folder, vocab_size=9, batches=[1, 3], input_length=7, output_length=5, repeats=4, warmup=2,
            seed=9, dtype="bfloat16", device="cuda", parallel=asdict(cfg.parallel),
        )  # fmt: skip


def test_prompts_are_the_same_for_every_engine_and_others_by_another_seed():
    first = WORK.prompts(4)
    assert first == replace(WORK, engine="vllm").prompts(4) != replace(WORK, seed=2).prompts(4)
    assert len(first) == 4 and {len(prompt) for prompt in first} == {7} and first[0] != first[1]
    assert {token for prompt in replace(WORK, vocab_size=3).prompts(9) for token in prompt} == {0, 1, 2}


def measuring(tmp_path, cfg, models) -> command._Measuring:
    return command._Measuring(cfg, models, SimpleNamespace(type="cpu"), Output(tmp_path))


def test_each_model_is_measured_in_each_engine_and_what_was_made_for_it_goes(tmp_path, monkeypatch):
    """After its last engine; rows that are there are not measured again, and neither is a form made for them."""
    happened = []
    for name in ("prepare", "clear"):
        monkeypatch.setattr(
            Source, name, lambda self, *given, name=name: happened.append((name, self.name, *given[:-1]))
        )
    models = [source("a"), source("b", ours=False)]
    row = {"seconds": 1.0, "tokens_per_second": 2.0}
    kept = [
        {"model": "a", "engine": "megatron", "batch": 1, **row},
        {"model": "b", "engine": "vllm", "batch": 1, **row},
    ]
    kept.append({"model": "b", "engine": "vllm", "batch": 3, **row})
    (tmp_path / command.ROWS).write_text("".join(json.dumps(one) + "\n" for one in kept))

    def worker(self, of, asked, add):
        happened.append((asked.engine, of.name, *asked.batches))
        for batch in asked.batches:
            add({"batch": batch, **row})
        (tmp_path / command.REQUESTS).mkdir(exist_ok=True)

    monkeypatch.setattr(command._Measuring, "_worker", worker)
    monkeypatch.setattr(command._Measuring, "_trtllm_bench", lambda *given: worker(*given))
    this = measuring(tmp_path, config(engine=["megatron", "vllm", "tensorrt_llm"]), models)
    rows = this.run()
    assert happened == [
        ("prepare", "a", "megatron"), ("megatron", "a", 3), ("prepare", "a", "vllm"), ("vllm", "a", 1, 3),
        ("prepare", "a", "tensorrt_llm"), ("tensorrt_llm", "a", 1, 3), ("clear", "a"),
        ("prepare", "b", "megatron"), ("megatron", "b", 1, 3),
        ("prepare", "b", "tensorrt_llm"), ("tensorrt_llm", "b", 1, 3), ("clear", "b"),
    ]  # fmt: skip
    assert len(rows) == 12 and rows[:3] == kept
    assert rows[3] == {
        "model": "a", "engine": "megatron", "input": 7, "output": 5, "batch": 3, **row,
        "parameters": 1336, "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {command.LOGS}


def test_a_row_is_kept_before_the_next_and_said(tmp_path, caplog):
    caplog.set_level("INFO", "minitron_megatron")
    this = measuring(tmp_path, config(), [source()])
    this._add(source(), WORK, {"batch": 3, "tokens_per_second": 1234.5, "seconds": 0.01234})
    this._add(source(), WORK, {"batch": 8, "tokens_per_second": None, "error": "out of memory"})
    assert [json.loads(line) for line in this.file.read_text().splitlines()] == this.rows and len(this.rows) == 2
    assert caplog.messages == [
        "a in transformers, batch 3: 1234.5 tokens/s, 0.012 s",
        "a in transformers, batch 8: out of memory",
    ]
    assert measuring(tmp_path, config(), [source()]).rows == this.rows


@pytest.mark.parametrize(
    ("engine", "sizes", "python", "start", "threads"),
    [
        ("megatron", {}, None, [sys.executable], 6),
        ("megatron", {"tensor": 2, "pipeline": 2}, None, [sys.executable, "-m", "minitron_megatron", "--nproc-per-node", "4"], 1),
        ("transformers", {}, None, [sys.executable], 6),
        ("vllm", {"tensor": 2}, None, [sys.executable], 6),
        ("vllm", {"tensor": 2}, "/v/python", ["/v/python"], 6),
        ("megatron", {"tensor": 8}, "/v/python", [sys.executable, "-m", "minitron_megatron", "--nproc-per-node", "8"], 1),
    ],
)  # fmt: skip
def test_an_engine_is_started_in_its_processes_with_its_share_of_the_cores(
    tmp_path, monkeypatch, engine, sizes, python, start, threads
):
    """Megatron in as many as its layout has; vLLM by its own Python, and starts its own. What is set stays."""
    started = []
    monkeypatch.setattr(command, "usable_cores", lambda: 6)
    monkeypatch.setattr(command._Measuring, "_program", lambda self, *given: started.append(given))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/before")
    monkeypatch.setenv("OWN", "kept")
    cfg = config(parallel=ParallelConfig(**sizes), vllm=VllmConfig(python=python))
    this, asked = measuring(tmp_path, cfg, [source()]), replace(WORK, engine=engine)
    this._worker(source(), asked, "add")
    ((of, given, words, environment, add),) = started
    request = tmp_path / command.REQUESTS / f"{engine}_a.json"
    assert words == [*start, "-m", command.WORKER, str(request)] and (of.name, given, add) == ("a", asked, "add")
    assert Work(**json.loads(request.read_text())) == asked
    assert environment["PYTHONPATH"] == f"{command.ROOT}{os.pathsep}/before" and environment["OWN"] == "kept"
    assert environment["OMP_NUM_THREADS"] == str(threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    this._worker(source(), asked, "add")
    assert started[1][3]["OMP_NUM_THREADS"] == "9"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["a", "ValueError: no", "b", ""], "ValueError: no"),
        (["torch.OutOfMemoryError: full", "KeyError: x", "Error in a word, no name: y"], "KeyError: x"),
        (["only this"], "only this"),
        ([f"TypeError: {'x' * 400}"], f"TypeError: {'x' * 289}"),
    ],
)
def test_the_reason_of_a_failure_is_the_last_line_that_begins_with_an_error(tmp_path, lines, reason):
    (tmp_path / "log").write_text("\n".join(lines))
    assert command._reason(tmp_path / "log") == reason


# Engines


def test_vllm_is_given_its_layout_and_room_for_a_batch_and_its_prompts(monkeypatch):
    made, asked, rows = {}, [], []

    class LLM:
        def __init__(self, **how):
            made.update(how)

        def generate(self, given, sampling, use_tqdm):
            asked.append((given, sampling, use_tqdm))
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=range(5))]) for _ in given]

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **how: how))
    engines.vllm(replace(WORK, folder="f", parallel={"tensor": 2, "pipeline": 3}, batches=[2, 9, 4]), rows.append)
    assert made == {
        "model": "f", "skip_tokenizer_init": True, "dtype": "float32", "tensor_parallel_size": 2, "pipeline_parallel_size": 3,
        "max_model_len": 12, "max_num_seqs": 9, "enable_prefix_caching": False, "seed": 1,
    }  # fmt: skip
    given, sampling, bars = asked[0]
    assert [one["prompt_token_ids"] for one in given] == WORK.prompts(2) and bars is False
    assert sampling == {"temperature": 0.0, "max_tokens": 5, "ignore_eos": True, "detokenize": False}
    assert [row["batch"] for row in rows] == [2, 9, 4] and all(row["memory_gib"] is None for row in rows)


@pytest.mark.parametrize(("alone", "error"), [(True, "ValueError"), (False, "OutOfMemoryError"), (False, "ValueError")])
def test_only_a_process_of_its_own_goes_on_without_memory(alone, error):
    """Others would wait for one that has stopped."""

    kind, rows = type(error, (Exception,), {}), []

    def answer(prompts):
        raise kind

    with pytest.raises(kind):
        work.measure(WORK, work.Engine(answer, lambda: None, alone=alone), rows.append)
    assert rows == []


@pytest.mark.parametrize(("rank", "rows"), [(None, 2), ("0", 2), ("1", 0)])
def test_rows_are_of_the_first_rank_and_alone_on_standard_output(tmp_path, monkeypatch, rank, rows):
    request, written = tmp_path / "r.json", io.StringIO()
    request.write_text(json.dumps(asdict(WORK)))
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    redirected = []
    monkeypatch.setattr(sys, "argv", ["work", str(request)])
    monkeypatch.setattr(work, "os", SimpleNamespace(
        dup=lambda number: (redirected.append(number), "kept")[1], dup2=lambda *pair: redirected.append(pair),
        fdopen=lambda *_, **__: written, environ=os.environ,
    ))  # fmt: skip
    monkeypatch.setitem(
        engines.ENGINES, "transformers", lambda asked, emit: [emit({"batch": n}) for n in asked.batches]
    )
    work.main()
    assert redirected == [1, (2, 1)]
    assert [json.loads(line) for line in written.getvalue().splitlines()] == [{"batch": 1}, {"batch": 3}][:rows]


def test_steps_of_trtllm_bench_hold_a_whole_prompt_and_its_own_python_path_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for length, tokens in ((7, "8192"), (8192, "8192"), (8193, "8193")):
        words = tensorrt_llm.command(
            replace(WORK, input_length=length, parallel={"tensor": 1, "pipeline": 2}), "n", 3, tmp_path, "image"
        )
        assert words[words.index("--max_num_tokens") + 1] == tokens and words[words.index("--pp") + 1] == "2"
    for program in ("docker", "trtllm-bench"):
        (tmp_path / program).touch(mode=0o755)
        assert tensorrt_llm.missing("image") is None
        (tmp_path / program).unlink()
    monkeypatch.setenv("PYTHONPATH", "x")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert tensorrt_llm.environment() == {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")
    }


# Folders that are made on the way


def test_what_was_made_for_a_model_goes_and_what_was_made_for_others_stays(tmp_path):
    for name in "ab":
        (tmp_path / MADE / name).mkdir(parents=True)
    source("a").clear(tmp_path)
    assert [path.name for path in (tmp_path / MADE).iterdir()] == ["b"]
    source("a").clear(tmp_path)
    source("b").clear(tmp_path)
    assert list(tmp_path.iterdir()) == []
    source("b").clear(tmp_path)


# What is shown

ROWS = [
    {
        "engine": "vllm",
        "batch": 2,
        "model": "a",
        "tokens_per_second": 1234.56,
        "seconds": 0.12345,
        "memory_gib": 3.14159,
    },
    {"engine": "vllm", "batch": 2, "model": "b", "tokens_per_second": None, "error": "out of memory"},
    {"engine": "megatron", "batch": 1, "model": "b", "tokens_per_second": 50.0, "seconds": 2.0, "memory_gib": None},
    {"engine": "megatron", "batch": 1, "model": "a", "tokens_per_second": 25.0, "seconds": 4.0, "memory_gib": 0.0},
]
CELLS = [
    ["vllm", 2, "a", "1,234.6", "1.00", "0.123", "3.1"],
    ["vllm", 2, "b", "out of memory", "", "", ""],
    ["megatron", 1, "a", "25.0", "1.00", "4.000", "0.0"],
    ["megatron", 1, "b", "50.0", "2.00", "2.000", ""],
]


def test_rows_are_written_in_order_with_their_ratios_as_table_and_as_bars(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("minitron_megatron.report.plots.grouped_bars", lambda *given: drawn.append(given) or "<svg/>")
    rows = [dict(row) for row in ROWS]
    shown.write_results(tmp_path, rows, ["a", "b"])
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert [(row["engine"], row["model"], row["ratio"]) for row in rows] == [
        ("vllm", "a", 1.0), ("vllm", "b", None), ("megatron", "a", 1.0), ("megatron", "b", 2.0)
    ]  # fmt: skip
    assert shown.table_rows(rows) == CELLS
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| engine | batch | model | tokens/s | ratio | seconds | GiB |" and len(lines) == 2 + 4
    assert lines[2] == "| vllm | 2 | a | 1,234.6 | 1.00 | 0.123 | 3.1 |"
    values = {"a": [1234.56, 25.0], "b": [0.0, 50.0]}
    labels = {"a": ["1.00×", "1.00×"], "b": ["", "2.00×"]}
    assert drawn == [(["vllm\nbatch 2", "megatron\nbatch 1"], values, labels, "tokens a second")]
    assert (tmp_path / "throughput.svg").read_text() == "<svg/>"


@pytest.mark.parametrize("batches", [[1], [1, 2]])
def test_each_models_best_batch_is_shown_where_there_are_several(monkeypatch, batches):
    tables = []
    monkeypatch.setattr(command, "print_table", lambda *table: tables.append(table))
    rows = shown.add_ratios([dict(row) for row in ROWS], ["a", "b"])
    command._show(config(batch=batches), rows)
    assert tables[0] == ("out: 7 tokens in, 5 out", shown.COLUMNS, CELLS) and len(tables) == len(batches)
    if len(batches) > 1:
        assert tables[1][2] == [
            ["vllm", "a", 2, 1234.56, 1.0],
            ["megatron", "a", 1, 25.0, 1.0],
            ["megatron", "b", 1, 50.0, 2.0],
        ]
    # Without the first model there is nothing to be over.
    assert command._flat(shown.best_rows([{**ROWS[1], "model": "a"}, ROWS[2]])["megatron"]) == [["b", 1, 50.0, ""]]
    assert shown.best_rows([]) == {}
    # Of batches that are as fast the smaller one.
    equal = [{**ROWS[2], "batch": batch} for batch in (1, 2)]
    assert shown.best_rows(equal)["megatron"]["b"]["batch"] == 1
