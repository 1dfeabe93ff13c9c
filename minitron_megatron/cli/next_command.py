"""What to type next: the last line of every command, with its folders filled in.

    import_hf ─▶ prepare_data ─▶ importance ─▶ search ─▶ prune ─▶ distill ─▶ evaluate ─▶ export_hf ─▶ a line that loads it

One table, NEXT, says what follows on what. A line can be pasted into the shell that the command was typed in: paths are quoted,
programs are found where this command found them (spelling.py), and as many processes are started. Only what nobody can know, such
as where the text is, stands there in capitals. Nothing heavy is imported.
"""

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import MANIFEST, SHAPE_FILE, TOKENIZER, load_yaml
from minitron_megatron.checkpoints.hf_folder import has_tokenizer
from minitron_megatron.claims import number_of
from minitron_megatron.cli import spelling
from minitron_megatron.config import CommandConfig, ParallelConfig
from minitron_megatron.console import console, speaks
from minitron_megatron.data.folder import Data, DataFolder, parse_blend
from minitron_megatron.data.same_tokenizer import check_same_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.search.found import read_search
from minitron_megatron.stages import STAGE
from minitron_megatron.words import word

# Commands that are worth several processes.
_PARALLEL = ("importance", "layers", "prune", "distill", "evaluate", "correct_teacher", "cache_teacher")
# What a budget is where nobody has said one yet: the share of the parameters that the demo and the published 4B models keep.
_SHARE = 0.6


@dataclass(frozen=True)
class Next:
    """A command with its options; `output` is made unique beside what is there."""

    command: str
    options: Mapping[str, Any]
    output: str
    processes: int | None = None
    shell: list[str] = field(default_factory=list)


def show_next(name: str, config: CommandConfig) -> None:
    """Print what follows on a command that has done its work, unless it is the stage of something longer."""
    if not speaks() or config.dry_run or os.environ.get(STAGE) or name not in NEXT:
        return
    try:
        found = NEXT[name](config)
        line = None if found is None else line_of(found, config)
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return  # a folder that went away meanwhile: the work itself is done
    if line:
        console().print(f"Next:\n  {line}", highlight=False, soft_wrap=True)


def line_of(found: Next, config: CommandConfig) -> str:
    """The line to paste."""
    if found.shell:
        return " ".join(map(_quoted, found.shell))
    given = {**found.options, **_same_way(found, config)}
    if found.output:
        beside = Path(config.output).parent / found.output
        # A report is written over an older one.
        given["output"] = beside if (beside / "report.html").is_file() else free_name(beside)
    words = [f"{name}={word(value)}" for name, value in given.items() if value is not None]
    processes = (found.processes or _processes()) if found.command in _PARALLEL else 1
    return spelling.line_of(found.command, words, processes)


def _quoted(word: str) -> str:
    """For the shell: in double quotes where single ones would have to be taken apart, and double ones change nothing."""
    return f'"{word}"' if "'" in word and not re.search(r'[\\$`"!]', word) else spelling.quoted(word)


def free_name(path: Path) -> Path:
    """A folder's name, or the first with a number behind it that is not there yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}_{number}")
    return free


def _same_way(found: Next, config: CommandConfig) -> dict[str, Any]:
    """The layout, device and precision that this command was told, for commands that run models."""
    if found.command not in _PARALLEL:
        return {}
    plain = ParallelConfig()
    layout = {
        f"parallel.{f.name}": getattr(config.parallel, f.name)
        for f in fields(ParallelConfig)
        if f.name != "world_size" and getattr(config.parallel, f.name) != getattr(plain, f.name)
    }
    how = {n: getattr(config, n) for n in ("device", "precision") if getattr(config, n) != "auto"}
    return {**{k: v for k, v in layout.items() if k not in found.options}, **how}


def this_line() -> str:
    """The line that starts this very command again, with the options as they were typed."""
    name = Path(spelling.TYPED[0].removeprefix("minitron ")).stem
    processes = _processes() if name in _PARALLEL else 1
    return spelling.line_of(name, spelling.TYPED[1:], processes)


def _processes() -> int:
    """Processes of this job on this node."""
    return max(1, number_of("LOCAL_WORLD_SIZE", number_of("WORLD_SIZE", 1)))


# What the folders say.


def _manifest(folder: Path | str) -> dict[str, Any]:
    return load_yaml(Path(folder) / MANIFEST)


def _shape(folder: Path | str) -> ModelShape:
    """Sizes of a model folder or a run. Raises OSError or UserError where there are none."""
    path = Path(folder)
    file = path / SHAPE_FILE if (path / SHAPE_FILE).is_file() else path / "model" / SHAPE_FILE
    return ModelShape.from_dict(load_yaml(file), str(file))


def _tokens(data: Any) -> int | None:
    """Tokens to train on in a data folder, or in a blend before a folder of it begins again; None where it is neither."""
    try:
        weights, paths = parse_blend(data)
    except UserError:
        return None
    folders = tuple(DataFolder(Path(path), _manifest(path)) for path in paths)
    weights = weights or [folder.tokens("train") for folder in folders]
    return Data(folders, tuple(weight / sum(weights) for weight in weights)).tokens("train")


def _length(options: Any) -> dict[str, Any]:
    """The sequence length, where it is not the one that the next command takes by itself."""
    return {} if options.sequence_length in (None, 1024) else {"data.sequence_length": options.sequence_length}


def _calibration(data: Any, model: str) -> dict[str, Any]:
    """Options of importance for as many samples as there are."""
    there, length = _tokens(data), min(1024, _shape(model).max_position_embeddings)
    if there is None or there >= 1024 * length:
        return {}
    while length > 16 and there < 16 * length:
        length //= 2
    shorter = {} if length == min(1024, _shape(model).max_position_embeddings) else {"data.sequence_length": length}
    return {"samples": max(1, there // length), **shorter}


def _data_beside(output: str, vocabulary: int) -> Path | None:
    """A data folder beside an output, made with a vocabulary of this size, and with the output's tokenizer if it has one."""
    for folder in sorted(Path(output).absolute().parent.iterdir()):
        prepared = (folder / "train.bin").is_file() and (folder / MANIFEST).is_file()
        if prepared and int(_manifest(folder).get("results", {}).get("vocab_size", -1)) <= vocabulary:
            with contextlib.suppress(UserError):  # of another tokenizer
                check_same_tokenizer(Data((DataFolder(folder, _manifest(folder)),), (1.0,)), {"model": output})
                return Path(output).parent / folder.name
    return None


# What follows on what.


def _after_import(cfg: Any) -> Next | None:
    data = _data_beside(cfg.output, _shape(cfg.output).vocab_size)
    if data is None and not has_tokenizer(Path(cfg.output) / TOKENIZER):
        return None  # the import has said that there is none
    if data is None:
        return Next("prepare_data", {"input": "TEXT.jsonl", "model": cfg.output}, "data")
    return Next("importance", {"model": cfg.output, "data.path": data, **_calibration(str(data), cfg.output)}, "scores")


def _after_data(cfg: Any) -> Next:
    model = cfg.model.path
    if not (Path(model) / SHAPE_FILE).is_file() and not (Path(model) / "model").is_dir():
        return Next("import_hf", {"hf": model}, "teacher")
    return Next("importance", {"model": model, "data.path": cfg.output, **_calibration(cfg.output, model)}, "scores")


def _search(model: str, scores: str) -> Next:
    parameters = _SHARE * count_parameters(_shape(model))
    return Next("search", {"model": model, "scores": scores, "budget.parameters": float(f"{parameters:.2g}")}, "found")


def _after_merge(cfg: Any) -> Next:
    return _search(_manifest(cfg.scores[0])["config"]["model"]["path"], cfg.output)


def _after_layers(cfg: Any) -> Next | None:
    block = min(cfg.block) if isinstance(cfg.block, list) else cfg.block
    kept = _shape(cfg.model.path).num_layers - block
    options = {"model": cfg.model.path, "layers": cfg.output, "target.num_layers": kept}
    return Next("prune", options, "pruned") if kept > 0 else None


def _after_search(cfg: Any) -> Next:
    found = read_search(cfg.output)
    best = found.ranked[0]
    options = found.source.options(best.target, _shape(found.source.model).num_layers)
    processes = _manifest(found.source.scores).get("processes")
    return Next("prune", {**options, "target": found.target(best)}, f"{Path(cfg.output).name}_rank_01", processes)


def _after_prune(cfg: Any) -> Next:
    data, length = cfg.data.path, cfg.data
    if data is None and cfg.scores:
        config = _manifest(cfg.scores)["config"]["data"]
        data, length = config["path"], type(cfg.data)(**{k: config[k] for k in ("path", "sequence_length")})
    options = {"teacher": cfg.model.path, "student": cfg.output, "data.path": data or "DATA", **_length(length)}
    return Next("distill", {**options, **_one_epoch(data, length, cfg.parallel)}, "distilled")


def _one_epoch(data: Any, length: Any, parallel: ParallelConfig) -> dict[str, Any]:
    """Steps that read the data once, in batches that divide over the processes."""
    ranks = max(1, _processes() // (parallel.tensor * parallel.pipeline * parallel.context))
    batch = -(-8 // ranks) * ranks
    options = {} if batch == 8 else {"trainer.global_batch_size": batch}
    there = _tokens(data) if data else None
    if there is None:
        return {**options, "trainer.tokens": 1e9}
    steps = max(1, there // (batch * (length.sequence_length or 1024)))
    return {**options, "trainer.steps": steps, **({"optim.warmup_steps": max(1, steps // 20)} if steps < 80 else {})}


def _after_training(cfg: Any) -> Next:
    options = {"model": cfg.output, "teacher": cfg.teacher.path, "data.path": cfg.data.path, **_length(cfg.data)}
    return Next("evaluate", options, "evaluation")


def _after_correction(cfg: Any) -> Next:
    options = {**_length(cfg.data), **_calibration(cfg.data.path, cfg.output)}
    return Next("importance", {"model": cfg.output, "data.path": cfg.data.path, **options}, "scores")


def _after_cache(cfg: Any) -> Next:
    loss = {"distill.loss": "topk_kl", "distill.cache": cfg.output}
    loss |= {f"distill.{n}": v for n, v in (("top_k", cfg.distill.top_k), ("temperature", cfg.distill.temperature))}
    run = {
        f"trainer.{n}": getattr(cfg.trainer, n) for n in ("steps", "tokens", "global_batch_size", "validation_samples")
    }
    options = {"teacher": cfg.teacher.path, "student": "STUDENT", "data.path": cfg.data.path, **_length(cfg.data)}
    return Next("distill", {**options, **run, **loss}, "distilled")


def _after_candidates(cfg: Any) -> Next:
    return Next(
        "prune", {"model": read_search(cfg.found).source.model, "plan": Path(cfg.output) / "plan.yaml"}, "pruned"
    )


def _after_evaluation(cfg: Any) -> Next:
    if cfg.hf is not None:
        return _report(cfg)
    return Next("export_hf", {"model": cfg.model.path, "results": [cfg.output]}, "hf")


def _report(cfg: Any) -> Next:
    return Next("report", {"folders": [str(Path(cfg.output).parent)]}, "report")


def _load_exported(cfg: Any) -> Next:
    return Next("", {}, "", shell=load_words(cfg.output))


def load_words(folder: str) -> list[str]:
    """The words that load an exported folder with transformers and let it write."""
    code = (
        f"from transformers import pipeline; print(pipeline('text-generation', {folder!r})('The')[0]['generated_text'])"
    )
    return [spelling.python_word(), "-c", code]


def _after_random(cfg: Any) -> Next:
    return Next("throughput", {"models": {"random": cfg.output}}, "throughput")


def _read_report(cfg: Any) -> Next | None:
    page = Path(cfg.output) / "report.html" if Path(cfg.output).is_dir() else Path(cfg.output)
    python = spelling.python_word()
    return Next("", {}, "", shell=[python, "-m", "webbrowser", str(page)]) if page.suffix == ".html" else None


def _after_compress(cfg: Any) -> Next | None:
    if cfg.export:
        return Next("", {}, "", shell=load_words(str(Path(cfg.output) / "hf")))
    return None


NEXT: dict[str, Callable[[Any], Next | None]] = {
    "smollm2": lambda cfg: Next("import_hf", {"hf": cfg.output}, "teacher"),
    "import_hf": _after_import,
    "import_nemo": _after_import,
    "random_model": _after_random,
    "prepare_data": _after_data,
    "adopt_data": _after_data,
    "importance": lambda cfg: _search(cfg.model.path, cfg.output),
    "merge_scores": _after_merge,
    "layers": _after_layers,
    "search": _after_search,
    "prune": _after_prune,
    "cache_teacher": _after_cache,
    "correct_teacher": _after_correction,
    "distill": _after_training,
    "distill_candidates": _after_candidates,
    "evaluate": _after_evaluation,
    "export_hf": _load_exported,
    "export_megatron": lambda cfg: Next("", {}, "", shell=["cat", str(Path(cfg.output) / "arguments.sh")]),
    "export_nemo": lambda cfg: Next("import_nemo", {"nemo": cfg.output}, "from_nemo"),
    "throughput": _report,
    "report": _read_report,
    "compress": _after_compress,
}
