"""What `launch/distill_candidates.py` is going to run: every stage of every candidate composed, and checked before the first.

output/settings.json                what was asked for
       cache/                       the teacher's answers, for all candidates
       candidates/rank_03/pruned/   a model folder a candidate
                          distilled/           its run folder
                          rung_1.json, …       what it was after each rung
       results.json, report.html, rankings.svg, kl.svg, target.yaml, plan.yaml      once all is done
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minitron_megatron.candidates import halving
from minitron_megatron.checkpoints.folder import ModelFolder, check_space, open_model_folder, read_manifest
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.composing import Stage, check_data, compose_stage, flat_options, naming
from minitron_megatron.config import DistillCandidatesConfig, number_of_steps, tokens_of_run
from minitron_megatron.data.folder import check_enough
from minitron_megatron.data.same_tokenizer import check_same_tokenizer
from minitron_megatron.distill.cache_checks import plan_cache
from minitron_megatron.distill.contents import CacheFolder
from minitron_megatron.errors import UserError
from minitron_megatron.importance.scores import check_scores, load_scores
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.prune.select import target_shape
from minitron_megatron.search.found import Ranked, SearchFolder, read_search
from minitron_megatron.stages import is_whole
from minitron_megatron.train.checks import what_is_trained
from minitron_megatron.train.distill_checks import check_cache, check_pair

CACHE, CANDIDATES = "cache", "candidates"
# What is set here: a candidate's models and where they go, which samples the cache is for, and when a rung ends.
_SET_HERE = {
    "prune": "model scores layers plan target drop_layers prune output resume dry_run hydra".split(),
    "distill": "student output resume dry_run hydra distill.cache trainer.stop_after".split(),
    "cache_teacher": "teacher data seed trainer.steps trainer.tokens trainer.global_batch_size trainer.validation_samples "
    "distill output resume dry_run hydra".split(),
}
# What the cache has of the distillation, by its options.
_OF_THE_DISTILLATION = """trainer.global_batch_size trainer.validation_samples data.sequence_length data.max_epochs
    data.reset_attention_mask distill.top_k distill.temperature""".split()


@dataclass(frozen=True)
class Candidate:
    """A shape with its stages; `distill` is the whole distillation, which is run rung by rung."""

    ranked: Ranked
    shape: ModelShape
    folder: Path
    prune: Stage
    distill: Stage

    @property
    def rank(self) -> int:
        """By predicted damage, from 1."""
        return self.ranked.rank

    @cached_property
    def parameters(self) -> int:
        """Of its model."""
        return count_parameters(self.shape)

    def after(self, rung: int) -> Path:
        """The file with what it was after a rung, from 1."""
        return self.folder / f"rung_{rung}.json"


@dataclass(frozen=True)
class Plan:
    """All that is going to be run.

    Attributes:
        root: the output.
        searched: where the shapes are from.
        candidates: by rank.
        cache: the stage that caches the teacher; None where it runs, or was cached before.
        rungs: steps after which candidates are judged; the last is the budget.
        factor: one in so many goes on.
        settings: what has to be the same when the command continues.
        inputs: digests of what all starts from.
    """

    root: Path
    searched: SearchFolder
    candidates: list[Candidate]
    cache: Stage | None
    rungs: list[int]
    factor: int
    settings: dict[str, Any]
    inputs: dict[str, str]

    @property
    def sizes(self) -> list[int]:
        """How many candidates each rung trains."""
        return halving.sizes(len(self.candidates), self.factor, len(self.rungs))

    @property
    def steps_run(self) -> int:
        """Steps of all candidates together."""
        return halving.steps_run(self.sizes, self.rungs)

    @property
    def steps_of_all(self) -> int:
        """Steps that training every candidate to the end would take."""
        return len(self.candidates) * self.rungs[-1]

    def words(self, candidate: Candidate, rung: int) -> list[str]:
        """Options of the distillation of a candidate up to a rung, from 1."""
        step = self.rungs[rung - 1]
        return [*candidate.distill.words, *([f"trainer.stop_after={step}"] if step < self.rungs[-1] else [])]


def make_plan(cfg: DistillCandidatesConfig) -> Plan:
    """Compose and check everything. Raises UserError for what a stage would refuse once its turn comes."""
    root = Path(cfg.output)
    with naming(f"found={cfg.found}"):
        searched = read_search(cfg.found)
        model = open_model_folder(searched.source.model)
        if model.digest != searched.model_digest:
            raise UserError(f"its model {searched.source.model} is another one now: run search again")
        check_weights(model)
        for name in searched.inputs.keys() - {"model"}:
            path = getattr(searched.source, name)
            if read_manifest(path)["digest"] != searched.inputs[name]:
                raise UserError(f"its {name} {path} are others now: run search again")
        check_scores(load_scores(searched.source.scores), model.shape, model.digest, searched.source.scores)
    chosen = _chosen(searched, cfg.ranks)
    own, teacher = _own_options(cfg, searched)
    candidates = [_candidate(cfg, searched, model.shape, one, own) for one in chosen]
    first = candidates[0].distill.config
    with naming("distill"):
        steps = number_of_steps(first)
        if not first.trainer.validation_samples:
            raise UserError("trainer.validation_samples=0: candidates are judged by their validation loss")
        data = check_data(first, ["train", "validation"], candidates[0].shape, 1)
        check_enough(data, tokens_of_run(first), first.data.max_epochs)
        check_same_tokenizer(data, {"model": model.path})
    inputs = {"found": searched.digest, "model": model.digest, "data": data.digest}
    taught = _check_teacher(cfg, candidates, teacher)
    if taught is not None:
        inputs["teacher"] = taught.digest
    if isinstance(cfg.cache, str):
        inputs["cache"] = CacheFolder.open(cfg.cache).digest
    cache = _cache(cfg, root, candidates[0].distill, steps, taught) if cfg.cache is True else None
    rungs = halving.rungs(len(candidates), cfg.halving.factor, steps, _given_steps(cfg))
    settings = {
        **inputs,
        "ranks": [one.rank for one in candidates],
        "rungs": rungs,
        "factor": cfg.halving.factor,
        "cached": cfg.cache is not False,
        **{f"distill.{k}": v for k, v in what_is_trained(first).items() if k not in ("student.path", "distill.cache")},
    }
    return Plan(root, searched, candidates, cache, rungs, cfg.halving.factor, settings, inputs)


def _given_steps(cfg: DistillCandidatesConfig) -> list[Any] | None:
    given = cfg.halving.steps
    return given if given is None or isinstance(given, list) else [given]


def _chosen(searched: SearchFolder, ranks: Any) -> list[Ranked]:
    """The candidates by rank. Raises UserError."""
    there = {one.rank: one for one in searched.ranked}
    wanted = list(there) if ranks is None else ranks if isinstance(ranks, list) else [ranks]
    missing = [rank for rank in wanted if type(rank) is not int or rank not in there]
    if missing:
        raise UserError(f"ranks={wanted}: {searched.path} has ranks 1 to {len(there)}, not {missing[0]!r}")
    if len(set(wanted)) < 2 or len(set(wanted)) != len(wanted):
        raise UserError(f"ranks={wanted} must be two different ranks or more: there is nothing to choose between")
    return [there[rank] for rank in sorted(wanted)]


def _own_options(cfg: DistillCandidatesConfig, searched: SearchFolder) -> tuple[dict[str, Any], str | None]:
    """Options of every distillation, and who teaches; None where its answers are given and nobody was named."""
    if not isinstance(cfg.cache, bool | str):
        raise UserError(f"cache={cfg.cache} must be true, false, or the output of cache_teacher")
    own = _options(cfg, "distill")
    own.setdefault("trainer.keep_last", 1)
    teacher = own.pop("teacher", None if isinstance(cfg.cache, str) else searched.source.model)
    if cfg.cache is False:
        return {"teacher": teacher, **own}, teacher
    if own.setdefault("distill.loss", "topk_kl") != "topk_kl":
        raise UserError(
            f"distill: distill.loss={own['distill.loss']} needs the teacher beside the student: give cache=false, or leave it "
            "out for topk_kl"
        )
    own["distill.cache"] = str(Path(cfg.output) / CACHE) if cfg.cache is True else cfg.cache
    if cfg.cache is not True and teacher is not None:
        own["teacher"] = teacher  # compared with whom the cache is of
    return own, teacher


def _options(cfg: DistillCandidatesConfig, stage: str) -> dict[str, Any]:
    """What was given for a stage. Raises UserError for what is not the user's to give."""
    own = flat_options(getattr(cfg, stage), stage)
    taken = [key for key in own if key in _SET_HERE[stage] or key.partition(".")[0] in _SET_HERE[stage]]
    if taken:
        raise UserError(f"{stage}: {taken[0]} is set by the candidates and their distillation: leave it out")
    return own


def _candidate(
    cfg: DistillCandidatesConfig, searched: SearchFolder, source: ModelShape, one: Ranked, own: dict[str, Any]
) -> Candidate:
    folder = Path(cfg.output) / CANDIDATES / f"rank_{one.rank:02d}"
    # By its sizes: the file of its target could be another one by then.
    pruned = {**searched.source.options(one.target, source.num_layers), **one.options}
    with naming(f"rank {one.rank}", "prune"):
        prune = compose_stage(cfg, "prune", pruned, _options(cfg, "prune"), folder / "pruned")
        shape = target_shape(source, vars(prune.config.target), [], prune.config.prune)
    with naming(f"rank {one.rank}", "distill"):
        named = {} if own.get("logger.wandb") == "disabled" else {"logger.name": folder.name}
        given = {**named, **own}
        distill = compose_stage(cfg, "distill", {"student": prune.output}, given, folder / "distilled")
    return Candidate(one, shape, folder, prune, distill)


def _check_teacher(
    cfg: DistillCandidatesConfig, candidates: list[Candidate], teacher: str | None
) -> ModelFolder | None:
    """Who teaches, checked with every candidate in its layout. Raises UserError."""
    folder = None
    if teacher is not None:
        with naming("distill"):
            folder = open_model_folder(teacher)
            check_weights(folder)
    beside = folder.shape if folder and cfg.cache is False else None
    for one in candidates:
        with naming(f"rank {one.rank}", "distill"):
            distill = one.distill
            check_pair(
                beside, one.shape, distill.config, Layout.from_config(distill.config.parallel, distill.processes)
            )
            if isinstance(cfg.cache, str):
                check_cache(distill.config, one.shape)
    return folder


def _cache(cfg: DistillCandidatesConfig, root: Path, distill: Stage, steps: int, teacher: ModelFolder) -> Stage:
    """The stage that caches the teacher for the samples of the distillations. Raises UserError."""
    of_it = {key: _value(distill.config, key) for key in _OF_THE_DISTILLATION}
    with naming("cache_teacher"):
        own = {**of_it, "trainer.steps": steps, **_options(cfg, "cache_teacher")}
        stage = compose_stage(cfg, "cache_teacher", {"teacher": teacher.path}, own, root / CACHE)
        layout = Layout.from_config(stage.config.parallel, stage.processes)
        _, contents = plan_cache(stage.config, teacher, layout)
        if not is_whole(stage.output):
            advice = "lower distill.distill.top_k= or the tokens, or give cache=false"
            check_space(root, contents.total_bytes, f"{stage.output}", advice=advice)
    return stage


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config
