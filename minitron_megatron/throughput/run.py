"""`launch/throughput.py`: tokens a second of models that generate, and how many times the first model's that is.

    models × engines, one after another, each in a process of its own (work.py) or by trtllm-bench (tensorrt_llm.py)
        ─▶ rows.jsonl, a row for each batch size as it comes ─▶ results.json with ratios, table.md, throughput.svg

A killed command goes on with the rows that are missing.
"""

import contextlib
import difflib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_megatron.checkpoints.folder import Output
from minitron_megatron.checkpoints.unfinished import COMPUTED_IN
from minitron_megatron.cli.spelling import joined
from minitron_megatron.config import ThroughputConfig
from minitron_megatron.console import console, format_value, print_table, progress
from minitron_megatron.ending import Stopped
from minitron_megatron.errors import UserError
from minitron_megatron.machine import usable_cores
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.limits import computing_dtype
from minitron_megatron.outputs import check_command_output, command_output
from minitron_megatron.parallel.layout import Layout, world_size_from_env
from minitron_megatron.parallel.precision import asks_machine, keep, record, settled
from minitron_megatron.plain_files import parse_json
from minitron_megatron.stages import ROOT, outlive, runnable, start_words
from minitron_megatron.throughput import tensorrt_llm
from minitron_megatron.throughput.show import COLUMNS, best_rows, table_rows, write_results
from minitron_megatron.throughput.sources import MADE, Source, check_room, check_sources, open_sources
from minitron_megatron.throughput.work import Work

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
WORKER = "minitron_megatron.throughput.work"
ENGINES = ("megatron", "transformers", "vllm", "tensorrt_llm")
ROWS, LOGS, REQUESTS = "rows.jsonl", "logs", "requests"
Row = dict[str, Any]


@dataclass(frozen=True)
class Generating:
    """The models to measure, checked; `inputs` are their digests by number and name."""

    sources: list[Source]
    inputs: dict[str, str]


def check_throughput(cfg: ThroughputConfig) -> Generating:
    """Options, layout, models, engines and output, before torch is there. Raises UserError."""
    if world_size_from_env() > 1:
        raise UserError("start throughput in one process: it starts the processes of parallel. itself")
    _check_options(cfg)
    layout = _layout(cfg)
    sources = open_sources(cfg.models)
    check_sources(cfg, sources, layout)
    # The first model is the reference: their order counts.
    inputs = {f"{number} {source.name}": source.digest for number, source in enumerate(sources)}
    check_command_output(cfg, inputs)
    _check_engines(cfg, sources)
    return Generating(sources, inputs)


def throughput(cfg: ThroughputConfig, checked: Generating | None = None) -> None:
    """Measure `models=` in `engine=`. Raises UserError."""
    from minitron_megatron.parallel.job import pick_device

    checked = checked or check_throughput(cfg)
    sources, inputs = checked.sources, checked.inputs
    device = pick_device(cfg.device)
    if cfg.dry_run:
        _say_what_would_be(cfg, sources, device)
        return
    with settled(device.type), command_output(cfg, inputs, continues=True) as out:
        if out.done:
            return
        if asks_machine(cfg.precision, *(source.shape.dtype for source in sources)):
            keep(out.path / COMPUTED_IN, begun=lambda: (out.path / ROWS).exists())
        check_room(cfg, sources)
        rows = _Measuring(cfg, sources, device, out).run()
        write_results(out.path, rows, [source.name for source in sources])
        out.results, out.precision = {"best": best_rows(rows)}, record()
    _show(cfg, rows)


def _check_options(cfg: ThroughputConfig) -> None:
    """Lists have their values checked here. Raises UserError."""
    for engine in cfg.engine:
        if engine not in ENGINES:
            near = difflib.get_close_matches(engine, ENGINES, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"engine={engine} is not one of {', '.join(ENGINES)}{hint}")
    if not cfg.engine or len(set(cfg.engine)) < len(cfg.engine):
        raise UserError(f"engine={cfg.engine}: name one or several engines, each once")
    if not cfg.batch or min(cfg.batch) < 1 or len(set(cfg.batch)) < len(cfg.batch):
        raise UserError(f"batch={cfg.batch}: give numbers of prompts above 0, each once")


def _layout(cfg: ThroughputConfig) -> Layout:
    """The processes of one model. Raises UserError for layouts that do not generate."""
    parallel = cfg.parallel
    count = parallel.tensor * parallel.pipeline
    if parallel.context > 1 or parallel.world_size not in (None, count):
        raise UserError(
            f"parallel.tensor × pipeline = {count} processes have one model: leave parallel.context and world_size out"
        )
    if count > 1 and "transformers" in cfg.engine:
        raise UserError(f"engine=transformers runs in one process: leave it out of a layout of {count}")
    return Layout.from_config(parallel, world_size=count)


def _check_engines(cfg: ThroughputConfig, sources: Sequence[Source]) -> None:
    """Raise UserError for an engine that is not installed; of TensorRT-LLM a dry run shows the commands for elsewhere."""
    if "vllm" in cfg.engine and not _has_vllm(cfg.vllm.python):
        where = cfg.vllm.python or "this environment"
        raise UserError(
            f"engine=vllm: {where} has no vLLM, which needs a torch of its own: make it an environment (python -m venv vllm, "
            "vllm/bin/pip install vllm) and give vllm.python=vllm/bin/python"
        )
    if "tensorrt_llm" not in cfg.engine:
        return
    missing = None if cfg.dry_run else tensorrt_llm.missing(cfg.tensorrt_llm.image)
    if missing:
        raise UserError(missing)
    for source in sources:
        if _dtype(cfg, source) != source.shape.dtype:
            raise UserError(
                f"precision={cfg.precision}: {tensorrt_llm.PROGRAM} computes in the dtype of models.{source.name}, "
                f"{source.shape.dtype}: leave precision= out"
            )


def _has_vllm(python: str | None) -> bool:
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        return subprocess.run([python or sys.executable, "-c", look], check=False, capture_output=True).returncode == 0
    except OSError as error:
        raise UserError(f"vllm.python={python} cannot be started ({error.strerror}): give a path to python") from None


def _dtype(cfg: ThroughputConfig, source: Source) -> str:
    return computing_dtype(source.shape, cfg.precision)


def _work(cfg: ThroughputConfig, source: Source, engine: str, device: "torch.device", made: Path) -> Work:
    return Work(
        engine=engine,
        folder=str(source.form(engine, made).absolute()),
        vocab_size=source.shape.vocab_size,
        batches=sorted(cfg.batch),
        input_length=cfg.input_length,
        output_length=cfg.output_length,
        repeats=cfg.repeats,
        warmup=cfg.warmup,
        seed=cfg.seed,
        dtype=_dtype(cfg, source),
        device=device.type,
        parallel=asdict(cfg.parallel),
    )


class _Measuring:
    """Models and engines in turn, over the rows that an earlier run left."""

    def __init__(self, cfg: ThroughputConfig, sources: Sequence[Source], device: "torch.device", out: Output) -> None:
        self.cfg, self.sources, self.device, self.folder = cfg, sources, device, out.path
        self.file = out.path / ROWS
        self.rows: list[Row] = (
            list(map(parse_json, self.file.read_text(encoding="utf-8").splitlines())) if self.file.exists() else []
        )
        (out.path / LOGS).mkdir(exist_ok=True)
        # What was measured, and the log of what failed.
        out.keep = True

    def run(self) -> list[Row]:
        """Measure what is missing; gives all rows."""
        total = len(self.sources) * len(self.cfg.engine) * len(self.cfg.batch)
        with progress("throughput", total, unit="measurements", done=len(self.rows)) as advance:
            for source, engine in [(source, engine) for source in self.sources for engine in self.cfg.engine]:
                work = _work(self.cfg, source, engine, self.device, self.folder)
                done = {row["batch"] for row in self.rows if (row["model"], row["engine"]) == (source.name, engine)}
                work = replace(work, batches=[batch for batch in work.batches if batch not in done])
                if work.batches:
                    self._prepare(source, engine)
                    run = self._trtllm_bench if engine == "tensorrt_llm" else self._worker
                    run(source, work, lambda row, s=source, w=work: (self._add(s, w, row), advance(1)))
                if engine == self.cfg.engine[-1]:
                    source.clear(self.folder)
        shutil.rmtree(self.folder / REQUESTS, ignore_errors=True)
        self.file.unlink()
        return self.rows

    def _prepare(self, source: Source, engine: str) -> None:
        """The form that an engine reads; what the commands that make it show goes to a log."""
        log_file = self.folder / LOGS / f"{MADE}_{source.name}.log"
        with open(log_file, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            source.prepare(engine, self.folder)

    def _add(self, source: Source, work: Work, row: Row) -> None:
        """Keep a row, with what it is of."""
        of = {"model": source.name, "engine": work.engine, "input": work.input_length, "output": work.output_length}
        import torch

        where = torch.cuda.get_device_name(self.device) if work.device == "cuda" else "cpu"
        more = {"parameters": count_parameters(source.shape), "dtype": work.dtype, "device": where}
        self.rows.append({**of, **row, **more})
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        rate = row["tokens_per_second"]
        found = row["error"] if rate is None else f"{format_value(rate)} tokens/s, {row['seconds']:.3f} s"
        log.info("%s in %s, batch %d: %s", source.name, work.engine, row["batch"], found)

    def _worker(self, source: Source, work: Work, add: Callable[[Row], object]) -> None:
        """A process, or with Megatron as many as the layout has, that measures every batch size."""
        request = self.folder / REQUESTS / f"{work.engine}_{source.name}.json"
        request.parent.mkdir(exist_ok=True)
        request.write_text(json.dumps(asdict(work)), encoding="utf-8")
        parallel = self.cfg.parallel
        processes = parallel.tensor * parallel.pipeline if work.engine == "megatron" else 1
        start = ["python"] if processes == 1 else start_words(self.cfg.start, processes)
        if work.engine == "vllm" and self.cfg.vllm.python:
            start = [self.cfg.vllm.python]
        own = {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": str(max(1, usable_cores() // processes)),
        }
        words = [*runnable(start), "-m", WORKER, str(request.absolute())]
        self._program(source, work, words, {**own, **os.environ, "PYTHONPATH": own["PYTHONPATH"]}, add)

    def _trtllm_bench(self, source: Source, work: Work, add: Callable[[Row], object]) -> None:
        """A run of trtllm-bench for each batch size."""
        for batch in work.batches:
            files = self.folder / REQUESTS
            files.mkdir(exist_ok=True)
            tensorrt_llm.write_requests(work, batch, files / tensorrt_llm.requests_file(source.name, batch))
            words = tensorrt_llm.command(work, source.name, batch, files, self.cfg.tensorrt_llm.image)
            self._program(source, work, words, tensorrt_llm.environment(), lambda row: None)
            report = files / tensorrt_llm.report_file(source.name, batch)
            add(tensorrt_llm.read_report(report, work, batch))
            report.rename(self.folder / LOGS / f"{work.engine}_{report.name}")

    def _program(
        self, source: Source, work: Work, words: list[str], environment: Mapping[str, str], add: Callable[[Row], object]
    ) -> None:
        """Run a program; lines of JSON on its standard output are rows, all else goes to a log. Raises UserError."""
        file = self.folder / LOGS / f"{work.engine}_{source.name}.log"
        with open(file, "a", encoding="utf-8") as errors:
            print(f"$ {joined(words)}", file=errors, flush=True)

            def start() -> subprocess.Popen:
                out = {"stdout": subprocess.PIPE, "stderr": errors, "text": True, "errors": "replace"}
                return subprocess.Popen(words, env=dict(environment), **out)

            with outlive(start) as (child, asked):
                try:
                    for line in child.stdout:
                        if line.startswith('{"batch"'):
                            add(parse_json(line))
                        else:
                            errors.write(line)
                    child.wait()
                finally:
                    child.kill()  # nothing, once it has ended
        if asked:
            raise Stopped(asked[0])
        if child.returncode:
            raise UserError(f"engine={work.engine}, {source.name}: {_reason(file)} (all of it: {file})")


def _reason(file: Path) -> str:
    """What a failed program says last of an error."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.partition(":")[0].rpartition(" ")[2]]
    return (named or lines)[-1][:300]


def _say_what_would_be(cfg: ThroughputConfig, sources: Sequence[Source], device: "torch.device") -> None:
    made = Path(cfg.output)
    rows = [
        [source.name, engine, ", ".join(map(str, sorted(cfg.batch))), str(source.form(engine, made))]
        for engine in cfg.engine
        for source in sources
    ]
    print_table("would be measured", ["model", "engine", "batch", "from (exports and imports are made first)"], rows)
    from minitron_megatron.models.build import foretell_dtype

    foretell_dtype(cfg.precision, device, *(source.shape for source in sources))
    if "tensorrt_llm" in cfg.engine:
        for source in sources:
            work = _work(cfg, source, "tensorrt_llm", device, made)
            for batch in work.batches:
                words = tensorrt_llm.command(work, source.name, batch, made / REQUESTS, cfg.tensorrt_llm.image)
                console().print(joined(words), highlight=False, soft_wrap=True)


def _show(cfg: ThroughputConfig, rows: Sequence[Row]) -> None:
    title = f"{cfg.output}: {cfg.input_length} tokens in, {cfg.output_length} out"
    print_table(title, COLUMNS, table_rows(rows))
    if len(cfg.batch) > 1:
        best = [[engine, *row] for engine, models in best_rows(rows).items() for row in _flat(models)]
        print_table("each model at its best batch", ["engine", "model", "batch", "tokens/s", "ratio"], best)


def _flat(models: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    return [[name, row["batch"], row["tokens_per_second"], row["ratio"] or ""] for name, row in models.items()]
