"""What became of the candidates: a table, their order before and after, what halving saved, and the winner's plan."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from minitron_megatron.candidates import halving
from minitron_megatron.candidates.plan import Candidate, Plan
from minitron_megatron.candidates.rungs import shape_of
from minitron_megatron.checkpoints.folder import RESULTS
from minitron_megatron.cli.spelling import line_of
from minitron_megatron.console import console, print_table
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.plain_files import write_whole
from minitron_megatron.plain_text import commented
from minitron_megatron.prune.plan import FILE as PLAN
from minitron_megatron.report.page import write_page
from minitron_megatron.report.trials import Trial, trial_plots, trial_section, trial_sentences, trial_table
from minitron_megatron.search.space import SIZES
from minitron_megatron.stages import write_json

REPORT = "report.html"
TARGET = "target.yaml"


def sizes_of(shape: ModelShape) -> dict[str, int]:
    """A shape as options of `target`."""
    return {name: getattr(shape, name) for name in SIZES}


def summary(plan: Plan, after: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Everything that was found, as it stands in results.json; candidates from the best to the worst.

    Args:
        plan: what was run.
        after: of each candidate, by its rank before, what read_rung gave for every rung that it was trained to.
    """
    reached = {rank: [float(one["validation_loss"]) for one in found] for rank, found in after.items()}
    by_rank = {one.rank: one for one in plan.candidates}
    order = halving.final_order(reached)
    shapes = {rank: shape_of(one) for rank, one in by_rank.items()}
    candidates = [
        {
            "place": place,
            "rank": rank,
            **sizes_of(shapes[rank]),
            "parameters": count_parameters(shapes[rank]),
            "predicted_loss": by_rank[rank].ranked.predicted_loss,
            "steps": plan.rungs[len(reached[rank]) - 1],
            # None where it had diverged.
            "validation_kl": {
                str(step): loss if math.isfinite(loss) else None
                for step, loss in zip(plan.rungs, reached[rank], strict=False)
            },
            "diverged": after[rank][-1].get("diverged"),
            "validation_perplexity": after[rank][-1].get("validation_perplexity"),
            "seconds": round(sum(one.get("seconds", 0.0) for one in after[rank]), 1),
        }
        for place, rank in enumerate(order, start=1)
    ]
    winner = by_rank[order[0]]
    return {
        "model": plan.searched.source.model,
        "found": str(plan.searched.path),
        "rungs": plan.rungs,
        "sizes": plan.sizes,
        "factor": plan.factor,
        "steps_run": plan.steps_run,
        "steps_of_all": plan.steps_of_all,
        "saving": 1 - plan.steps_run / plan.steps_of_all,
        "rank_correlation_with_prediction": _correlations(plan, reached, by_rank),
        "winner": {
            "rank": winner.rank,
            "pruned": str(winner.prune.output),
            "distilled": str(winner.distill.output / "model"),
        },
        "candidates": candidates,
    }


def _correlations(
    plan: Plan, reached: Mapping[int, Sequence[float]], by_rank: Mapping[int, Candidate]
) -> dict[str, float | None]:
    """Of the predicted damage with the validation KL, after each rung over those that it trained."""
    found = {}
    for rung, step in enumerate(plan.rungs):
        ranks = [rank for rank, losses in reached.items() if len(losses) > rung]
        predicted = [by_rank[rank].ranked.predicted_loss for rank in ranks]
        found[str(step)] = halving.rank_correlation(predicted, [reached[rank][rung] for rank in ranks])
    return found


def prune_command(plan: Plan) -> str:
    """The command that prunes to the winner again, from its plan alone."""
    root = str(plan.root).rstrip("/")
    words = [f"model={plan.searched.source.model}", f"plan={root}/{PLAN}", f"output={root}_winner"]
    return line_of("prune", words)


def write(plan: Plan, found: Mapping[str, Any]) -> None:
    """The winner's target and plan, plots and page, and last results.json."""
    best = found["candidates"][0]
    (winner,) = (one for one in plan.candidates if one.rank == best["rank"])
    kl = best["validation_kl"][str(plan.rungs[-1])]
    what = f"Best of {len(plan.candidates)} after {plan.rungs[-1]} steps: validation KL {kl:.4f}."
    head = commented(what, prune_command(plan))
    write_whole(plan.root / TARGET, head + yaml.safe_dump(sizes_of(shape_of(winner)), sort_keys=False))
    write_whole(plan.root / PLAN, (winner.prune.output / PLAN).read_text(encoding="utf-8"))
    for name, drawn in trial_plots(found).items():
        write_whole(plan.root / f"{name}.svg", drawn)
    section = replace(trial_section(Trial(plan.root, dict(found))), commands=[prune_command(plan)])
    write_page(plan.root / REPORT, "Candidates", f"{found['found']}: which shape learns best", [section])
    write_json(plan.root / RESULTS, found)


def show(plan: Plan, found: Mapping[str, Any]) -> None:
    """The table, and how to go on with the winner."""
    table = trial_table(found)
    print_table(f"{plan.root}: candidates after their distillation", table.columns, table.rows)
    screen = console()
    for line in trial_sentences(found):
        screen.print(line, highlight=False, soft_wrap=True)
    screen.print(
        f"\nThe best: rank {found['winner']['rank']}, pruned in {found['winner']['pruned']}. To prune to it again:\n"
    )
    screen.print(f"  {prune_command(plan)}\n", highlight=False, soft_wrap=True)
    screen.print(f"Written: {plan.root / RESULTS}, {plan.root / REPORT}")
