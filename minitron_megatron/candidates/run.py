"""`launch/distill_candidates.py`: prune every candidate, distill it to the next rung, judge, go on with the best.

    teacher ─▶ cache ─┐
    rank_01 ─▶ prune ─┴▶ distill to rung 1 ─▶ KL ─┐                  ┌─▶ distill to rung 2 ─▶ KL ─┐
    rank_02 ─▶ prune ──▶ distill to rung 1 ─▶ KL ─┼─▶ who goes on? ──┴─▶ distill to rung 2 ─▶ KL ─┴─▶ …  ─▶ the winner
    rank_03 ─▶ prune ──▶ distill to rung 1 ─▶ KL ─┘      out: its checkpoints go

Every stage is a command of its own (stages.py), and a candidate's rung is done when its file is there: a second run goes on with
the first that is not. All candidates have one schedule, that of the whole budget, the same samples in the same order, and the
same validation samples. One that diverges has an infinite loss from there on, and the others go on. As jobs side by side (rung=,
candidate=) each decides anew from the files of the rungs before.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron_megatron.asked import STARTED_IN, as_copied, as_spelt_now
from minitron_megatron.candidates import halving
from minitron_megatron.candidates.plan import Candidate, Plan, make_plan
from minitron_megatron.candidates.results import show, summary, write
from minitron_megatron.candidates.rungs import AGAIN, read_rung, shape_of, write_rung
from minitron_megatron.checkpoints.folder import DIVERGED, METRICS, load_json
from minitron_megatron.cli import spelling
from minitron_megatron.composing import check_root
from minitron_megatron.config import DistillCandidatesConfig
from minitron_megatron.console import console, print_table
from minitron_megatron.errors import UserError
from minitron_megatron.parallel.layout import world_size_from_env
from minitron_megatron.parallel.tools import check_device
from minitron_megatron.plain_files import parse_json
from minitron_megatron.stages import STAGES_FILE, Stages, is_whole, keeping_stages, stage_words, write_json
from minitron_megatron.train.checks import schedule_of
from minitron_megatron.train.saved import find_checkpoints

SETTINGS = "settings.json"
# A dry run says how many candidates a rung has; slurm/halving.sh reads it.
SIZES = "candidates of each rung:"
log = logging.getLogger(__name__)


def check_candidates(cfg: DistillCandidatesConfig) -> Plan:
    """Every stage of every candidate, and the output. Raises UserError."""
    if world_size_from_env() > 1:
        raise UserError("start distill_candidates in one process: processes= and start= say how its stages start")
    plan = make_plan(cfg)
    check_root(plan.root, SETTINGS, "a distillation of candidates", cfg.resume)
    _check_settings(plan)
    _check_part(cfg, plan)
    _warn(plan)
    return plan


def distill_candidates(cfg: DistillCandidatesConfig, plan: Plan | None = None) -> None:
    """Run what is not done, tell the best."""
    plan = plan or check_candidates(cfg)
    check_device(cfg.device)
    if cfg.dry_run:
        _show_plan(cfg, plan)
        return
    with keeping_stages(plan.root):
        _run(cfg, plan)


def _run(cfg: DistillCandidatesConfig, plan: Plan) -> None:
    """The part that is asked for, or all of it."""
    if cfg.rung:
        one = still_in(plan, cfg.rung)[cfg.candidate - 1]
        _drop_losers(cfg, plan, cfg.rung)
        run_rung(cfg, plan, one, cfg.rung)
        if cfg.rung == len(plan.rungs) and all(one.after(cfg.rung).is_file() for one in still_in(plan, cfg.rung)):
            _finish(cfg, plan)
        return
    _prepare(cfg, plan)
    if cfg.rung is None:
        for rung in range(1, len(plan.rungs) + 1):
            _drop_losers(cfg, plan, rung)
            for one in still_in(plan, rung):
                run_rung(cfg, plan, one, rung)
            _show_rung(plan, rung)
        _finish(cfg, plan)


def _check_settings(plan: Plan) -> None:
    """Raise UserError when what is there was asked for otherwise."""
    file = plan.root / SETTINGS
    if not file.is_file():
        return
    before = load_json(file, AGAIN)
    # As they are read again.
    now = json.loads(json.dumps(plan.settings))
    before = as_spelt_now(before, before.pop(STARTED_IN, None), now)
    if all(before.get(name) == digest for name, digest in plan.inputs.items()):
        before = as_copied(before, now)
    differ = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if differ:
        key, *others = differ
        also = f" ({', '.join(others[:3])} too)" if others else ""
        raise UserError(
            f"output={plan.root} has candidates with {key}={before.get(key)}, not {now.get(key)}{also}: give the same, or "
            "another output="
        )


def _check_part(cfg: DistillCandidatesConfig, plan: Plan) -> None:
    """Raise UserError when rung= and candidate= name no part, or what it needs is not there."""
    if cfg.rung is None and cfg.candidate is None:
        return
    if cfg.rung is None or bool(cfg.rung) != (cfg.candidate is not None):
        raise UserError(
            "rung= and candidate= go together: rung=0 alone is the teacher's cache, rung=1 candidate=1 the first"
        )
    if not cfg.rung or cfg.dry_run:
        return
    if cfg.rung > len(plan.rungs):
        raise UserError(f"rung={cfg.rung}: there are {len(plan.rungs)}, at steps {', '.join(map(str, plan.rungs))}")
    if not (plan.root / SETTINGS).is_file() or (plan.cache and not is_whole(plan.cache.output)):
        raise UserError(f"rung={cfg.rung}: the teacher's cache is not there yet: run the same with rung=0 first")
    there = len(still_in(plan, cfg.rung))
    if cfg.candidate > there:
        raise UserError(f"candidate={cfg.candidate}: rung {cfg.rung} has {there} candidates")


def _warn(plan: Plan) -> None:
    warmup = schedule_of(plan.candidates[0].distill.config).warmup
    if len(plan.rungs) > 1 and plan.rungs[0] < warmup:
        log.warning("the first rung, at step %d, is before the end of the warm-up at %d", plan.rungs[0], warmup)


def still_in(plan: Plan, rung: int) -> list[Candidate]:
    """The candidates that a rung trains, best first, by the files of the rungs before.

    Raises UserError where one is missing, or after a rung in which all have diverged.
    """
    by_rank = {one.rank: one for one in plan.candidates}
    ranks = list(by_rank)
    for before in range(1, rung):
        losses = _losses(plan, [by_rank[rank] for rank in ranks], before)
        ranks = halving.survivors(losses, plan.factor)
    return [by_rank[rank] for rank in ranks]


def _losses(plan: Plan, candidates: Sequence[Candidate], rung: int) -> dict[int, float]:
    """Validation loss after a rung, by rank. Raises UserError where one is missing, or all have diverged."""
    found = {one.rank: read_rung(plan, one, rung) for one in candidates}
    if all("diverged" in after for after in found.values()):
        rank, after = next(iter(found.items()))
        raise UserError(
            f"rung {rung}: every candidate has diverged (rank {rank} at {after['diverged']}): lower distill.optim.lr, in another "
            "output="
        )
    return {rank: after["validation_loss"] for rank, after in found.items()}


def _prepare(cfg: DistillCandidatesConfig, plan: Plan) -> None:
    """What all candidates need: the settings, and the teacher's cache."""
    plan.root.mkdir(parents=True, exist_ok=True)
    if not (plan.root / SETTINGS).is_file():
        write_json(plan.root / SETTINGS, {STARTED_IN: os.getcwd(), **plan.settings})
    if plan.cache:
        stage, stages = plan.cache, Stages(plan.root / STAGES_FILE, inputs=plan.inputs, start=cfg.start)
        stages.command("the teacher's cache", stage.output, stage.command, *stage.words, processes=stage.processes)


def run_rung(cfg: DistillCandidatesConfig, plan: Plan, one: Candidate, rung: int) -> None:
    """Prune a candidate unless it is, distill it up to a rung, and write what it is then."""
    step, name = plan.rungs[rung - 1], f"rank {one.rank}, rung {rung}"
    if one.after(rung).is_file():
        read_rung(plan, one, rung)
        console().print(f"{name}: done before ({one.after(rung)})", style="dim")
        return
    one.folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(one.folder / STAGES_FILE, inputs=plan.inputs, start=cfg.start, root=plan.root)
    prune = one.prune
    stages.command(f"rank {one.rank}, prune", prune.output, prune.command, *prune.words, processes=prune.processes)
    shape_of(one)
    last, why, began = rung == len(plan.rungs), one.distill.output / DIVERGED, time.monotonic()
    # Of another try.
    why.unlink(missing_ok=True)
    try:
        stages.command(
            name,
            one.distill.output,
            one.distill.command,
            *plan.words(one, rung),
            processes=one.distill.processes,
            whole=lambda run: _reached(run, step, published=last),
        )
    except UserError:
        if not why.is_file():
            raise
        # What to do then is for a run of its own.
        reason = why.read_text(encoding="utf-8").strip().partition("\n")[0]
        console().print(f"{name}: diverged at {reason}", highlight=False)
        seconds = round(time.monotonic() - began, 1)
        write_rung(plan, one, rung, {"diverged": reason, "seconds": seconds})
        return
    write_rung(plan, one, rung, {**validation_after(one.distill.output, step), "seconds": stages.seconds[name]})


def _reached(run: Path, step: int, *, published: bool) -> bool:
    """Whether a run was validated after a step, and what it was then is saved."""
    if validation_after(run, step) is None:
        return False
    saved = find_checkpoints(run / "checkpoints")
    return is_whole(run) if published else bool(saved) and saved[-1][0] >= step


def validation_after(run: Path, step: int) -> dict[str, Any] | None:
    """What a run's metrics say of its validation after a step; None if nothing."""
    file, found = run / METRICS, None
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            values = parse_json(line)
        except ValueError:
            break  # a killed run's last line
        if values.get("step") == step and "validation_loss" in values:
            found = values
    return found


def _drop_losers(cfg: DistillCandidatesConfig, plan: Plan, rung: int) -> None:
    """Remove the checkpoints of candidates that a rung does not train any more."""
    if cfg.halving.keep_losers:
        return
    _drop_checkpoints(plan, {one.rank for one in still_in(plan, rung)})


def _drop_checkpoints(plan: Plan, keep: set[int]) -> None:
    """Remove those of all candidates but some, by their ranks."""
    for one in plan.candidates:
        if one.rank not in keep:
            shutil.rmtree(one.distill.output / "checkpoints", ignore_errors=True)


def _finish(cfg: DistillCandidatesConfig, plan: Plan) -> None:
    """Results into the output, and onto the screen."""
    after: dict[int, list[dict[str, Any]]] = {one.rank: [] for one in plan.candidates}
    for rung in range(1, len(plan.rungs) + 1):
        for one in still_in(plan, rung):
            after[one.rank].append(read_rung(plan, one, rung))
    # There is a winner where not all have diverged.
    _losses(plan, still_in(plan, len(plan.rungs)), len(plan.rungs))
    found = summary(plan, after)
    write(plan, found)
    if not cfg.halving.keep_losers:
        _drop_checkpoints(plan, {found["winner"]["rank"]})
    show(plan, found)


def _show_rung(plan: Plan, rung: int) -> None:
    losses = _losses(plan, still_in(plan, rung), rung)
    go_on, last = halving.survivors(losses, plan.factor), rung == len(plan.rungs)
    rows = [
        [
            rank,
            losses[rank] if math.isfinite(losses[rank]) else "diverged",
            "" if last else "goes on" if rank in go_on else "out",
        ]
        for rank in halving.survivors(losses, 1)
    ]
    title = f"Rung {rung} of {len(plan.rungs)}, after {plan.rungs[rung - 1]} steps"
    print_table(title, ["rank before", "validation KL", ""], rows)


def _show_plan(cfg: DistillCandidatesConfig, plan: Plan) -> None:
    """The dry run's tables and every command line."""
    rows = [
        [one.rank, " × ".join(map(str, one.ranked.target.values())), one.parameters, one.ranked.predicted_loss]
        for one in plan.candidates
    ]
    columns = ["rank", "layers × hidden × ffn × heads × groups", "parameters", "predicted damage"]
    print_table(f"would be distilled in {plan.root}", columns, rows)
    rungs = [[i, step, size] for i, (step, size) in enumerate(zip(plan.rungs, plan.sizes, strict=True), start=1)]
    print_table("rungs", ["rung", "up to step", "candidates"], rungs)
    saved = 1 - plan.steps_run / plan.steps_of_all
    screen = console()
    screen.print(f"{plan.steps_run:,} steps of {plan.steps_of_all:,}: {saved:.0%} less", highlight=False)
    screen.print(f"{SIZES} {' '.join(map(str, plan.sizes))}", highlight=False)
    stages = [plan.cache] if plan.cache else []
    stages += [stage for one in plan.candidates for stage in (one.prune, one.distill)]
    for stage in stages:
        words = [*stage_words(cfg.start, stage.processes, stage.command), *stage.words, f"output={stage.output}"]
        screen.print(f"$ {spelling.joined(words)}", highlight=False, soft_wrap=True)
