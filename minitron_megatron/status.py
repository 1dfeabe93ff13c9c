"""`launch/status.py FOLDER`: how a run, a chain, a demo or any output stands. It reads, and it changes nothing.

    one output                done, running, stopped, failed or diverged; steps, losses, time left, checkpoints, how to go on
    a folder of outputs       a row of each

What is half-written or damaged gets its line and ends nothing. A run that goes on is looked at through its files: metrics.jsonl,
checkpoints/, starts.jsonl (who works on it) and the kernel's list of locks. Nothing heavy is imported.
"""

import math
import re
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.damage import is_damage
from minitron_megatron.checkpoints.folder import DIVERGED, MANIFEST, METRICS, load_yaml
from minitron_megatron.checkpoints.locks import holder
from minitron_megatron.checkpoints.unfinished import partial_folder
from minitron_megatron.cli import spelling
from minitron_megatron.config import StatusConfig
from minitron_megatron.console import console, format_time, format_value, print_table
from minitron_megatron.errors import UserError
from minitron_megatron.plain_files import read_json
from minitron_megatron.stages import STAGES_FILE
from minitron_megatron.starts import STARTS, is_alive, read_starts, seconds_left, tail_of

# What a whole of several stages writes when all of it is done.
_SUMMARIES = ("chain.json", "summary.json", "results.json")
_CHECKPOINT = re.compile(r"step_(\d{8})")
_PARTIAL = re.compile(r"\.(.+)\.partial")
# A run whose process cannot be seen from here is taken to run while it writes.
_SECONDS_OF_SILENCE = 600
# Steps whose mean rate a run that is not done is shown with.
_LAST_STEPS = 20
# Folders of outputs inside folders of outputs.
_DEPTH = 3
_NOT_LOOKED_INTO = frozenset(("weights", "checkpoints", "wandb", "tokenizer", "huggingface", "targets"))


@dataclass
class Status:
    """How one output stands: `state` in a word, `about` in a few, and the lines of the long form."""

    path: Path
    kind: str
    state: str
    about: str = ""
    lines: list[tuple[str, str]] = field(default_factory=list)
    inside: list["Status"] = field(default_factory=list)


def check_status(cfg: StatusConfig) -> list[Path]:
    """The folders, which are looked at when they are shown."""
    return [Path(str(name)) for name in (cfg.folder if isinstance(cfg.folder, list) else [cfg.folder])]


def status(cfg: StatusConfig, folders: list[Path] | None = None) -> None:
    """Print how the folders stand. Raises UserError for one that is not there."""
    for folder in check_status(cfg) if folders is None else folders:
        _show(look_at(folder))


def look_at(path: Path) -> Status:
    """How an output stands, or the outputs in a folder. Raises UserError where there is nothing at all."""
    path = Path(str(path).rstrip("/") or "/")
    try:
        there = path.is_dir() or partial_folder(path).is_dir()
    except OSError as error:
        raise UserError(
            f"folder={path} cannot be looked at ({error.strerror}): ask its owner, or give another"
        ) from None
    if not there:
        what = "is a file" if path.exists() else "does not exist"
        early = (
            "" if path.exists() else "; a command that is still checking what it was given has not made its folder yet"
        )
        raise UserError(f"folder={path} {what}: give an output folder, or one that has some in it{early}")
    found = _status_of(path)
    if found is not None:
        return found
    inside = list(_outputs(path, _DEPTH))
    return Status(path, "folder", "", f"{len(inside)} outputs" if inside else "no outputs in it", inside=inside)


def _outputs(path: Path, depth: int) -> Iterator[Status]:
    """Every output in a folder; what is inside of one counts as its own affair."""
    names = set()
    try:
        entries = list(path.iterdir())
    except OSError as error:
        yield Status(path, "folder", "unreadable", str(error.strerror))
        return
    for entry in entries:
        written = _PARTIAL.fullmatch(entry.name)
        hidden = entry.name.startswith(".") or entry.name in _NOT_LOOKED_INTO
        try:
            if (written or not hidden) and entry.is_dir():
                names.add(written[1] if written else entry.name)
        except OSError as error:  # a folder that is listed, and lets nobody in
            yield Status(entry, "folder", "unreadable", str(error.strerror))
    for name in sorted(names):
        found = _status_of(path / name)
        if found is not None:
            yield found
        elif depth > 1 and (path / name).is_dir():
            yield from _outputs(path / name, depth - 1)


def _status_of(path: Path) -> Status | None:
    """How the output at a path stands; None where there is none."""
    try:
        if (path / "config.yaml").is_file() or (path / METRICS).is_file():
            return _run(path)
        if (path / STAGES_FILE).is_file() or (path / "settings.json").is_file():
            return _whole(path)
        if (path / MANIFEST).is_file():
            return _done(path)
        if partial_folder(path).is_dir():
            return _written(path)
    except (UserError, OSError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError) as error:
        state = "damaged" if is_damage(error) else "not readable"
        return Status(path, "output", state, " ".join(str(error).split())[:200])
    return None


def _done(path: Path) -> Status:
    """A whole output folder."""
    manifest = load_yaml(path / MANIFEST)
    command = _command_of(str(manifest.get("command", "")))
    files = manifest.get("files")
    if not isinstance(files, dict):
        return Status(path, command, "damaged", f"{MANIFEST} does not say which files it is of")
    missing = [name for name in files if not (path / name).is_file()]
    if missing:
        return Status(path, command, "damaged", f"{missing[0]} is missing ({len(missing)} of {len(files)} files)")
    results = manifest.get("results")
    figures = _figures(results if isinstance(results, Mapping) else {})
    lines = [("made", str(manifest.get("made", "–"))), ("took", _took(manifest))]
    lines += [(name, value) for name, value in figures.items()]
    lines.append(("by", str(manifest.get("command", "–"))))
    return Status(
        path, command, "done", ", ".join(f"{name} {value}" for name, value in list(figures.items())[:3]), lines
    )


def _took(manifest: Mapping[str, Any]) -> str:
    """How long an output was written, and what came before it was begun."""
    starting = manifest.get("seconds_starting")
    before = f", after {format_time(starting)} from the program's start to its work" if starting is not None else ""
    return f"{format_time(manifest.get('seconds'))} from its beginning to its end{before}"


def _figures(results: Mapping[str, Any]) -> dict[str, str]:
    """Plain figures of a manifest's results, those that tell most first."""
    first = ("loss", "perplexity", "kl", "validation_loss", "parameters", "tokens", "samples")
    plain = {k: v for k, v in results.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {
        name: format_value(plain[name])
        for name in [*(n for n in first if n in plain), *(n for n in plain if n not in first)]
    }


def _command_of(line: str) -> str:
    found = re.search(r"(?:launch/|minitron (?:--nproc-per-node \d+ )?|minitron_megatron )(\w+)", line)
    return found[1] if found else "output"


def _written(path: Path) -> Status:
    """An output that is being written, or was when its command ended."""
    partial = partial_folder(path)
    files = [file for file in partial.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    newest = max((file.stat().st_mtime for file in [partial, *files]), default=0.0)
    about = f"{len(files)} files, {size / 1e6:,.1f} MB, written {_ago(newest)}"
    owner, starts = holder(partial), read_starts(partial)
    running = owner is not None or (bool(starts) and _seems_alive(starts[-1], newest))
    lines = [("written so far", about), ("lock", _words_of_lock(owner, starts))]
    lines += _how_to_go_on(starts, running)
    kind = _command_of(starts[-1]["command"]) if starts else "output"
    return Status(path, kind, "running" if running else "stopped", about, lines)


def _run(path: Path) -> Status:
    """A training run."""
    config, metrics = _config(path), tail_of(path / METRICS)
    steps = _steps(config)
    trained = [line for line in metrics if _number(line, "loss") and _number(line, "step")]
    judged = [line for line in metrics if _number(line, "validation_loss")]
    last = trained[-1] if trained else {}
    starts, owner = read_starts(path), holder(partial_folder(path / "model"))
    written = (path / METRICS).stat().st_mtime if (path / METRICS).is_file() else 0.0
    running = owner is not None or (bool(starts) and _seems_alive(starts[-1], written))
    kind = _command_of(starts[-1]["command"]) if starts else "run"
    step = int(last.get("step", 0))
    lines: list[tuple[str, str]] = [("step", f"{step:,} of {steps:,}" if steps else f"{step:,}")]
    if last:
        lines.append(("loss", f"{last['loss']:.4f}, {_trend(trained)}"))
    if judged:
        lines.append(("validation loss", f"{judged[-1]['validation_loss']:.4f} at step {judged[-1]['step']:,}"))
    whole = (path / "model" / MANIFEST).is_file()
    lines += _rate(trained if whole else trained[-_LAST_STEPS:])
    left = _seconds_left(trained, steps, starts)
    if left:
        lines.append(("time left", format_time(left) if running else f"{format_time(left)} once it goes on"))
    lines.append(("last line", _ago(written) if written else "none yet"))
    lines.append(("checkpoints", _checkpoints(path / "checkpoints")))
    lines.append(("skipped steps", str(last.get("skipped", 0))))
    lines.append(("starts", _words_of_starts(starts)))
    lines.append(("lock", _words_of_lock(owner, starts)))
    about = (
        f"step {step:,} of {steps:,}" + (f", loss {last['loss']:.4f}" if last else "") if steps else f"step {step:,}"
    )
    if whole:
        lines = [line for line in lines if line[0] != "lock" or running]
        done = _done(path / "model")
        state, about = done.state, f"{about}; {done.about}" if done.state == "damaged" else about
        again = [("took is", "of its last start")] if len(starts) > 1 else []
        return Status(path, kind if kind != "run" else done.kind, state, about, [*lines, *done.lines[:2], *again])
    state = "running" if running else "stopped"
    if (path / DIVERGED).is_file() and not running:
        reason, _, advice = (path / DIVERGED).read_text(encoding="utf-8", errors="replace").strip().partition("\n")
        state, lines = "diverged", [("diverged", reason), *lines]
        if advice:
            return Status(path, kind, state, about, [*lines, ("how to go on", " ".join(advice.split()))])
    elif not running and not _any_checkpoint(path / "checkpoints") and not trained:
        state = "failed"
        lines.insert(0, ("failed", "it ended before its first step: the same command says why"))
    if running and left:
        about += f", {format_time(left)} left"
    return Status(path, kind, state, about, [*lines, *_how_to_go_on(starts, running)])


def _rate(trained: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Mean tokens a second of the steps of some lines, and which steps these are."""
    known = [line for line in trained if _number(line, "tokens_per_second") and _number(line, "step_seconds")]
    seconds = sum(line["step_seconds"] for line in known)
    if not seconds:
        return []
    rate = sum(line["tokens_per_second"] * line["step_seconds"] for line in known) / seconds
    about = f"mean of steps {known[0]['step']:,} to {known[-1]['step']:,}, without what is between steps"
    return [("tokens/s", format_value(round(rate))), ("tokens/s is", about)]


def _seconds_left(trained: list[dict[str, Any]], steps: int | None, starts: list[dict[str, Any]]) -> float | None:
    """As the run's own log has it at its last line; where lines do not say how long it ran, by the time of its steps alone."""
    if not trained or not steps:
        return None
    last, first = trained[-1], starts[-1].get("step") if starts else None
    if _number(last, "run_seconds") and type(first) is int and first < last["step"]:
        return seconds_left(last["step"], steps, first, last["run_seconds"])
    seconds = [line["step_seconds"] for line in trained[-_LAST_STEPS:] if _number(line, "step_seconds")]
    return (steps - last["step"]) * statistics.median(seconds) if seconds else None


def _config(path: Path) -> dict[str, Any]:
    """A run's config.yaml; nothing where it is half-written."""
    try:
        return load_yaml(path / "config.yaml")
    except UserError:
        return {}


def _steps(config: Mapping[str, Any]) -> int | None:
    """Optimizer steps of a run, as config.number_of_steps counts them."""
    try:
        trainer, length = config["trainer"], config["data"]["sequence_length"]
        if trainer.get("steps") is not None:
            return int(trainer["steps"])
        return math.ceil(trainer["tokens"] / (trainer["global_batch_size"] * length))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def _whole(path: Path) -> Status:
    """A chain, a demo or other stages: what is done, and how the one that is not stands."""
    done = _stages_done(path / STAGES_FILE)
    inside = [one for one in _outputs(path, _DEPTH) if one.state != "done"]
    starts = read_starts(path)
    newest = max((file.stat().st_mtime for file in (path / STAGES_FILE, path / STARTS) if file.is_file()), default=0.0)
    busy = any(one.state == "running" for one in inside)
    owner = holder(path)
    running = busy or owner is not None or (bool(starts) and _seems_alive(starts[-1], newest))
    summary = next((name for name in _SUMMARIES if (path / name).is_file()), None)
    bad = next((one for one in inside if one.state in ("diverged", "damaged", "failed")), None)
    state = "running" if running else "done" if summary and not inside else bad.state if bad else "stopped"
    kind = _command_of(starts[-1]["command"]) if starts else "stages"
    stages = ", ".join(f"{name} {format_time(seconds)}" for name, seconds in done.items())
    lines = [
        ("done", stages or "no stage yet"),
        ("together", f"{format_time(sum(done.values()))}, the start of each stage's program included"),
    ]
    lines += [(one.path.name, f"{one.state}: {one.about}") for one in inside]
    if starts:
        lines.append(("starts", _words_of_starts(starts)))
        lines += [("lock", _words_of_lock(owner, starts))] if state != "done" else []
    lines += [("result", str(path / summary))] if state == "done" else _how_to_go_on(starts, running)
    about = f"{len(done)} stages done" + (f"; {inside[0].path.name}: {inside[0].about}" if inside else "")
    return Status(path, kind, state, about, lines)


def _stages_done(file: Path) -> dict[str, float]:
    """Seconds of each stage that is done."""
    try:
        values = read_json(file)
        return {str(k): float(v["seconds"]) for k, v in values.items() if isinstance(v, dict) and "seconds" in v}
    except (OSError, ValueError, ArithmeticError, AttributeError, TypeError):
        return {}


def _seems_alive(start: dict[str, Any], newest: float) -> bool:
    """Whether the process of a start runs; on another machine by how long ago it last wrote."""
    alive = is_alive(start)
    return time.time() - newest < _SECONDS_OF_SILENCE if alive is None else alive


def _words_of_lock(owner: int | None, starts: list[dict[str, Any]]) -> str:
    if owner is not None:
        return f"held by process {owner}, which runs"
    if not starts:
        return "held by nobody here"
    last = starts[-1]
    alive = is_alive(last)
    who = f"process {last.get('pid')} on {last.get('host')}"
    return f"{who} {'cannot be seen from here' if alive is None else 'runs' if alive else 'has ended'}"


def _words_of_starts(starts: list[dict[str, Any]]) -> str:
    if not starts:
        return "not recorded"
    steps = [f"step {one['step']:,}" for one in starts[1:] if type(one.get("step")) is int]
    again = f", again from {', '.join(steps[-3:])}" if steps else ""
    return f"{len(starts)} ({len(starts) - 1} restarts), first {_ago(float(starts[0].get('time', 0)))}{again}"


def _how_to_go_on(starts: list[dict[str, Any]], running: bool) -> list[tuple[str, str]]:
    """The line that continues what is not done."""
    if running or not starts:
        return []
    directory = str(starts[-1].get("directory", ""))
    there = f"cd {spelling.quoted(directory)} && " if directory and directory != str(Path.cwd()) else ""
    return [("continue", there + starts[-1]["command"])]


def _any_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and any(_CHECKPOINT.fullmatch(path.name) for path in folder.iterdir())


def _checkpoints(folder: Path) -> str:
    """The newest checkpoint and its age, and whether one is being written."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = sorted(name for name in names if _CHECKPOINT.fullmatch(name))
    writing = ", another one is being written" if any(_PARTIAL.fullmatch(name) for name in names) else ""
    if not found:
        return f"none yet{writing}"
    return f"{found[-1]}, {_ago((folder / found[-1]).stat().st_mtime)}{writing}"


def _trend(trained: list[dict[str, Any]]) -> str:
    """The last losses before the last."""
    return "before " + ", ".join(f"{line['loss']:.4f}" for line in trained[-4:-1]) if len(trained) > 1 else "the first"


def _number(line: Mapping[str, Any], name: str) -> bool:
    return isinstance(line.get(name), int | float) and math.isfinite(line[name])


def _ago(then: float) -> str:
    return f"{format_time(max(0.0, time.time() - then))} ago"


def _show(one: Status) -> None:
    """The long form of an output, or a row of each that is in a folder."""
    if one.kind == "folder":
        rows = [[found.path.relative_to(one.path), found.kind, found.state, found.about] for found in one.inside]
        print_table(f"{one.path}: {one.about}", ["output", "made by", "state", ""], rows)
        return
    screen = console()
    screen.print(f"{one.path}: {one.state} ({one.kind})", highlight=False, soft_wrap=True, style="bold")
    if not one.lines and one.about:
        screen.print(f"  {one.about}", highlight=False, soft_wrap=True)
    width = max((len(name) for name, _ in one.lines), default=0)
    for name, value in one.lines:
        screen.print(f"  {name:<{width}}  {value}", highlight=False, soft_wrap=True)
