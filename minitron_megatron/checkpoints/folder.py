"""Output folders that are whole or not there, and the manifest that says how each was made.

    outputs/.name.partial/   while a command works (its lock keeps a second run out; what a killed run left is swept by the
                             next, or continued where the command can: unfinished.py)
    outputs/name/            renamed when complete; a folder with manifest.yaml is whole

A model folder holds model.yaml (its shape), weights/ (Megatron distributed checkpoint), tokenizer/ and manifest.yaml.
"""

import datetime
import errno
import logging
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from minitron_megatron import __version__
from minitron_megatron.asked import STARTED_IN, Asked
from minitron_megatron.changing import differences, in_words
from minitron_megatron.checkpoints.digests import digest_of_files, digests_of
from minitron_megatron.checkpoints.locks import unlock
from minitron_megatron.checkpoints.places import check_replaceable, place_of
from minitron_megatron.checkpoints.stamps import PREFIX, for_all_nodes, say_others
from minitron_megatron.checkpoints.unfinished import MARKS, check_unfinished, partial_folder, start_partial
from minitron_megatron.cli.starting import seconds_of_process, seconds_starting
from minitron_megatron.console import format_gib
from minitron_megatron.ending import NOTHING_KEPT, SOME_KEPT, keeping
from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.deciding import ask_rank_zero, check_same, from_rank_zero, wait_until_seen
from minitron_megatron.plain_files import read_json, read_yaml
from minitron_megatron.starts import record_start

MANIFEST, SHAPE_FILE, WEIGHTS, TOKENIZER = "manifest.yaml", "model.yaml", "weights", "tokenizer"
# In outputs: what a command that measures found, and a line for each step of a training run.
RESULTS, METRICS = "results.json", "metrics.jsonl"
# Beside a model's weights, of which its digest is, files up to so many bytes are compared whenever it is opened; all of them with
# verify=true. A large vocabulary has more.
_SMALL = 2**20
# Of a run that the spike guard ended: why, in a line.
DIVERGED = "diverged.txt"
log = logging.getLogger(__name__)


@dataclass
class Output:
    """A folder being written: put files under `path`, figures for the manifest into `results`.

    A command that can continue sets `keep` once there is something to continue from: a failure then leaves the folder.
    Where a model ran, `precision` says what `precision=auto` was and why (parallel/precision.py, `record`); `started_from` says
    which checkpoint of another run a training began with, and how it differs (train/begin.py).
    """

    path: Path
    done: bool = False
    keep: bool = False
    results: dict[str, Any] = field(default_factory=dict)
    precision: Mapping[str, str] = field(default_factory=dict)
    started_from: Mapping[str, Any] = field(default_factory=dict)
    digest: str | None = None
    began: float = field(default_factory=time.monotonic)
    process_seconds: float = field(default_factory=seconds_of_process)


def check_output(
    path: Path | str,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    resume: bool,
    free: frozenset[str] = frozenset(),
    anew: bool = False,
) -> None:
    """Raise, before the work begins, the UserError that output_folder would; `inputs` are those that are known by then."""
    asked = Asked.now(config, inputs, free)

    def same(before: Asked) -> bool:
        return before.same_options(asked) and all(before.inputs.get(n) == d for n, d in inputs.items())

    place = place_of(Path(path))
    if not _already_there(place, None if anew else same, resume, asked, free):
        check_unfinished(place, asked, resume)


@dataclass(frozen=True)
class ModelFolder:
    """A whole model folder."""

    path: Path
    shape: ModelShape
    digest: str

    @property
    def weights(self) -> Path:
        """The Megatron distributed checkpoint."""
        return self.path / WEIGHTS

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's files; may be absent in folders of random models."""
        return self.path / TOKENIZER


# What kind of value a manifest has under each key, where it has it.
_KINDS = dict.fromkeys(("files", "inputs", "results", "config", "versions", "digests"), dict) | dict.fromkeys(
    ("digest", "command", "made", "fingerprint", STARTED_IN), str
)


def read_manifest(path: Path | str) -> dict[str, Any]:
    """The manifest of a whole folder. Raises UserError when the folder is missing, half-written or damaged."""
    path = Path(path)
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise UserError(f"{path} {what}: give the output folder of the command that makes it{_of_another_kind(path)}")
    file = path / MANIFEST
    if not file.is_file():
        if other := _of_another_kind(path):
            raise UserError(f"{path} has no {MANIFEST}{other}")
        raise UserError(f"{path} has no {MANIFEST}: it is half-written or not one of our folders; make it again")
    manifest = load_yaml(file)
    odd = [key for key, kind in _KINDS.items() if not isinstance(manifest.get(key, kind()), kind)]
    odd += [key for key in ("files", "digest") if key not in manifest]
    files = manifest.get("files")
    if odd or not all(map(_is_name, files)):
        raise UserError(f"{file} is damaged ({odd[0] if odd else 'files'} is missing or odd): make the folder again")
    for name, size in files.items():
        there = path / name
        if not there.is_file() or there.stat().st_size != size:
            found = f"has {there.stat().st_size} bytes instead of {size}" if there.is_file() else "is missing"
            raise UserError(f"{there} {found}: the folder is damaged; make it again")
    return manifest


def _of_another_kind(path: Path) -> str:
    """What to do with something that people give in place of one of these folders; empty where it is nothing known."""
    if (path / "config.json").is_file():
        return "; it is a Hugging Face folder: import_hf hf=… makes a model folder of it"
    if path.is_file() and path.name.endswith((".txt", ".md", ".jsonl", ".gz", ".xz", ".zst", ".parquet")):
        return "; prepare_data input=… makes a data folder of text"
    return ""


def _is_name(name: object) -> bool:
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts


def load_yaml(file: Path) -> dict[str, Any]:
    """A YAML mapping, without ever building objects. Raises UserError when it is not one."""
    return _mapping(read_yaml, file, "a mapping of keys to values")


def load_json(file: Path, remedy: str = "") -> dict[str, Any]:
    """A JSON object. Raises UserError when it is not one, which ends with what there is to do, as ": make it again"."""
    return _mapping(read_json, file, "a JSON object", remedy)


def _mapping(read: Callable[[Path], Any], file: Path, what: str, remedy: str = "") -> dict[str, Any]:
    try:
        values = read(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({in_one_line(error, 200)}){remedy}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is not {what}{remedy}")
    return values


def read_output(path: Path, file: str, command: str, option: str = "") -> dict[str, Any]:
    """The manifest of what a command has found, in which its main file is: small files, so all are compared with its digest.

    Raises UserError where it is another command's, or damaged.
    """
    manifest = read_manifest(path)
    if file not in manifest["files"]:
        made = manifest.get("command", "another command")
        raise UserError(f"{option}{path} has no {file} (it was made by {made}): give the output of {command}")
    _compare(path, manifest)
    return manifest


def load_results(path: Path, command: str) -> dict[str, Any]:
    """What a command that measures has found: its results.json. Raises UserError."""
    read_output(path, RESULTS, command)
    return load_json(path / RESULTS, f": run {command} again")


def open_model_folder(path: Path | str) -> ModelFolder:
    """Check a model folder by its manifest and give its shape; the output of a training run stands for its `model/`."""
    path = Path(path)
    if not (path / MANIFEST).exists() and (path / "model" / MANIFEST).exists():
        path = path / "model"
    manifest = read_manifest(path)
    if not (path / SHAPE_FILE).is_file() or not (path / WEIGHTS / ".metadata").is_file():
        made = manifest.get("command", "another command")
        raise UserError(f"{path} is not a model folder (it was made by {made}): give the output of import_hf or prune")
    check_beside(path, manifest, _SMALL)
    return ModelFolder(
        path, ModelShape.from_dict(load_yaml(path / SHAPE_FILE), str(path / SHAPE_FILE)), manifest["digest"]
    )


def check_beside(path: Path, manifest: Mapping[str, Any], most: float = math.inf) -> None:
    """Raise UserError where a file beside a model's weights, of `most` bytes, is no longer the one that was written there.

    Folders of earlier versions have no digests of these files.
    """
    known = manifest.get("digests", {})
    for name, size in manifest["files"].items():
        if name in known and size <= most and digests_of(path, [name])[name] != known[name]:
            raise UserError(
                f"{path / name} differs from its digest in {MANIFEST}: put it back as it was (edit a copy elsewhere), or make "
                "the folder again"
            )


def verify_files(path: Path, digest: str) -> None:
    """Read every file of a folder that `output_folder` made and compare with its digest. Raises UserError."""
    _compare(path, {**read_manifest(path), "digest": digest})


def _compare(path: Path, manifest: Mapping[str, Any]) -> None:
    if digest_of_files(path, manifest["files"]) != manifest["digest"]:
        raise UserError(f"{path} is damaged: its files differ from the digest in its {MANIFEST}; make it again")


@contextmanager
def output_folder(
    path: Path | str,
    *,
    command: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    resume: bool,
    free: frozenset[str] = frozenset(),
    continues: bool = False,
    anew: bool = False,
    reasons: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Output]:
    """Write a folder that appears whole or not at all; every rank enters, rank 0 looks, creates, renames and sweeps.

    Args:
        path: where the folder is to be; a link is followed.
        command: what makes it, for the manifest.
        config: resolved configuration (plain values).
        inputs: digest of each input, by name.
        resume: when a whole folder with the same config and inputs is there already, yield it with `done=True`.
        free: options that decide nothing of the result, by their dotted names (changing.py).
        continues: the command goes on from what a killed run with the same config and inputs left in the partial folder.
        anew: a whole folder that is there is replaced, once the new one is written: for views of other folders.
        reasons: for the manifest, why options that were auto became what they are in `config`.

    Raises:
        UserError: `path` exists and was made otherwise, or is unfinished and was begun otherwise, another run is writing it, the
            disk is full, or ranks have read different options or inputs.
    """
    path = place_of(Path(path))
    asked = Asked.now(config, inputs, free)
    check_same({**asked.options, **for_all_nodes(inputs)}, "options or inputs")

    def same(before: Asked) -> bool:
        return before.fingerprint() == asked.fingerprint()

    def results_there() -> dict[str, Any] | None:
        there = _already_there(path, None if anew else same, resume, asked, free) and not anew
        return read_manifest(path).get("results", {}) if there else None

    found = ask_rank_zero(results_there)
    if found is not None:
        log.info("%s is complete already: nothing to do", path)
        yield Output(path, done=True, results=found)
        return
    partial = partial_folder(path)
    held = from_rank_zero(lambda: start_partial(path, asked, resume, continues))
    if held is not None:
        record_start(partial)
    output = Output(partial)
    try:
        wait_until_seen(partial)
        with keeping(lambda: SOME_KEPT if output.keep else NOTHING_KEPT):
            yield output
            collectives.barrier()
            if held is not None:
                _finish(output, path, command, config, asked, anew, reasons)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left while writing {path}: free some and run the same command again") from error
        raise
    finally:
        if held is not None:
            if not output.keep:
                shutil.rmtree(partial, ignore_errors=True)
            unlock(held)
    wait_until_seen(path / MANIFEST)
    output.path = path


def check_space(folder: Path, need: float, what: str, *, why: str = "", advice: str = "") -> None:
    """Raise UserError where the disk of a folder, or of the first of its parents that is there, has fewer bytes free than `need`.

    `what` needs them; `why` (in brackets) and `advice` are said where there is something to say.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise UserError(
            f"no space left for {what}: {format_gib(need / 2**30)} are needed{f' ({why})' if why else ''}, "
            f"{format_gib(free / 2**30)} are free{f'; {advice}' if advice else ''}"
        )


def check_place(path: Path, *, try_it: bool = False) -> Path:
    """The first of a path and its parents that is there, in which the output is going to be.

    Raises UserError where no folder can be made at the path; with `try_it` one is made beside it, and removed.
    """
    try:
        os.lstat(partial_folder(path.absolute()))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(f"output={path} cannot be made ({error.strerror}): choose another output=") from None
    if os.path.islink(place_of(path)):
        raise UserError(f"output={path} is a link to itself: choose another output=")
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    around = next((p for p in path.absolute().parents if is_output(p)), None)
    if around is not None and not (path / MANIFEST).is_file():
        raise UserError(
            f"output={path} is inside of {around}, a whole output, with which it would be removed: choose another output="
        )
    if not existing.is_dir():
        raise UserError(f"output={path} cannot be made: {existing} is a file; choose another output=")
    if not os.access(existing, os.W_OK):
        raise UserError(f"output={path} cannot be made: {existing} is not writable; choose another output=")
    if try_it and existing != path:
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".minitron-", dir=existing))
        except OSError as error:
            raise UserError(
                f"output={path} cannot be made in {existing} ({error.strerror}): choose another output="
            ) from None
    return existing


def is_output(path: Path) -> bool:
    """Whether a folder is a finished output: other programs call files manifest.yaml, too."""
    try:
        return (path / MANIFEST).is_file() and {"fingerprint", "command", "files"} <= set(load_yaml(path / MANIFEST))
    except UserError:
        return False


def _already_there(
    path: Path,
    same: Callable[[Asked], bool] | None,
    resume: bool,
    asked: Asked,
    free: frozenset[str],
) -> bool:
    """Whether a whole folder is there; `same`, if given, says of what it was asked for whether it is what is `asked` now.

    Raises UserError for what is in the way; it names the files that are others now, and the first of the options that is another.
    """
    existing = check_place(path)
    if existing != path:
        return False
    empty = not any(path.iterdir())
    if empty or same is None:
        check_replaceable(path)
    if empty:
        return False
    if not (path / MANIFEST).is_file():
        raise UserError(f"output={path} exists and is not one of our folders: choose another output=")
    if not resume:
        raise UserError(f"output={path} exists and resume=false: remove it or choose another output=")
    if same is None:
        return True
    before = Asked.read(read_manifest(path), free).as_spelt_in(asked)
    if not same(before):
        inputs, had, now = asked.inputs, before.options, asked.options
        others = say_others({n: d for n, d in before.inputs.items() if n in inputs or n.startswith(PREFIX)}, inputs)
        first = next((f" ({in_words(n, had[n], now[n])})" for n in differences(had, now)), "")
        if others and not first:
            raise UserError(f"output={path} was made {others}; choose another output=, or remove it")
        raise UserError(
            f"output={path} was made with other options or inputs{first}: remove it or choose another output="
        )
    return True


def _finish(
    output: Output,
    path: Path,
    command: str,
    config: Mapping[str, Any],
    asked: Asked,
    anew: bool,
    reasons: Mapping[str, str],
) -> None:
    there = {str(f.relative_to(output.path)): f.stat().st_size for f in sorted(output.path.rglob("*")) if f.is_file()}
    # A manifest may be there already: of a run that was killed before the folder had its name.
    files = {name: size for name, size in there.items() if name not in (*MARKS, MANIFEST)}
    manifest = {
        "command": command,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "digest": output.digest or digest_of_files(output.path, files),
        **({"digests": digests_of(output.path, _beside(files))} if SHAPE_FILE in files else {}),
        "fingerprint": asked.fingerprint(),
        **_cost(output),
        **({"precision": dict(output.precision)} if output.precision else {}),
        "inputs": dict(asked.inputs),
        **({"started_from": dict(output.started_from)} if output.started_from else {}),
        "results": output.results,
        "versions": _versions(),
        **({"automatic": dict(reasons)} if reasons else {}),
        STARTED_IN: asked.started_in,
        "config": dict(config),
        "files": files,
    }
    with open(output.path / MANIFEST, "w", encoding="utf-8") as file:
        yaml.safe_dump(manifest, file, sort_keys=False, allow_unicode=True)
        file.flush()
        os.fsync(file.fileno())
    # Reading all files may have taken long: one that ended meanwhile can be continued.
    for mark in MARKS:
        (output.path / mark).unlink(missing_ok=True)
    replaced = path.with_name(f".{path.name}.replaced")
    if anew and (path / MANIFEST).is_file():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(path, replaced)
    elif path.exists():
        path.rmdir()
    os.rename(output.path, path)
    shutil.rmtree(replaced, ignore_errors=True)


def _beside(files: Iterable[str]) -> list[str]:
    """Files of a model folder that its digest is not of."""
    return [name for name in files if Path(name).parts[0] != WEIGHTS]


def _cost(output: Output) -> dict[str, Any]:
    """What an output took: seconds from its beginning, and to start; in so many processes, each on such a device."""
    # A process that only read and wrote files has not touched its GPU, nor, it may be, torch; nor may one that works on the CPU.
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "seconds": round(time.monotonic() - output.began, 2),
        "seconds_starting": seconds_starting(output.process_seconds),
        "processes": collectives.world_size(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "megatron-core", "transformers")
    return {"minitron-megatron": __version__, **{name: version(name) for name in names}}
