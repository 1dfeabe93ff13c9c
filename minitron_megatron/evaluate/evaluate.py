"""What a model is worth: loss and distance to a teacher on a split, and tasks of lm-evaluation-harness; into results.json.

model=FOLDER    in any layout, without an export: data.path= (perplexity), teacher= (KL), tasks= (evaluate/adapter.py)
hf=FOLDER       an exported folder, by transformers in one process: data.path= and tasks= (evaluate/hf.py)
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.copies import check_copies
from minitron_megatron.checkpoints.folder import RESULTS, ModelFolder
from minitron_megatron.checkpoints.hf_folder import HF_FILES
from minitron_megatron.checkpoints.weights import load_model, verify_digest
from minitron_megatron.config import EvaluateConfig
from minitron_megatron.console import print_table, speaks
from minitron_megatron.data.folder import Data, verify_data
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.evaluate.checks import (
    Judging,
    check_evaluate,
)
from minitron_megatron.evaluate.perplexity import perplexity
from minitron_megatron.measuring import measuring
from minitron_megatron.models.build import build_model_chunks, foretell_dtype, model_dtype, pick_engine
from minitron_megatron.outputs import check_command_output, command_output
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.deciding import from_rank_zero
from minitron_megatron.parallel.job import pick_device
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.precision import record, settled


def evaluate(cfg: EvaluateConfig, checked: Judging | None = None) -> None:
    """`launch/evaluate.py`: results.json in the output folder, and a table."""
    checked = checked or check_evaluate(cfg)
    if checked.hf:
        _evaluate_hf(cfg, checked.hf, checked.data, checked.count, checked.inputs)
        return
    layout, folder, teacher = checked.layout, checked.folder, checked.teacher
    data, count, inputs = checked.data, checked.count, checked.inputs
    if cfg.tasks:
        load_tokenizer(folder.path)
    device = pick_device(cfg.device)
    if cfg.dry_run:
        _dry_run(cfg, {"model": str(folder.path), **({"windows": count} if data else {})})
        foretell_dtype(cfg.precision, device, *(one.shape for one in (folder, teacher) if one))
        return
    for option, one in (("model", folder), ("teacher", teacher)):
        if one is not None:
            pick_engine(getattr(cfg, option).engine, layout, model_dtype(one.shape, cfg.precision), device, option)
    with measuring(cfg, layout, folder, data, inputs) as out:
        if out.done:
            return
        if teacher:
            check_copies(teacher.path)
        if cfg.verify and teacher:
            verify_digest(teacher)
        out.results = _measured(cfg, layout, folder, teacher, data, count)
        _write(out.path, out.results)
    _show(f"{folder.path}" + (f" on {cfg.data.path}, {cfg.split}" if data else ""), out.results)


def _dry_run(cfg: EvaluateConfig, found: Mapping[str, Any]) -> None:
    rows = [[name, value] for name, value in found.items()]
    if cfg.tasks and speaks():
        loaded = _load(cfg)
        rows += [
            ["tasks", ", ".join(loaded.tasks)],
            ["questions", sum(_questions(cfg, t) for t in loaded.tasks.values())],
        ]
    print_table("would be evaluated", ["", "value"], rows)


def _questions(cfg: EvaluateConfig, task: Any) -> int:
    return min(len(task.eval_docs), cfg.limit or len(task.eval_docs))


def _load(cfg: EvaluateConfig) -> Any:
    from minitron_megatron.evaluate.harness import load, wanted_tasks

    wanted = wanted_tasks(cfg.tasks)
    loaded = load(wanted, fewshot=cfg.fewshot, seed=cfg.seed, unsafe=cfg.confirm_run_unsafe_code, limit=cfg.limit)
    writing = next((name for name, task in loaded.tasks.items() if task.OUTPUT_TYPE == "generate_until"), None)
    if writing and cfg.parallel.context > 1:
        raise UserError(
            f"tasks=[{writing}] generates text, which parallel.context={cfg.parallel.context} cannot: use parallel.tensor"
        )
    return loaded


def _measured(
    cfg: EvaluateConfig,
    layout: Layout,
    folder: ModelFolder,
    teacher: ModelFolder | None,
    data: Data | None,
    count: int,
) -> dict[str, Any]:
    """All figures, the same on every rank. Tasks are loaded first: what is wrong with them is known before weights are read."""
    began = time.monotonic()
    loaded = from_rank_zero(lambda: _load(cfg)) if cfg.tasks else None
    chunks = build_model_chunks(folder.shape, layout, model_dtype(folder.shape, cfg.precision), cfg.model.engine)
    load_model(chunks, folder)
    found: dict[str, Any] = {}
    if cfg.tasks:
        found = _tasks(cfg, layout, folder, chunks, loaded)
    if data is not None:
        found = {**perplexity(chunks, folder.shape, teacher, data, layout, cfg, count), "windows": count, **found}
    return {**found, "seconds": round(time.monotonic() - began, 2)}


def _tasks(cfg: EvaluateConfig, layout: Layout, folder: ModelFolder, chunks: Any, loaded: Any) -> dict[str, Any]:
    """What tasks say of a live model, on every rank."""
    from minitron_megatron.evaluate.adapter import MegatronLM, Ranks
    from minitron_megatron.evaluate.answers import Rule
    from minitron_megatron.evaluate.run_tasks import run_tasks

    ranks = Ranks(
        chunks,
        layout,
        folder.shape,
        load_tokenizer(folder.path),
        tokens_at_once=cfg.trainer.micro_batch_size * cfg.data.sequence_length,
        prompts_at_once=cfg.prompts,
        seed=cfg.seed,
    )

    def asked() -> dict[str, Any]:
        rule = Rule(folder.path / HF_FILES, ranks.tokenizer.eos_token_id)
        return run_tasks(MegatronLM(ranks, rule), loaded, cfg)

    found = ranks.on_rank_zero(asked)
    return collectives.broadcast_object(found)


def _evaluate_hf(cfg: EvaluateConfig, folder: Path, data: Data | None, count: int, inputs: Mapping[str, str]) -> None:
    """Loss and tasks of a Hugging Face folder, by transformers."""
    from minitron_megatron.evaluate.hf import digest_of, hf_perplexity, load_model
    from minitron_megatron.evaluate.run_tasks import run_tasks

    if cfg.tasks:
        load_tokenizer(folder)
    inputs = {"hf": digest_of(folder), **inputs}
    if cfg.dry_run:
        check_command_output(cfg, inputs)
        _dry_run(cfg, {"hf": str(folder), **({"windows": count} if data else {})})
        return
    with settled(pick_device(cfg.device).type), command_output(cfg, inputs) as out:
        if out.done:
            return
        if cfg.verify and data:
            verify_data(data)
        began, found, model = time.monotonic(), {}, None
        if cfg.tasks:
            from minitron_megatron.evaluate.hf_tasks import TransformersLM

            loaded, harness = _load(cfg), TransformersLM(folder, cfg)
            found, model = run_tasks(harness, loaded, cfg), harness.model
        if data:
            found = {**hf_perplexity(model or load_model(folder, cfg), data, cfg, count), "windows": count, **found}
        out.results, out.precision = {**found, "seconds": round(time.monotonic() - began, 2)}, record()
        _write(out.path, out.results)
    _show(f"{folder}" + (f" on {cfg.data.path}, {cfg.split}" if data else ""), out.results)


def _write(folder: Path, results: Mapping[str, Any]) -> None:
    if collectives.is_rank_zero():
        (folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _show(title: str, results: Mapping[str, Any]) -> None:
    """Figures, then each task that is no part of a group's figure."""
    plain = {name: value for name, value in results.items() if not isinstance(value, dict | list)}
    beside = {name: plain.pop(f"teacher_{name}", "") for name in ("loss", "perplexity")}
    columns = ["", "model", "teacher"] if any(beside.values()) else ["", "value"]
    print_table(title, columns, [[name, value, beside.get(name, "")][: len(columns)] for name, value in plain.items()])
    rows = []
    for name, task in results.get("tasks", {}).items():
        if "part_of" in task:
            continue
        about = {key: task.get(key, "") for key in ("fewshot", "questions")}
        for metric, value in task.items():
            if metric not in about and not metric.endswith("_stderr"):
                rows.append([name, *about.values(), metric, value, task.get(f"{metric}_stderr", "")])
    if rows:
        print_table("tasks", ["task", "examples", "questions", "metric", "value", "±"], rows)
