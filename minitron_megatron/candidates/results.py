"""What became of the candidates: a table, their order before and after, what halving saved, and the winner's plan."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from minitron_megatron.candidates import halving
from minitron_megatron.candidates.plan import Candidate, Plan
from minitron_megatron.console import console, format_value, print_table
from minitron_megatron.prune.plan import FILE as PLAN
from minitron_megatron.report import plots
from minitron_megatron.report.page import Section, Table, write_page
from minitron_megatron.stages import write_json, write_whole

RESULTS, REPORT = "results.json", "report.html"
TARGET = "target.yaml"


def summary(plan: Plan, after: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Everything that was found, as it stands in results.json; candidates from the best to the worst.

    Args:
        plan: what was run.
        after: of each candidate, by its rank before, what read_rung gave for every rung that it was trained to.
    """
    reached = {rank: [float(one["validation_loss"]) for one in found] for rank, found in after.items()}
    by_rank = {one.rank: one for one in plan.candidates}
    order = halving.final_order(reached)
    candidates = [
        {
            "place": place,
            "rank": rank,
            **by_rank[rank].ranked.target,
            "parameters": by_rank[rank].parameters,
            "predicted_loss": by_rank[rank].ranked.predicted_loss,
            "steps": plan.rungs[len(reached[rank]) - 1],
            "validation_kl": dict(zip(map(str, plan.rungs), reached[rank], strict=False)),
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
    """Of the predicted loss with the validation KL, after each rung over those that it trained."""
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
    return shlex.join(["python", "launch/prune.py", *words])


def table(plan: Plan, found: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of candidates."""
    columns = ["place", "rank before", "layers × hidden × ffn", "heads/kv", "parameters", "predicted loss"]
    columns += [f"KL, step {step}" for step in plan.rungs]
    rows = [
        [
            one["place"],
            one["rank"],
            f"{one['num_layers']} × {one['hidden_size']} × {one['ffn_hidden_size']}",
            f"{one['num_attention_heads']}/{one['num_query_groups']}",
            one["parameters"],
            f"{one['predicted_loss']:.4f}",
            *(f"{one['validation_kl'][str(s)]:.4f}" if str(s) in one["validation_kl"] else "out" for s in plan.rungs),
        ]
        for one in found["candidates"]
    ]
    return columns, rows


def sentences(plan: Plan, found: Mapping[str, Any]) -> list[str]:
    """What halving saved, and what the prediction was worth."""
    lines = [
        f"{found['steps_run']:,} steps rather than the {found['steps_of_all']:,} of all {len(plan.candidates)} candidates to "
        f"the end: {found['saving']:.0%} less."
    ]
    for step, value in found["rank_correlation_with_prediction"].items():
        if value is not None:
            lines.append(f"Rank correlation of the predicted loss with the KL after step {step}: {value:.2f}.")
    return lines


def write(plan: Plan, found: Mapping[str, Any]) -> None:
    """The winner's target and plan, plots and page, and last results.json."""
    best = found["candidates"][0]
    (winner,) = (one for one in plan.candidates if one.rank == best["rank"])
    kl = best["validation_kl"][str(plan.rungs[-1])]
    head = f"# Best of {len(plan.candidates)} after {plan.rungs[-1]} steps: validation KL {kl:.4f}.\n# {prune_command(plan)}\n"
    write_whole(plan.root / TARGET, head + yaml.safe_dump(winner.ranked.target, sort_keys=False))
    write_whole(plan.root / PLAN, (winner.prune.output / PLAN).read_text(encoding="utf-8"))
    names = {one["rank"]: _shape(one) for one in found["candidates"]}
    before = sorted(names)
    rankings = plots.rankings([names[rank] for rank in before], [names[one["rank"]] for one in found["candidates"]])
    curves = plots.curves_by_name(
        {
            names[one["rank"]]: {int(step): kl for step, kl in one["validation_kl"].items()}
            for one in found["candidates"]
        },
        "validation KL (nats a token)",
    )
    write_whole(plan.root / "rankings.svg", rankings)
    write_whole(plan.root / "kl.svg", curves)
    columns, rows = table(plan, found)
    section = Section(
        "Candidates",
        " ".join(sentences(plan, found)),
        Table(columns, [[format_value(value) for value in row] for row in rows]),
        [("Order before, by predicted loss, and after", rankings), ("Validation KL after each rung", curves)],
        commands=[prune_command(plan)],
    )
    write_page(plan.root / REPORT, "Candidates", f"{found['found']}: which shape learns best", [section])
    write_json(plan.root / RESULTS, found)


def _shape(one: Mapping[str, Any]) -> str:
    heads = f"{one['num_attention_heads']}/{one['num_query_groups']}"
    return f"{one['num_layers']} × {one['hidden_size']} × {one['ffn_hidden_size']}, {heads}"


def show(plan: Plan, found: Mapping[str, Any]) -> None:
    """The table, and how to go on with the winner."""
    print_table(f"{plan.root}: candidates after their distillation", *table(plan, found))
    screen = console()
    for line in sentences(plan, found):
        screen.print(line, highlight=False, soft_wrap=True)
    screen.print(
        f"\nThe best: rank {found['winner']['rank']}, pruned in {found['winner']['pruned']}. To prune to it again:\n"
    )
    screen.print(f"  {prune_command(plan)}\n", highlight=False, markup=False, soft_wrap=True)
    screen.print(f"Written: {plan.root / RESULTS}, {plan.root / REPORT}")
