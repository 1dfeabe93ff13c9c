"""A trial of candidates with programs that are pretended: which run in which order, who goes on, what is kept and told."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from minitron_megatron import stages
from minitron_megatron.candidates import run as running
from minitron_megatron.candidates.plan import Candidate, Plan, _chosen, _given_steps, _options, _own_options
from minitron_megatron.candidates.results import REPORT, TARGET, prune_command, sizes_of, summary
from minitron_megatron.checkpoints.folder import SHAPE_FILE, WEIGHTS, output_folder
from minitron_megatron.cli import spelling
from minitron_megatron.composing import Stage
from minitron_megatron.config import DistillCandidatesConfig, HalvingConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters
from tests.test_bounds import SMALL_SHAPE

# Validation KL of each candidate after each of its rungs: what the prediction had first is not what learns best.
KL = {1: {4: 0.5, 8: 0.25}, 3: {4: 0.25, 8: 0.5}, 7: {4: 0.75}}
SHAPES = {rank: SMALL_SHAPE.resized(num_layers=5 - place) for place, rank in enumerate(KL, start=1)}


class Pretended:
    """Stands for every program of a trial: makes what each would make, and keeps what was run."""

    def __init__(self, kl: dict[int, dict[int, float]] = KL) -> None:
        self.kl, self.ran, self.checkpoints = kl, [], []

    def __call__(self, program: list[str], processes: int) -> stages.Ended:
        stems = [Path(word).stem for word in program]
        (at,) = (i for i, stem in enumerate(stems) if stem in ("cache_teacher", "prune", "distill"))
        given = dict(word.split("=", 1) for word in program[at + 1 :])
        output = Path(given["output"])
        root = next(path for path in (output, *output.parents) if (path / "settings.json").is_file())
        self.checkpoints.append(sorted(one.parts[-3] for one in root.glob("candidates/*/distilled/checkpoints")))
        name, rank = stems[at], int(output.parent.name.partition("_")[2] or 0)
        self.ran.append((name, rank, given.get("trainer.stop_after"), processes))
        if name == "distill":
            return self.distill(output, rank, int(given.get("trainer.stop_after", 8)))
        files = {"x": name}
        if rank:
            files = {
                SHAPE_FILE: yaml.safe_dump(SHAPES[rank].to_dict()),
                f"{WEIGHTS}/.metadata": "",
                "plan.yaml": f"# {rank}\n",
            }
        made(output, files)
        return stages.Ended(0, "")

    def distill(self, output: Path, rank: int, step: int) -> stages.Ended:
        (output / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        loss = self.kl[rank][step]
        if math.isinf(loss):
            (output / "diverged.txt").write_text(f"step {step}: too much\nmore\n")
            return stages.Ended(2, "it has diverged")
        with open(output / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "validation_loss": loss, "validation_perplexity": 9.0}) + "\n")
        if step == 8:
            made(output / "model", {"x": str(rank)})
        return stages.Ended(0, "")


def made(path: Path, files: dict[str, str]) -> None:
    with output_folder(path, command="x", config={}, inputs={}, resume=True) as out:
        for name, text in files.items():
            (out.path / name).parent.mkdir(exist_ok=True)
            (out.path / name).write_text(text)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A plan of three candidates and two rungs."""
    monkeypatch.setattr(spelling, "TYPED", ["launch/distill_candidates.py"])
    monkeypatch.setenv("COLUMNS", "300")
    root = tmp_path / "out"
    candidates = []
    for place, rank in enumerate(KL, start=1):
        folder = root / "candidates" / f"rank_{rank:02d}"
        ranked = SimpleNamespace(rank=rank, predicted_loss=place / 10, target=sizes_of(SHAPES[rank]))
        prune = Stage("prune", (f"a={rank}",), folder / "pruned", 1, None)
        distill = Stage("distill", ("b=1",), folder / "distilled", 2, None)
        candidates.append(Candidate(ranked, SHAPES[rank], folder, prune, distill))
    searched = SimpleNamespace(path=Path("found"), source=SimpleNamespace(model="the model"))
    cache = Stage("cache_teacher", ("c=1",), root / "cache", 3, None)
    return Plan(root, searched, candidates, cache, [4, 8], 2, {"seed": 1, "none": None}, {"model": "m"})


def config(**options) -> DistillCandidatesConfig:
    return DistillCandidatesConfig(output="x", found="x", device="cpu", **options)


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(stages, "run_program", programs := Pretended())
    return programs


FIRST = [(name, rank, *more) for rank in KL for name, *more in (("prune", None, 1), ("distill", "4", 2))]
SECOND = [("distill", rank, None, 2) for rank in (3, 1)]


def test_the_best_of_each_rung_go_on_and_the_others_lose_their_checkpoints(plan, pretended, capsys):
    running.distill_candidates(config(), plan)
    assert pretended.ran == [("cache_teacher", 0, None, 3), *FIRST, *SECOND]
    # Before the second rung, and at its end.
    assert pretended.checkpoints[-2:] == [["rank_01", "rank_03"]] * 2 and pretended.checkpoints[-3] == [
        "rank_01",
        "rank_03",
    ]
    assert [one.parts[-3] for one in plan.root.glob("candidates/*/distilled/checkpoints")] == ["rank_01"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "Rung 1 of 2, after 4 steps" in printed and "Rung 2 of 2, after 8 steps" in printed
    for row in ("3 │ 0.25 │ goes on", "1 │ 0.5 │ goes on", "7 │ 0.75 │ out"):
        assert row in printed
    assert printed.index("3 │ 0.25") < printed.index("1 │ 0.5") < printed.index("7 │ 0.75")
    assert "1 │ 0.25 │ │" in printed and "3 │ 0.5 │ │" in printed and printed.count("goes on") == 2
    assert f"The best: rank 1, pruned in {plan.root}/candidates/rank_01/pruned. To prune to it again:" in printed
    for line in (
        "20 steps rather than the 24 of all 3 candidates to the end: 17% less.",
        f"{plan.root}: candidates after",
    ):
        assert line in printed
    assert prune_command(plan) in printed and f"Written: {plan.root}/results.json, {plan.root}/report.html" in printed


def test_what_came_of_a_trial_is_kept_whole(plan, pretended):
    running.distill_candidates(config(), plan)
    found = json.loads((plan.root / "results.json").read_text())
    rows = [one | {"seconds": None} for one in found.pop("candidates")]
    places = {1: ({"4": 0.5, "8": 0.25}, 8), 3: ({"4": 0.25, "8": 0.5}, 8), 7: ({"4": 0.75}, 4)}
    assert rows == [
        {
            "place": place,
            "rank": rank,
            **sizes_of(SHAPES[rank]),
            "parameters": count_parameters(SHAPES[rank]),
            "predicted_loss": place / 10,
            "steps": steps,
            "validation_kl": kl,
            "diverged": None,
            "validation_perplexity": 9.0,
            "seconds": None,
        }
        for place, (rank, (kl, steps)) in enumerate(places.items(), start=1)
    ]
    assert found == {
        "model": "the model",
        "found": "found",
        "rungs": [4, 8],
        "sizes": [3, 2],
        "factor": 2,
        "steps_run": 20,
        "steps_of_all": 24,
        "saving": pytest.approx(1 / 6),
        "rank_correlation_with_prediction": {"4": pytest.approx(0.5), "8": None},
        "winner": {
            "rank": 1,
            "pruned": f"{plan.root}/candidates/rank_01/pruned",
            "distilled": f"{plan.root}/candidates/rank_01/distilled/model",
        },
    }
    head, target = (plan.root / TARGET).read_text().split("\n", 1)
    assert head == "# Best of 3 after 8 steps: validation KL 0.2500." and yaml.safe_load(target) == sizes_of(SHAPES[1])
    assert (
        list(yaml.safe_load(target)) == list(sizes_of(SHAPES[1])) and (plan.root / "plan.yaml").read_text() == "# 1\n"
    )
    words = f"'model=the model' plan={plan.root}/plan.yaml output={plan.root}_winner"
    assert prune_command(plan).endswith(f"launch/prune.py {words}")
    assert f"# {prune_command(plan)}\n" in target
    page = (plan.root / REPORT).read_text()
    assert "<h1>Candidates</h1>" in page and "found: which shape learns best" in page and page.count("<svg") == 2
    assert "<pre>" in page and all(
        (plan.root / f"{name}.svg").read_text().startswith("<svg") for name in ("rankings", "kl")
    )


def test_a_trial_that_is_done_runs_nothing_and_keeps_what_it_was_asked_for(plan, pretended, monkeypatch, capsys):
    monkeypatch.setattr(running.os, "getcwd", lambda: "/there")
    running.distill_candidates(config(), plan)
    assert json.loads((plan.root / "settings.json").read_text()) == {"started_in": "/there", "seed": 1, "none": None}
    found = (plan.root / "results.json").read_text()
    del pretended.ran[:]
    capsys.readouterr()
    monkeypatch.setattr(running.os, "getcwd", lambda: "/elsewhere")
    running.distill_candidates(config(), plan)
    assert pretended.ran == [] and (plan.root / "results.json").read_text() == found
    assert "/there" in (plan.root / "settings.json").read_text()
    assert capsys.readouterr().out.count("done before") == 1 + 5
    running._check_settings(plan)
    for other, says in (
        ({"seed": 2}, r"has candidates with seed=1, not 2: give the same"),
        ({"seed": 2, "more": 3}, r"with seed=1, not 2 \(more too\)"),
        ({"seed": 1, "none": None, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, r"a=None, not 1 \(b, c, d too\)"),
    ):
        with pytest.raises(UserError, match=says):
            running._check_settings(replace(plan, settings=other))


def test_losers_keep_their_checkpoints_where_that_is_asked(plan, pretended):
    running.distill_candidates(config(halving=HalvingConfig(keep_losers=True)), plan)
    assert len(list(plan.root.glob("candidates/*/distilled/checkpoints"))) == 3


def test_parts_of_a_trial_are_run_side_by_side(plan, pretended):
    """Rung 0 is the cache alone; the last part of all tells the best."""
    with pytest.raises(UserError, match="rung=1: the teacher's cache is not there yet: run the same with rung=0 first"):
        running._check_part(config(rung=1, candidate=1), plan)
    running.distill_candidates(config(rung=0), plan)
    assert pretended.ran == [("cache_teacher", 0, None, 3)]
    running._check_part(config(rung=1, candidate=3), plan)
    for candidate in (3, 1, 2):
        running.distill_candidates(config(rung=1, candidate=candidate), plan)
    assert [rank for name, rank, *_ in pretended.ran if name == "distill"] == [7, 1, 3]
    running._check_part(config(rung=2, candidate=2), plan)
    for part, says in (
        ({"rung": 2, "candidate": 3}, "candidate=3: rung 2 has 2 candidates"),
        ({"rung": 3, "candidate": 1}, "rung=3: there are 2, at steps 4, 8"),
        ({"rung": 1}, "rung= and candidate= go together"),
        ({"candidate": 1}, "rung= and candidate= go together"),
        ({"rung": 0, "candidate": 1}, "rung= and candidate= go together"),
    ):
        with pytest.raises(UserError, match=says):
            running._check_part(config(**part), plan)
    running.distill_candidates(config(rung=2, candidate=2), plan)
    assert pretended.ran[-1][1] == 1 and not (plan.root / "results.json").exists()
    assert "rank_07" not in {one.parts[-3] for one in plan.root.glob("candidates/*/distilled/checkpoints")}
    running.distill_candidates(config(rung=2, candidate=1), plan)
    assert pretended.ran[-1][1] == 3 and json.loads((plan.root / "results.json").read_text())["winner"]["rank"] == 1


def test_a_plan_with_its_cache_elsewhere_needs_no_rung_0(plan, pretended):
    plan = replace(plan, cache=None)
    running.distill_candidates(config(rung=0), plan)
    running._check_part(config(rung=1, candidate=1), plan)
    assert pretended.ran == [] and (plan.root / "settings.json").is_file()
    # A dry run looks at no files.
    running._check_part(config(rung=9, candidate=9, dry_run=True), plan)


def test_who_diverges_is_last_and_the_others_go_on(plan, monkeypatch, capsys):
    kl = {1: {4: 0.5, 8: 0.25}, 3: {4: math.inf}, 7: {4: 0.75, 8: 0.5}}
    monkeypatch.setattr(stages, "run_program", pretended := Pretended(kl))
    running.distill_candidates(config(), plan)
    assert [rank for name, rank, stop, _ in pretended.ran if name == "distill" and stop is None] == [1, 7]
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "rank 3, rung 1: diverged at step 4: too much" in printed
        and "more" not in printed.partition("diverged at")[2][:30]
    )
    assert "3 │ diverged │ out" in printed
    found = {one["rank"]: one for one in json.loads((plan.root / "results.json").read_text())["candidates"]}
    assert (
        found[3]["validation_kl"] == {"4": None}
        and found[3]["diverged"] == "step 4: too much"
        and found[3]["place"] == 3
    )
    # Not where the program ended for something else.
    (plan.candidates[1].after(1)).unlink()
    monkeypatch.setattr(stages, "run_program", lambda *_: stages.Ended(2, "a mistake"))
    with pytest.raises(UserError, match="rank 3, rung 1: a mistake"):
        running.run_rung(config(), plan, plan.candidates[1], 1)


def test_where_all_diverge_nobody_has_won(plan, monkeypatch):
    kl = {rank: {4: 0.5, 8: math.inf} for rank in KL}
    monkeypatch.setattr(stages, "run_program", Pretended(kl))
    with pytest.raises(UserError, match=r"rung 2: every candidate has diverged \(rank 1 at step 8: too much\): lower"):
        running.distill_candidates(config(), plan)
    assert not (plan.root / "results.json").exists()


@pytest.mark.parametrize(("rungs", "warmup", "said"), [([4, 8], 5, 1), ([4, 8], 4, 0), ([8], 9, 0)])
def test_a_first_rung_within_the_warm_up_is_said(plan, monkeypatch, caplog, rungs, warmup, said):
    monkeypatch.setattr(running, "schedule_of", lambda _: SimpleNamespace(warmup=warmup))
    running._warn(replace(plan, rungs=rungs))
    assert len(caplog.records) == said
    assert not said or "the first rung, at step 4, is before the end of the warm-up at 5" in caplog.text


def test_seconds_and_the_last_words_of_every_rung_count(plan):
    after = {
        1: [
            {"validation_loss": 0.5, "seconds": 2.04},
            {"validation_loss": 0.25, "seconds": 3.0, "validation_perplexity": 2.0},
        ],
        3: [{"validation_loss": 0.4}, {"validation_loss": math.inf, "diverged": "step 6"}],
        7: [{"validation_loss": 0.75, "validation_perplexity": 4.0}],
    }
    found = {one["rank"]: one for one in summary(plan, after)["candidates"]}
    assert [found[rank]["seconds"] for rank in KL] == [5.0, 0.0, 0.0]
    assert [found[rank]["validation_perplexity"] for rank in KL] == [2.0, None, 4.0]
    assert [found[rank]["diverged"] for rank in KL] == [None, "step 6", None]


# What is asked for

SEARCHED = SimpleNamespace(
    path="found", ranked=[SimpleNamespace(rank=n) for n in (1, 2, 3)], source=SimpleNamespace(model="m")
)


@pytest.mark.parametrize(
    ("ranks", "found"),
    [
        (None, [1, 2, 3]), ([3, 1], [1, 3]), ([1, 2], [1, 2]), (2, "two different ranks or more"), ([2], "two different"),
        ([1, 1], "two different"), ([1, 2, 2], "two different"), ([0, 1], "ranks 1 to 3, not 0"), ([3, 4], "not 4"),
        ([True, 2], "not True"), (["1", 2], "not '1'"), ([], "two different"),
    ],
)  # fmt: skip
def test_ranks_are_those_of_the_search_two_at_least(ranks, found):
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            _chosen(SEARCHED, ranks)
    else:
        assert [one.rank for one in _chosen(SEARCHED, ranks)] == found


@pytest.mark.parametrize(("given", "steps"), [(None, None), ([3, 5], [3, 5]), (3, [3]), ([], [])])
def test_rungs_may_be_one_number(given, steps):
    assert _given_steps(config(halving=HalvingConfig(steps=given))) == steps


@pytest.mark.parametrize(
    ("cache", "given", "own", "teacher"),
    [
        (True, {}, {"distill.loss": "topk_kl", "distill.cache": "x/cache"}, "m"),
        (True, {"teacher": "t"}, {"distill.loss": "topk_kl", "distill.cache": "x/cache"}, "t"),
        ("c", {}, {"distill.loss": "topk_kl", "distill.cache": "c"}, None),
        ("c", {"teacher": "t"}, {"distill.loss": "topk_kl", "distill.cache": "c", "teacher": "t"}, "t"),
        (False, {}, {"teacher": "m"}, "m"),
        (False, {"teacher": "t", "distill.loss": "jsd"}, {"teacher": "t", "distill.loss": "jsd"}, "t"),
    ],
)
def test_who_teaches_candidates_and_from_where(cache, given, own, teacher):
    found = _own_options(config(cache=cache, distill=given), SEARCHED)
    assert found == ({"trainer.keep_last": 1, **own}, teacher)
    kept = {**given, "trainer.keep_last": 3}
    assert _own_options(config(cache=cache, distill=kept), SEARCHED)[0]["trainer.keep_last"] == 3


@pytest.mark.parametrize(
    ("stage", "option", "taken"),
    [
        ("prune", "model", False), ("prune", "target.num_layers", False), ("prune", "drop_layers", False),
        ("prune", "plan", False), ("prune", "processes", True), ("prune", "seed", True), ("prune", "layers", False),
        ("distill", "student", False), ("distill", "student.path", False), ("distill", "trainer.stop_after", False),
        ("distill", "distill.cache", False), ("distill", "teacher", True), ("distill", "optim.lr", True),
        ("distill", "distill.top_k", True), ("distill", "trainer.steps", True), ("distill", "output", False),
        ("cache_teacher", "data.path", False), ("cache_teacher", "distill.top_k", False), ("cache_teacher", "seed", False),
        ("cache_teacher", "trainer.micro_batch_size", True), ("cache_teacher", "trainer.global_batch_size", False),
        ("cache_teacher", "chunk_samples", True), ("cache_teacher", "resume", False), ("cache_teacher", "dry_run", False),
    ],
)  # fmt: skip
def test_what_a_trial_sets_itself_is_not_the_users(stage, option, taken):
    given = config(**{stage: {option: 1}})
    if taken:
        assert _options(given, stage) == {option: 1}
    else:
        with pytest.raises(UserError, match=f"{stage}: {option} is set by the candidates and their distillation"):
            _options(given, stage)
