"""Candidates of a search: halving keeps the best of synthetic sets, runs that stop and go on, and mistakes refused at once."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import initialize_config_dir
from scipy.stats import spearmanr

from minitron_megatron import stages
from minitron_megatron.candidates import halving, rungs
from minitron_megatron.candidates import run as running
from minitron_megatron.candidates.plan import make_plan
from minitron_megatron.candidates.results import summary
from minitron_megatron.candidates.run import distill_candidates
from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.compress_rounds import _compose_searched
from minitron_megatron.distill.cache_teacher import cache_teacher
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import CONF, compose
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.prune.prune import prune_model
from minitron_megatron.search.search import search_shapes
from minitron_megatron.search.space import SIZES
from tests.pool import WorkerError
from tests.test_prune import random_scores, write_scores
from tests.test_train import exit_code, untimed
from tests.tiny import data_folder, hf_model, imported


def halve(curves: dict[int, np.ndarray], factor: int, rungs: list[int]) -> tuple[list[int], int]:
    """Ranks from best to worst, and the steps that were taken; curves are losses by step, from 1."""
    still, reached, taken = sorted(curves), {rank: [] for rank in curves}, 0
    for before, step in zip([0, *rungs], rungs, strict=False):
        for rank in still:
            reached[rank].append(float(curves[rank][step - 1]))
            taken += step - before
        still = halving.survivors({rank: reached[rank][-1] for rank in still}, factor)
    return halving.final_order(reached), taken


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [2, 3, 6, 16, 27])
def test_halving_keeps_the_true_best_where_curves_do_not_cross_after_the_first_rung(count, factor):
    draw, steps = np.random.default_rng(count * 10 + factor), 64
    rungs = halving.rungs(count, factor, steps)
    at = np.arange(1, steps + 1)
    ends = draw.permutation(count) + 1.0
    # Until the first rung anything; from there on every curve falls, in the order in which they end.
    curves = {
        rank: np.where(at < rungs[0], draw.random(steps) * 99, ends[rank - 1] * (1 + np.exp(-at / 16)))
        for rank in range(1, count + 1)
    }
    order, taken = halve(curves, factor, rungs)
    sizes = halving.sizes(count, factor, len(rungs))
    assert order[0] == 1 + int(ends.argmin())
    assert taken == halving.steps_run(sizes, rungs) and rungs[-1] == steps and sizes[-1] >= min(count, 2)
    assert (taken < count * steps) == (len(rungs) > 1) == (1 < factor < count)
    if len(rungs) > 1:
        assert halving.kept(sizes[-1], factor) == 1
        # What can happen, and the reason for a first rung that is late enough.
        curves[order[0]][rungs[0] - 1] = 1e3
        assert halve(curves, factor, rungs)[0][0] != order[0]


def test_the_arithmetic_of_rungs():
    assert halving.rungs(6, 2, 40) == [10, 20, 40] and halving.sizes(6, 2, 3) == [6, 3, 2]
    assert halving.steps_run([6, 3, 2], [10, 20, 40]) == 130
    assert halving.rungs(6, 2, 40, [5, 40]) == [5, 40] and halving.rungs(6, 2, 40, []) == [40]
    assert halving.rungs(9, 3, 2) == [1, 2]
    for wrong in ([0], [20, 10], [10, 10], [41], [1.5], ["ten"], [True]):
        with pytest.raises(UserError, match="must be whole numbers that rise from 1 to the 40 steps"):
            halving.rungs(6, 2, 40, wrong)


def test_equal_losses_go_by_rank_and_what_is_no_number_is_worst():
    assert halving.survivors({3: 1.0, 2: math.nan, 1: 1.0, 4: 0.5}, 2) == [4, 1]
    assert halving.survivors({1: math.nan, 2: math.inf, 3: 9.0}, 1) == [3, 1, 2]
    assert halving.final_order({1: [0.1], 2: [2.0, 1.0], 3: [2.0, 0.9], 4: [0.05]}) == [3, 2, 4, 1]


def test_rank_correlation_is_spearmans():
    draw = np.random.default_rng(0)
    for _ in range(5):
        one, other = draw.integers(0, 5, (2, 9)).astype(float)
        assert halving.rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert halving.rank_correlation([1, 2], [1, 2]) is None and halving.rank_correlation([1, 1, 1], [1, 2, 3]) is None


@pytest.fixture(scope="module")
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory, hydra):
    """(shapes that were found, data)."""
    folder = tmp_path_factory.mktemp("candidates")
    model = imported(hf_model(), folder)
    scores = write_scores(random_scores(model), folder / "scores")
    budget = ["budget.parameters=50000", "budget.at_least=0.5", "space={multiple: 4, tensor: 1}", "keep=20"]
    search_shapes(compose("search", [f"model={model}", f"scores={scores}", *budget, f"output={folder / 'found'}"]))
    return folder / "found", data_folder(folder, model)


def words(folders, output: Path, *more: str) -> list[str]:
    found, data = folders
    distill = "steps: 8, global_batch_size: 4, validation_samples: 4, save_interval: 1"
    own = {
        "found": found,
        "ranks": "[1,10,20]",
        "data.path": data,
        "data.sequence_length": 32,
        "distill": f"{{trainer: {{{distill}}}, optim: {{lr: 1e-2, warmup_steps: 2}}, logger: {{wandb: disabled}}}}",
        "distill.distill.top_k": 50,
        "output": output,
    }
    return [f"{key}={value}" for key, value in (own | dict(word.split("=", 1) for word in more)).items()]


def start(given: list[str]) -> None:
    distill_candidates(compose("distill_candidates", given))


class Here:
    """Stands for starting processes: each stage runs in a warm worker; `at(number, config)` may stop it."""

    def __init__(self, gloo, at=lambda number, config: None) -> None:
        self.gloo, self.at, self.ran = gloo, at, []

    def __call__(self, program: list[str], processes: int) -> tuple[int, str]:
        # Python, then launch/NAME.py or -m minitron_megatron NAME.
        name, *given = program[3:] if program[1] == "-m" else program[1:]
        name = Path(name).stem
        config = compose(name, given)
        self.at(len(self.ran), config)
        stop = f" {config.trainer.stop_after}" if name == "distill" else ""
        self.ran.append(f"{name} {Path(config.output).parent.name}{stop}")
        run = {"cache_teacher": cache_teacher, "prune": prune_model, "distill": exit_code}[name]
        (ended,) = self.gloo(1, run, config)
        return ended or 0, ""


def killed(number: int):
    def at(ran: int, _) -> None:
        if ran == number:
            raise KeyboardInterrupt

    return at


@pytest.mark.slow
def test_a_killed_run_goes_on_as_parts_side_by_side(gloo, folders, tmp_path, monkeypatch):
    """One command, stopped in the middle; what is left is done as the tasks of job arrays do it, each beginning from files."""
    output = tmp_path / "out"
    given = words(folders, output)

    def part(*which: str) -> None:
        start([*given, *which])

    monkeypatch.setattr(stages, "run_program", first := Here(gloo, killed(5)))
    with pytest.raises(KeyboardInterrupt):
        part()
    assert first.ran == [
        "cache_teacher out", "prune rank_01", "distill rank_01 4", "prune rank_10", "distill rank_10 4",
    ]  # fmt: skip
    monkeypatch.setattr(stages, "run_program", second := Here(gloo))
    with pytest.raises(UserError, match="is not there: rung 1 of rank 20 was not run to its end"):
        part("rung=2", "candidate=1")
    part("rung=1", "candidate=3")
    part("rung=2", "candidate=2")
    with pytest.raises(UserError, match="candidate=3: rung 2 has 2 candidates"):
        part("rung=2", "candidate=3")
    assert not (output / "results.json").exists()
    part("rung=2", "candidate=1")
    found = json.loads((output / "results.json").read_text())
    losses = {one["rank"]: one["validation_kl"] for one in found["candidates"]}
    by_loss = sorted(losses, key=lambda rank: losses[rank]["4"])
    best, other, out = by_loss
    assert second.ran == ["prune rank_20", "distill rank_20 4", *(f"distill rank_{r:02d} None" for r in (other, best))]
    assert [one["rank"] for one in found["candidates"]] == [
        *sorted((best, other), key=lambda rank: losses[rank]["8"]), out,
    ]  # fmt: skip
    assert (found["steps_run"], found["steps_of_all"], found["saving"]) == (20, 24, pytest.approx(1 / 6))

    # Judged at a rung or not, training is the same: the winner's run beside one without a stop.
    winner = found["winner"]["rank"]
    whole = compose(
        "distill",
        [*_stage_words(output, winner), f"student={found['winner']['pruned']}", f"output={tmp_path / 'whole'}"],
    )
    assert gloo(1, exit_code, whole) == [None]
    run = output / f"candidates/rank_{winner:02d}/distilled"
    steps, judged = ([line for line in untimed(run) if ("loss" in line) is kind] for kind in (True, False))
    assert steps == [line for line in untimed(tmp_path / "whole") if "loss" in line]
    assert [line["validation_loss"] for line in judged] == [losses[winner]["4"], losses[winner]["8"]]

    # The losers' checkpoints are gone; the winner's plan prunes to it again.
    there = {one.parent.parent.name for one in output.glob("candidates/*/distilled/checkpoints")}
    assert there == {f"rank_{winner:02d}"}
    plan = [f"model={found['model']}", f"plan={output / 'plan.yaml'}", f"output={tmp_path / 'again'}"]
    gloo(1, prune_model, compose("prune", plan))
    assert open_model_folder(tmp_path / "again").digest == open_model_folder(found["winner"]["pruned"]).digest
    assert "<svg" in (output / "report.html").read_text() and (output / "rankings.svg").is_file()

    # Done: nothing runs; asked for otherwise: refused.
    monkeypatch.setattr(stages, "run_program", third := Here(gloo))
    part()
    assert json.loads((output / "results.json").read_text()) == found and third.ran == []
    for other, says in (
        ("halving.factor=1", "has candidates with rungs=[4, 8], not [8] (factor too)"),
        ("distill.optim.lr=1e-3", "has candidates with distill.optim.lr=0.01, not 0.001"),
        ("resume=false", "has a distillation of candidates in it and resume=false"),
    ):
        with pytest.raises(UserError) as error:
            part(other)
        assert says in str(error.value)


class OneDiverges(Here):
    """Rank 10 learns at a rate at which nothing does."""

    def __call__(self, program: list[str], processes: int) -> tuple[int, str]:
        try:
            return super().__call__(program, processes)
        except WorkerError as error:
            assert "a row that cannot be taken" in str(error)
            return 2, "it has diverged"


@pytest.mark.slow
def test_candidates_that_diverge_are_out_and_the_others_go_on(gloo, folders, tmp_path, monkeypatch):
    """Also where so few are left that it goes on: it is tried again, and is never the winner. Where all do, it is told."""

    def spoil(wrong: tuple[str, ...]):
        def at(ran: int, config) -> None:
            if any(f"/{rank}/distilled" in str(config.output) for rank in wrong):
                config.optim.lr = 1e30

        return at

    output = tmp_path / "out"
    given = words(folders, output, "distill.guard.stop_after=2", "distill.optim.warmup_steps=0", "halving.factor=2")
    monkeypatch.setattr(stages, "run_program", OneDiverges(gloo, spoil(("rank_01", "rank_10"))))
    start(given)
    found = json.loads((output / "results.json").read_text())
    first, second, third = found["candidates"]
    assert found["winner"]["rank"] == first["rank"] == 20 and first["diverged"] is None
    assert {second["rank"], third["rank"]} == {1, 10}
    assert second["validation_kl"] == {"4": None, "8": None} and third["validation_kl"] == {"4": None}
    assert all("that cannot be taken" in one["diverged"] for one in (second, third))
    assert "diverged" in (output / "report.html").read_text()

    monkeypatch.setattr(stages, "run_program", OneDiverges(gloo, spoil(("rank_01", "rank_10", "rank_20"))))
    with pytest.raises(
        UserError, match=r"rung 1: every candidate has diverged \(rank 1 at step \d+: .*lower distill.optim.lr"
    ):
        start([*(word for word in given if not word.startswith("output=")), f"output={tmp_path / 'none'}"])


def _stage_words(output: Path, rank: int) -> list[str]:
    """The options that a candidate's distillation was given, but for models and places."""
    done = json.loads((output / f"candidates/rank_{rank:02d}/stages.json").read_text())
    given = done[f"rank {rank}, rung 2"]["what"]["command"][1:]
    return [word.replace(stages.HERE, str(output)) for word in given if not word.startswith(("student=", "output="))]


def pruned_here(plan, monkeypatch) -> None:
    """Every candidate pruned as a run would, which is killed as soon as it distills."""

    def run_program(program: list[str], processes: int) -> tuple[int, str]:
        name, *given = program[3:] if program[1] == "-m" else program[1:]
        if Path(name).stem != "prune":
            raise KeyboardInterrupt
        prune_model(compose("prune", given))
        return 0, ""

    monkeypatch.setattr(stages, "run_program", run_program)
    for one in plan.candidates:
        with pytest.raises(KeyboardInterrupt):
            running.run_rung(compose("distill_candidates", words(("x", "x"), plan.root)), plan, one, 1)


@pytest.fixture
def trial(folders, tmp_path, monkeypatch):
    """A plan whose candidates are pruned and have been through the first rung, the first ones best."""
    plan = make_plan(compose("distill_candidates", words(folders, tmp_path / "out")))
    pruned_here(plan, monkeypatch)
    for one in plan.candidates:
        rungs.write_rung(plan, one, 1, {"validation_loss": float(one.rank), "seconds": 1.0})
    return plan


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_a_rungs_result_is_of_its_candidate_model_and_trial(trial, folders, tmp_path):
    first, second, third = trial.candidates
    assert [one.rank for one in running.still_in(trial, 2)] == [1, 10]
    swap(first.after(1), third.after(1))
    with pytest.raises(UserError, match=r"rank_01/rung_1.json is not of this candidate and rung \(rank is 20, not 1\)"):
        running.still_in(trial, 2)
    with pytest.raises(UserError, match="rank is 20, not 1"):
        running.run_rung(compose("distill_candidates", words(folders, trial.root)), trial, first, 1)
    swap(first.after(1), third.after(1))
    shutil.copy(second.after(1), second.after(2))
    with pytest.raises(UserError, match="rung is 1, not 2"):
        running.read_rung(trial, second, 2)
    other = make_plan(compose("distill_candidates", words(folders, tmp_path / "out", "distill.seed=7")))
    with pytest.raises(UserError, match="trial is sha256:"):
        running.read_rung(other, second, 1)
    # Without its model, as where losers were removed for room, it is known by the rest.
    shutil.rmtree(second.prune.output)
    assert running.read_rung(trial, second, 1)["validation_loss"] == 10.0


@pytest.mark.parametrize("forgotten", [False, True])
def test_another_candidates_model_is_not_taken(trial, folders, forgotten):
    first, second, _ = trial.candidates
    shutil.rmtree(second.prune.output)
    shutil.copytree(first.prune.output, second.prune.output)
    with pytest.raises(UserError, match=r"rank_10/rung_1.json is not of this candidate and rung \(pruned is blake3"):
        running.still_in(trial, 2)
    second.after(1).unlink()
    if forgotten:
        (second.folder / "stages.json").unlink()
    says = "was made with other options" if forgotten else "is another one than was made here"
    with pytest.raises(UserError, match=says):
        running.run_rung(compose("distill_candidates", words(folders, trial.root)), trial, second, 1)
    with pytest.raises(UserError, match="rank 10 of the search is"):
        rungs.shape_of(second)


def test_what_is_told_of_a_candidate_is_what_its_model_has(trial):
    found = summary(trial, {one.rank: [{"validation_loss": 1.0}] for one in trial.candidates})
    for one in found["candidates"]:
        folder = open_model_folder(trial.root / f"candidates/rank_{one['rank']:02d}/pruned")
        assert one["parameters"] == count_parameters(folder.shape)
        assert all(one[name] == getattr(folder.shape, name) for name in SIZES)


def test_no_stage_reads_the_file_of_a_target(folders, tmp_path, hydra):
    """What search ranked is its table, which its digest is of: a file beside it may be edited while stages run."""
    plan = make_plan(compose("distill_candidates", words(folders, tmp_path / "out")))
    cfg = compose(
        "compress", ["model=x", "data.path=x", "budget.parameters=50000", "processes=1", f"output={tmp_path / 'chain'}"]
    )
    at = {"search": folders[0], "prune": tmp_path / "pruned"}
    best, inputs = plan.searched.ranked[0], {"model": plan.searched.source.model, "scores": plan.searched.source.scores}
    for stage in (plan.candidates[0].prune, _compose_searched(cfg, None, inputs, {}, at)):
        assert not [word for word in stage.words if word.startswith("target=") or "targets/" in word]
        assert {f"target.{name}={size}" for name, size in best.target.items()} <= set(stage.words)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["found=nowhere"], "found=nowhere: nowhere does not exist"),
        (["found={data}"], "has no candidates.yaml (it was made by"),
        (["ranks=[1,99]"], "has ranks 1 to 20, not 99"),
        (["ranks=[1]"], "must be two different ranks or more"),
        (["cache=3"], "cache=3 must be true, false, or the output of cache_teacher"),
        (["cache=nowhere"], "rank 1, distill: nowhere does not exist"),
        (
            ["distill.distill.loss=jsd"],
            "distill: distill.loss=jsd needs the teacher beside the student: give cache=false",
        ),
        (["distill.student=x"], "distill: student is set by the candidates and their distillation"),
        (["cache_teacher.trainer.steps=3"], "cache_teacher: trainer.steps is set by"),
        (["prune.target.hidden_size=16"], "prune: target.hidden_size is set by"),
        (["distill.teacher=nowhere"], "distill: nowhere does not exist"),
        (
            ["distill.trainer.step=3"],
            "rank 1, distill: unknown option 'trainer.step' of minitron distill: did you mean",
        ),
        (["distill.trainer.steps=null"], "distill: give either trainer.steps= or trainer.tokens="),
        (["distill.trainer.validation_samples=0"], "distill: trainer.validation_samples=0: candidates are judged by"),
        (["distill.trainer.global_batch_size=3", "processes=2"], "is not a multiple of 2"),
        (["distill.trainer.steps=4000"], "distill: the run takes 512,000 tokens, and "),
        (["cache_teacher.chunk_samples=0"], "cache_teacher: chunk_samples=0 must be above 0"),
        (["distill.distill.top_k=9999"], "distill.top_k=9999"),
        (["halving.steps=[9]"], "halving.steps=[9] must be whole numbers that rise from 1 to the 8 steps"),
        (["rung=-1"], "rung=-1 must not be negative"),
        (["candidate=1"], "rung= and candidate= go together"),
        (["rung=1", "candidate=1"], "the teacher's cache is not there yet: run the same with rung=0 first"),
        (["start=nonsense -n {{processes}}", "processes=2"], "there is no program 'nonsense' here"),
        (["data.path=nowhere"], "nowhere does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_before_anything_runs(folders, tmp_path, monkeypatch, more, says):
    monkeypatch.chdir(tmp_path)
    found, data = folders
    given = [word.format(found=found, data=data) for word in more]
    instead = {word.partition("=")[0] for word in given}
    kept = [word for word in words(folders, tmp_path / "out", "ranks=[1,20]") if word.partition("=")[0] not in instead]
    with pytest.raises(UserError) as error:
        start([*kept, *given])
    assert says in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_every_command_and_writes_nothing(folders, tmp_path, capsys):
    start(words(folders, tmp_path / "out", "dry_run=true", "processes=2"))
    printed = capsys.readouterr().out
    assert "20 steps of 24: 17% less" in printed and "candidates of each rung: 3 2" in printed
    assert printed.count(" --nproc-per-node 2 ") == 7 and "trainer.stop_after" not in printed
    assert list(tmp_path.iterdir()) == []


def test_what_each_rung_trains_and_what_another_start_has_to_ask_for(folders, tmp_path):
    """The last rung ends as a distillation does, with its model; rungs, their candidates and who teaches are the run's."""
    planned = make_plan(compose("distill_candidates", words(folders, tmp_path / "out")))
    assert (planned.rungs, planned.sizes, planned.steps_run, planned.steps_of_all) == ([4, 8], [3, 2], 20, 24)
    for one in planned.candidates:
        own = len(one.distill.words)
        assert [planned.words(one, rung)[own:] for rung in (1, 2)] == [["trainer.stop_after=4"], []]
        assert one.after(1).parent == one.folder == tmp_path / "out" / "candidates" / f"rank_{one.rank:02d}"
    asked = {"ranks": [1, 10, 20], "rungs": [4, 8], "factor": 2, "cached": True, "distill.distill.top_k": 50}
    assert planned.settings.items() >= asked.items()
    assert planned.inputs.keys() == {"found", "model", "data", "teacher"} <= planned.settings.keys()


def test_damage_and_another_folder_are_told(folders, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(UserError, match="is not the folder of a distillation of candidates"):
        start(words(folders, tmp_path / "mine"))
    found = tmp_path / "found"
    shutil.copytree(folders[0], found)
    values = yaml.safe_load((found / "manifest.yaml").read_text())
    values["inputs"]["model"] = "blake3:another"
    (found / "manifest.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="is another one now: run"):
        start(words((found, folders[1]), tmp_path / "out"))
    values = yaml.safe_load((folders[0] / "manifest.yaml").read_text())
    values["inputs"]["scores"] = "sha256:another"
    (found / "manifest.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"its scores \S+ are others now: run search again"):
        start(words((found, folders[1]), tmp_path / "out"))
    del values["config"]["scores"]
    (found / "manifest.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="is damaged"):
        start(words((found, folders[1]), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_rung_is_reached_when_it_is_validated_and_saved(tmp_path):
    """By a line of this very step, and a checkpoint of it or a later one; the last rung by the published model."""
    lines = (
        {"step": 4, "validation_loss": 3.0},
        {"step": 5, "loss": 1.0},
        {"step": 5, "validation_loss": 2.0},
        {"step": 6, "loss": 1.0},
    )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "validat')
    assert running.validation_after(tmp_path, 5) == lines[2] and running.validation_after(tmp_path, 6) is None
    assert not running._reached(tmp_path, 5, published=False)
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    assert not running._reached(tmp_path, 5, published=False)
    (tmp_path / "checkpoints" / "step_00000005").mkdir()
    assert running._reached(tmp_path, 5, published=False) and not running._reached(tmp_path, 6, published=False)
    assert not running._reached(tmp_path, 5, published=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.yaml").touch()
    assert running._reached(tmp_path, 5, published=True)
