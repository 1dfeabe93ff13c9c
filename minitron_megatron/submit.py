"""`launch/submit.py`: a command of launch/, checked as it would be, into a job script and into Slurm's queue.

    cluster=PRESET, nodes=, …  ─┐
    -- distill teacher=… …     ─┴─▶ composed, dry run ─▶ output/job.sh ─▶ sbatch

The script is made from job.sh.jinja and sources slurm/common.sh, as those in slurm/ do: signals, requeueing, containers and logs
are the same. It can be read, edited and given to sbatch again.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jinja2

from minitron_megatron.checkpoints.folder import output_folder
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.cli.spelling import command_line, script
from minitron_megatron.config import ClusterConfig, HardwareConfig, SubmitConfig, flat, model_options
from minitron_megatron.console import console
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import compose, resolved_config
from minitron_megatron.parallel.layout import world_size_from_env
from minitron_megatron.stages import ROOT, run_program, runnable, stage_words

SCRIPT = "job.sh"
# slurm/ of the repository, or the package's copy of it.
SCRIPTS = (Path(__file__).parent / "slurm").resolve()
# These start processes themselves, or are this one.
_NOT_AS_A_JOB = {
    "compress": f"{script('compress.sh')} runs a chain on all nodes",
    "distill_candidates": f"{script('distill_candidates.sh')} runs them on all nodes, {script('halving.sh')} side by side",
    "demo": "it runs on one machine",
    "status": "it reads files: run it here",
    "submit": "name the command that the job is to run",
    "throughput": "it starts its processes itself, on one machine",
}
# Only these take a model's sizes alone outside of a dry run.
_WITHOUT_WEIGHTS = ("random_model", "benchmark")
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")


@dataclass(frozen=True)
class Job:
    """A command that is to be a job, composed and checked."""

    name: str
    words: list[str]
    config: Any


def check_submit(cfg: SubmitConfig) -> Job:
    """The command's options, and the job's. Raises UserError."""
    if world_size_from_env() > 1:
        raise UserError("start submit in one process: it starts none itself")
    name, words = read_command(cfg.command)
    config = compose(name, words)
    check_job(cfg)
    if cfg.submit and not cfg.dry_run and name not in _WITHOUT_WEIGHTS:
        # The rehearsal takes a preset for a model, and knows which ones the command can do without.
        for option in model_options(type(config)):
            if getattr(config, option).num_layers is not None:
                getattr(config, option).folder(option)
    return Job(name, words, config)


def submit(cfg: SubmitConfig, job: Job | None = None) -> None:
    """Rehearse the command, write the script, give it to sbatch. Raises UserError."""
    job = job or check_submit(cfg)
    name, words, config = job.name, job.words, job.config
    rehearse(name, [*words, *_hardware_words(config, cfg.cluster, words)], cfg.nodes * processes_per_node(cfg.cluster))
    script = render(cfg, name, words, config)
    if cfg.dry_run or not cfg.submit:
        console().print(script, highlight=False, soft_wrap=True)
    if cfg.dry_run:
        return
    # A script that was written to be looked at is the one that is submitted.
    what = {key: value for key, value in resolved_config(cfg).items() if key != "submit"}
    with output_folder(cfg.output, command=command_line(), config=what, inputs={}, resume=cfg.resume) as out:
        if not out.done:
            (out.path / SCRIPT).write_text(script, encoding="utf-8")
    file = Path(cfg.output) / SCRIPT
    if cfg.submit:
        console().print(f"Submitted: job {_sbatch(file)} ({file})")
    else:
        console().print(f"Written: {file}; sbatch it when it is right")


def read_command(value: Any) -> tuple[str, list[str]]:
    """A command's name and its words, given as one line or as a list. Raises UserError."""
    try:
        words = shlex.split(value) if isinstance(value, str) else list(map(str, value))
    except ValueError as error:
        raise UserError(f"command={value} cannot be read ({error}): mend its quotes, or write it after --") from None
    if words[:1] in (["python"], ["torchrun"]):
        raise UserError(f"command={' '.join(words)}: leave {words[0]} out, the job starts it on every node")
    if not words:
        raise UserError("no command: write it after --, as in -- distill teacher=… student=… data.path=… output=…")
    name = words[0].removeprefix("launch/").removesuffix(".py")
    if name in _NOT_AS_A_JOB:
        raise UserError(f"{name} is not for a job of this kind: {_NOT_AS_A_JOB[name]}")
    if name not in COMMANDS:
        known = ", ".join(sorted(set(COMMANDS) - set(_NOT_AS_A_JOB)))
        raise UserError(f"there is no command {name}: it is one of {known}")
    return name, words[1:]


def processes_per_node(cluster: ClusterConfig) -> int:
    """One a GPU, unless the cluster says otherwise."""
    return cluster.processes_per_node or max(1, cluster.gpus_per_node)


def check_job(cfg: SubmitConfig) -> None:
    """Raise UserError for what Slurm or the shell would take otherwise than it is meant."""
    cluster = cfg.cluster
    if not _TIME.fullmatch(cluster.time):
        raise UserError(f"cluster.time={cluster.time} is not a time: write minutes, HH:MM:SS or DAYS-HH:MM:SS")
    lines = {
        "name": cfg.name,
        "output": cfg.output,
        "cluster.partition": cluster.partition,
        "cluster.account": cluster.account,
    }
    for option, value in lines.items():
        if "\n" in str(value):
            raise UserError(f"{option}={value!r} has a line break, and an option of sbatch is one line: leave it out")
    for option in cluster.sbatch:
        if not option.startswith("--") or "\n" in option:
            raise UserError(
                f"cluster.sbatch has {option!r}: write options of sbatch with their dashes, as --exclude=node7"
            )
    if cluster.activate and cluster.container:
        raise UserError(
            "cluster.activate and cluster.container are both given: a container brings its environment itself"
        )
    if cluster.activate and not Path(cluster.activate).is_file():
        raise UserError(f"cluster.activate={cluster.activate} does not exist: give the activate file of an environment")
    if cfg.submit and not cfg.dry_run and shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch here: submit on a machine of the cluster, or write the script with submit=false"
        )


def rehearse(name: str, words: list[str], processes: int) -> None:
    """The command's own dry run, as one of the job's processes would see it. Raises UserError with what it says."""
    # The device is the job's, not this machine's.
    here = [word for word in words if word.partition("=")[0] not in ("dry_run", "device")]
    program = [*runnable(stage_words("", 1, name)), *here, "dry_run=true"]
    status, reason, *_ = run_program(["env", "-u", "MASTER_ADDR", f"WORLD_SIZE={processes}", *program], 1)
    if status:
        raise UserError(f"{name}: {reason or f'its dry run ended with status {status}'}")


def _hardware_words(config: Any, cluster: ClusterConfig, words: list[str]) -> list[str]:
    """The cluster's hardware, for commands whose dry run says what a job takes on it; what the command itself says goes first."""
    if not hasattr(config, "cluster") or any(word.startswith("cluster") for word in words):
        return []
    values = {f.name: getattr(cluster, f.name) for f in fields(HardwareConfig)}
    return [f"cluster.{name}={value}" for name, value in values.items() if value is not None]


def render(cfg: SubmitConfig, name: str, words: list[str], config: Any) -> str:
    """The job script: everything that a user gave is quoted for the shell that reads it."""
    cluster, folder = cfg.cluster, Path(cfg.output).absolute()
    options = {
        "job-name": cfg.name or name,
        "nodes": cfg.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": cluster.gpus_per_node or None,
        "exclusive": True,
        "time": cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "requeue": True,
        # Only a command with checkpoints gains from being told before the limit.
        "signal": f"B:USR1@{cluster.save_seconds}" if _has_checkpoints(config) else None,
        "output": folder.parent / f"{folder.name}_%j.log",
        "open-mode": "append",
    }
    given = [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items() if value is not None]
    variables = {
        "ROOT": ROOT,
        "OUTPUT": Path(config.output).absolute(),
        "GPUS": processes_per_node(cluster),
        "LOGS": folder.parent / f"{folder.name}_logs",
        "ACTIVATE": _activate(cluster),
        "CONTAINER": cluster.container,
        "MOUNTS": ",".join(cluster.mounts) or None,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("minitron_megatron", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = lambda value: shlex.quote(str(value))
    return environment.get_template(f"{SCRIPT}.jinja").render(
        options=[*given, *cluster.sbatch],
        directory=Path.cwd(),
        variables={key: value for key, value in variables.items() if value is not None},
        setup=cluster.setup,
        scripts=SCRIPTS,
        folders=_folders(config),
        command=name,
        words=words,
    )


def _activate(cluster: ClusterConfig) -> Path | None:
    """What a node sources: the cluster's file or, for an installed package, its environment's; None: what common.sh says."""
    if cluster.activate:
        return Path(cluster.activate).absolute()
    if (ROOT / "launch").is_dir() or cluster.container:
        return None
    own = Path(sys.prefix) / "bin" / "activate"
    return own if own.is_file() else Path(os.devnull)


def _has_checkpoints(config: Any) -> bool:
    return "save_interval" in {f.name for f in fields(getattr(config, "trainer", config))}


def _folders(config: Any) -> list[Path]:
    """What the command reads that is there now, and what earlier jobs will have made: absolute paths for a container's mounts."""
    values = [value for value in flat(resolved_config(config)).values() if isinstance(value, str) and "/" in value]
    return sorted({Path(value).absolute() for value in values if Path(value).exists()})


def _sbatch(script: Path) -> str:
    """Give a script to Slurm; gives the job's number. Raises UserError with what Slurm says."""
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"status {done.returncode}"
        raise UserError(f"sbatch refused {script}: {reason}")
    return done.stdout.strip().partition(";")[0]
