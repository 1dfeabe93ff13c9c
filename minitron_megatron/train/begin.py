"""A run that begins with a checkpoint of another: `trainer.start_from=RUN`, in an output of its own, with other options.

    trainer.start_with=everything    weights, moments and step: after a divergence, with another rate or precision. Samples go on
                                     where they were, so what decides them, data included, must be as it was; arithmetic may be
                                     other
    trainer.start_with=weights       weights alone, from step 1, on any samples: a warm start

What it began with is written to output/started_from.json before the first step, and from there into the manifest: where that
checkpoint was, its stamp, which options and inputs are others now, and what that run itself began with. Once the run has a
checkpoint of its own, the other folder is not read any more. Nothing here needs torch.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from minitron_megatron.asked import STARTED_IN
from minitron_megatron.changing import as_stored, decided_by, decisive, free_options, in_words, other_in_words
from minitron_megatron.checkpoints.folder import DIVERGED, load_json
from minitron_megatron.checkpoints.index import Stored, stored_shapes, stored_tensors
from minitron_megatron.checkpoints.stamps import PREFIX, stamp_of_folder
from minitron_megatron.config import TrainingConfig, number_of_steps
from minitron_megatron.effects import SAMPLES
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import resolved_config
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.plain_files import write_whole
from minitron_megatron.train import saved
from minitron_megatron.train.identity import identify

log = logging.getLogger(__name__)
FILE, OPTION = "started_from.json", "trainer.start_from"
EVERYTHING, WEIGHTS = "everything", "weights"
# Options without which a checkpoint's moments do not fit the run, though they change no sample: what has moments, and in which
# groups and precision they are.
_OF_MOMENTS = ("optim.state_precision", "optim.decay_embeddings")
_OF_VALIDATION = ("trainer.validation_samples",)
_PROJECTION = "intermediate_projection"
# Inputs with which a loss is another one, whatever the options say. The student's weights are those of the checkpoint.
_OF_THE_LOSS = ("data", "teacher", "cache")


@dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    Attributes:
        checkpoint: its folder.
        step: optimizer steps that were done there.
        takes: EVERYTHING or WEIGHTS.
        stamp: tells whether the checkpoint is still the same.
        options: those that are others in this run, each [before, now].
        before: what that run itself began with, in the same form.
        others: inputs of other contents than that run had, whatever their paths, by name, each [digest before, now].
    """

    checkpoint: str
    step: int
    takes: str
    stamp: str
    options: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keeps_judging(self) -> bool:
        """Whether losses are comparable to those of that run, so that the spike guard may go on with its medians."""
        others = any(name in self.others for name in _OF_THE_LOSS)
        return not (others or any(name.startswith(("distill.", "data.", "teacher.")) for name in self.options))

    @property
    def inputs(self) -> dict[str, str]:
        """For a manifest."""
        return {"start_from": self.stamp}

    def write(self, run: Path) -> None:
        """Keep it in the run folder."""
        write_whole(run / FILE, json.dumps(asdict(self), indent=1) + "\n")


def check_another(cfg: TrainingConfig, run: Path) -> None:
    """Raise UserError where the run would begin with itself."""
    asked = cfg.trainer.start_from
    if asked is not None and Path(asked).resolve().is_relative_to(run.resolve()):
        raise UserError(f"{OPTION}={asked} is the output itself, which continues without it: choose another output=")


def began_with(run: Path, asked: Path) -> bool:
    """Whether a run, or checkpoint, that is asked for has the checkpoint that the one in the output folder began with."""
    if (began := _read(run / FILE)) is None:
        return False
    name = Path(began.checkpoint).name
    there = (asked / "checkpoints" / name, *([asked] if asked.name == name else []))
    return any((folder / saved.FORMAT).is_file() and _stamp(folder) == began.stamp for folder in there)


def check_beginning(
    cfg: TrainingConfig, run: Path, shape: ModelShape, layout: Layout, inputs: Mapping[str, str]
) -> Beginning | None:
    """What the run in the output folder begins, or began, with; None for its model folder alone. Raises UserError.

    `inputs` are digests of all that it reads beside that, by name.
    """
    asked = cfg.trainer.start_from
    if asked is None:
        return None
    began = _read(run / FILE)
    if began and (saved.find_checkpoints(run / "checkpoints") or (run / "model").exists()):
        return began
    # Killed before its first checkpoint, it begins with the same again, though that run may have newer ones by now.
    path = Path(began.checkpoint) if began and Path(began.checkpoint).is_dir() else find_checkpoint(Path(asked))
    found = _look_at(cfg, path, inputs)
    if began and (began.step, began.takes, began.stamp) != (found.step, found.takes, found.stamp):
        raise UserError(
            f"{path} is another checkpoint than the one that output={run} began with: choose another output="
        )
    stored = stored_tensors(path)
    _check_shape(stored, shape, path)
    if found.takes == EVERYTHING:
        _check_goes_on(cfg, found, stored)
        saved.check_readable(saved.whole(path), layout)
    return found


def write_beginning(cfg: TrainingConfig, run: Path, beginning: Beginning | None) -> str:
    """Have in the run folder what the run is, and what it began with; gives the run's id."""
    # First: by it a run that is killed in between is known, and begun again.
    write_whole(run / "config.yaml", yaml.safe_dump({STARTED_IN: os.getcwd(), **resolved_config(cfg)}, sort_keys=False))
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / DIVERGED).unlink(missing_ok=True)
    if beginning:
        beginning.write(run)
    return identify(run)


def find_checkpoint(asked: Path) -> Path:
    """The checkpoint that a path means: it itself, or the newest whole one of a run. Raises UserError."""
    for folder in (asked / "checkpoints", asked):
        there, damaged = saved.newest_whole(folder)
        if there is not None:
            for name, reason in damaged.items():
                log.info("%s is damaged (%s): %s is taken", folder / name, reason, there.path.name)
            return there.path
    if any(path == asked.absolute() for _, path in saved.find_checkpoints(asked.absolute().parent)):
        return asked
    raise UserError(
        f"{OPTION}={asked} has no checkpoint: give a run folder, or one of its checkpoints/step_…; a model folder is for "
        "student= or model="
    )


def _look_at(cfg: TrainingConfig, path: Path, inputs: Mapping[str, str]) -> Beginning:
    """A checkpoint, and how this run differs from that which wrote it. Raises UserError."""
    folder, takes = path.absolute(), cfg.trainer.start_with
    source, step = folder.parent.parent, int(folder.name.removeprefix("step_"))
    written = saved.whole(path).written
    # One of an earlier version has its options in its run's folder alone. What weights are taken from may have been copied.
    known = takes == EVERYTHING or (source / "config.yaml").is_file()
    now = decisive(resolved_config(cfg), free_options(type(cfg)))
    before = saved.options_of(written, now)
    if before is None:
        before = saved.read_options(source, now) if known else {}
    before = saved.with_copies(before, written.inputs, now, inputs)
    other = {
        name: [before.get(name), value]
        for name, value in now.items()
        if not name.startswith("trainer.start_") and (name in before or name.startswith("distill."))
    }
    options = {name: [a, b] for name, (a, b) in other.items() if as_stored(a) != as_stored(b)}
    began = _read(source / FILE)
    before, others = asdict(began) if began else None, _other_inputs(written.inputs, inputs)
    if written.inputs is None and takes == EVERYTHING:
        log.warning("%s does not say what data and models it is of: that they are the same is not known", path)
    return Beginning(str(path), step, takes, _stamp(path), options, before, others)


def _other_inputs(before: Mapping[str, str] | None, now: Mapping[str, str]) -> dict[str, list[str | None]]:
    """Inputs that are others than they were: those that both runs have, and what lies beside their models, in either."""
    if before is None:
        return {}
    names = {name for name in {*before, *now} if (name in before and name in now) or name.startswith(PREFIX)}
    return {name: [before.get(name), now.get(name)] for name in sorted(names) if before.get(name) != now.get(name)}


def _stamp(path: Path) -> str:
    """What tells that a checkpoint is another one. Raises UserError where it is damaged."""
    # Where it has the digests of all files, it tells; their bytes are compared with them before they are read.
    named = saved.whole(path).written.files is not None
    files = [path / saved.FORMAT] if named else [file for file in path.iterdir() if file.is_file()]
    return next(iter(stamp_of_folder("start_from", path, files).values()))


def _read(file: Path) -> Beginning | None:
    """What a run folder says that its run began with. Raises UserError."""
    if not file.is_file():
        return None
    values = load_json(file, ": choose another output=")
    try:
        return Beginning(**values)
    except TypeError:
        raise UserError(f"{file} is damaged: choose another output=") from None


def _check_shape(stored: Mapping[str, Stored | None], shape: ModelShape, path: Path) -> None:
    """Raise UserError where a checkpoint is of another model than the one that is to begin with it."""
    for key, wanted in stored_shapes(shape).items():
        found = stored.get(key)
        if found is None or found[0] != wanted:
            raise UserError(
                f"{path} is of another model: {key} is {list(found[0]) if found else 'not in it'}, and {list(wanted)} here: give "
                "the model that it was trained from"
            )


def _check_goes_on(cfg: TrainingConfig, found: Beginning, stored: Mapping[str, Stored | None]) -> None:
    """Raise UserError where the step, the moments or the samples of a checkpoint mean nothing with these options."""
    decides = decided_by(type(cfg))
    instead = f"give the same, or trainer.start_with={WEIGHTS}, from step 1"
    for name, (before, now) in found.options.items():
        if (decides[name] == SAMPLES and name not in _OF_VALIDATION) or name in _OF_MOMENTS:
            raise UserError(f"{found.checkpoint} is of a run with {in_words(name, before, now)}: {instead}")
    if "data" in found.others:
        words = other_in_words("data", *found.others["data"])
        raise UserError(f"{found.checkpoint} is of a run with {words}, which its step counts: {instead}")
    has = any(_PROJECTION in key for key in stored)
    if has != bool(getattr(cfg, "distill", None) and cfg.distill.intermediate):
        raise UserError(
            f"{found.checkpoint} is of a run {'with' if has else 'without'} distill.intermediate, whose linear has moments, too: "
            f"{instead}"
        )
    if number_of_steps(cfg) <= found.step:
        raise UserError(
            f"{found.checkpoint} has {found.step} steps done, and the run has {number_of_steps(cfg)}: raise trainer.steps=, or "
            f"take trainer.start_with={WEIGHTS}"
        )


def advice_after_divergence(cfg: TrainingConfig, *, in_bf16: bool) -> str:
    """What to type where the spike guard has ended a run."""
    rate = cfg.optim.lr / 2
    words = [f"optim.lr={rate:g}", *([f"optim.min_lr={rate / 10:g}"] if cfg.optim.min_lr > rate else [])]
    another = f"output={cfg.output.rstrip('/')}-2"
    also = " (or precision=fp32)" if in_bf16 else ""
    there = saved.find_checkpoints(Path(cfg.output) / "checkpoints")
    if not there and cfg.trainer.start_from is None:
        return f"no step is saved: begin again with the same words but {' '.join(words)}{also} {another}"
    start = cfg.output if there else cfg.trainer.start_from
    step = f"step {there[-1][0]}, the last that is saved" if there else "where it began"
    return f"go on from {step}, with the same words but {OPTION}={start} {' '.join(words)}{also} {another}"
