"""What a model is worth: loss and distance to a teacher on a split, and tasks of lm-evaluation-harness; into results.json.

model=FOLDER    in any layout, without an export: data.path= (perplexity), teacher= (KL), tasks= (evaluate/adapter.py)
hf=FOLDER       an exported folder, by transformers in one process: data.path= and tasks= (evaluate/hf.py)
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import RESULTS, ModelFolder, open_model_folder
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.checkpoints.weights import load_model, verify_digest
from minitron_megatron.config import EvaluateConfig
from minitron_megatron.console import print_table
from minitron_megatron.data.datasets import Windows
from minitron_megatron.data.folder import Data, DataSizes, open_data, verify_data
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.evaluate.perplexity import check_teacher, perplexity
from minitron_megatron.measuring import measuring
from minitron_megatron.models.build import build_model_chunks, foretell_dtype, model_dtype, pick_engine
from minitron_megatron.models.limits import check_layout, check_sequence
from minitron_megatron.outputs import check_command_output, command_output
from minitron_megatron.parallel import collectives
from minitron_megatron.parallel.job import pick_device
from minitron_megatron.parallel.layout import Layout, world_size_from_env
from minitron_megatron.parallel.precision import record, settled


def evaluate(cfg: EvaluateConfig) -> None:
    """`launch/evaluate.py`: results.json in the output folder, and a table."""
    _check_asked(cfg)
    if cfg.hf is not None:
        _evaluate_hf(cfg)
        return
    layout = Layout.from_config(cfg.parallel)
    folder = open_model_folder(cfg.model.folder("model"))
    teacher = open_model_folder(cfg.teacher.folder("teacher")) if cfg.teacher.path else None
    for one in (folder, *([teacher] if teacher else [])):
        check_layout(one.shape, layout)
        check_weights(one)
    if teacher:
        check_teacher(teacher.shape, folder.shape)
    data, count = _open_data(cfg, folder, layout)
    if cfg.tasks:
        load_tokenizer(folder.path)
    device = pick_device(cfg.device)
    digests = {"model": folder, "teacher": teacher, "data": data}
    inputs = {name: there.digest for name, there in digests.items() if there is not None}
    if cfg.dry_run:
        _dry_run(cfg, inputs, {"model": str(folder.path), **({"windows": count} if data else {})})
        foretell_dtype(cfg.precision, device, *(one.shape for one in (folder, teacher) if one))
        return
    for option, one in (("model", folder), ("teacher", teacher)):
        if one is not None:
            pick_engine(getattr(cfg, option).engine, layout, model_dtype(one.shape, cfg.precision), device, option)
    with measuring(cfg, layout, folder, data, inputs) as out:
        if out.done:
            return
        if cfg.verify and teacher:
            verify_digest(teacher)
        out.results = _measured(cfg, layout, folder, teacher, data, count)
        _write(out.path, out.results)
    _show(f"{folder.path}" + (f" on {cfg.data.path}, {cfg.split}" if data else ""), out.results)


def _check_asked(cfg: EvaluateConfig) -> None:
    """Raise UserError where what is asked for does not go together."""
    from minitron_megatron.evaluate.harness import wanted_tasks

    wanted_tasks(cfg.tasks)
    if cfg.data.path is None and not cfg.tasks:
        raise UserError("nothing to evaluate: give data.path= (perplexity), tasks=, or both")
    if cfg.teacher.path is not None and cfg.data.path is None:
        raise UserError(
            "teacher= is compared on data: give data.path=, or leave teacher= out (evaluate it as model= on tasks=)"
        )
    if cfg.hf is None:
        return
    if cfg.model.path is not None:
        raise UserError(f"hf={cfg.hf} and model={cfg.model.path} name two models: give one of them")
    if cfg.teacher.path is not None:
        raise UserError(
            f"hf={cfg.hf} has no teacher= beside it: evaluate model={cfg.teacher.path} on the same data, which a report shows "
            "beside this one, or give the folder to launch/import_hf.py and use model= and teacher="
        )
    if world_size_from_env() > 1:
        raise UserError(
            "hf= runs in one process, as transformers does: start it with plain python, or import it and use model="
        )


def _open_data(cfg: EvaluateConfig, folder: ModelFolder, layout: Layout) -> tuple[Data | None, int]:
    """The data, if any, and how many windows of them."""
    if cfg.data.path is None:
        return None, 0
    check_sequence(cfg.data.sequence_length, layout)
    return _windows(cfg, folder.shape)


def _windows(cfg: EvaluateConfig, sizes: DataSizes) -> tuple[Data, int]:
    data = open_data(cfg.data.path, cfg.split, sizes, cfg.data.sequence_length)
    windows = len(Windows(data, cfg.split, cfg.data.sequence_length))
    return data, min(windows, cfg.samples or windows)


def _dry_run(cfg: EvaluateConfig, inputs: Mapping[str, str], found: Mapping[str, Any]) -> None:
    check_command_output(cfg, inputs)
    rows = [[name, value] for name, value in found.items()]
    if cfg.tasks and int(os.environ.get("RANK", "0")) == 0:
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
    loaded = load(wanted, fewshot=cfg.fewshot, seed=cfg.seed, unsafe=cfg.confirm_run_unsafe_code)
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
    loaded = collectives.from_rank_zero(lambda: _load(cfg)) if cfg.tasks else None
    chunks = build_model_chunks(folder.shape, layout, model_dtype(folder.shape, cfg.precision), cfg.model.engine)
    load_model(chunks, folder)
    found: dict[str, Any] = {}
    if cfg.tasks:
        found = _tasks(cfg, layout, folder, chunks, loaded)
    if data is not None:
        found = {**perplexity(chunks, folder.shape, teacher, data, layout, cfg, count), **found}
    return {**found, "seconds": round(time.monotonic() - began, 2)}


def _tasks(cfg: EvaluateConfig, layout: Layout, folder: ModelFolder, chunks: Any, loaded: Any) -> dict[str, Any]:
    """What tasks say of a live model, on every rank."""
    from minitron_megatron.evaluate.adapter import MegatronLM, Ranks
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
    found = ranks.on_rank_zero(lambda: run_tasks(MegatronLM(ranks), loaded, cfg))
    return collectives.broadcast_object(found)


def _evaluate_hf(cfg: EvaluateConfig) -> None:
    """Loss and tasks of a Hugging Face folder, by transformers."""
    from minitron_megatron.evaluate.hf import check_folder, digest_of, hf_perplexity, load_hf, load_model
    from minitron_megatron.evaluate.run_tasks import run_tasks

    folder = Path(cfg.hf)
    sizes = check_folder(folder, tokenizer=bool(cfg.tasks))
    data, count = _windows(cfg, sizes) if cfg.data.path is not None else (None, 0)
    inputs = {"hf": digest_of(folder), **({"data": data.digest} if data else {})}
    if cfg.dry_run:
        _dry_run(cfg, inputs, {"hf": str(folder), **({"windows": count} if data else {})})
        return
    with settled(pick_device(cfg.device).type), command_output(cfg, inputs) as out:
        if out.done:
            return
        if cfg.verify and data:
            verify_data(data)
        began, found, model = time.monotonic(), {}, None
        if cfg.tasks:
            loaded, harness = _load(cfg), load_hf(folder, cfg)
            found, model = run_tasks(harness, loaded, cfg), harness.model
        if data:
            found = {**hf_perplexity(model or load_model(folder, cfg), data, cfg, count), **found}
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
