"""What launch/evaluate.py checks by its options and folders alone: before torch is there."""

from dataclasses import dataclass
from pathlib import Path

from minitron_megatron.checkpoints.folder import ModelFolder, load_json, open_model_folder
from minitron_megatron.checkpoints.hf_folder import CONFIG_FILES, HF_FILES
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.checkpoints.stamps import file_stamps
from minitron_megatron.checkpoints.task_stamps import task_stamps
from minitron_megatron.config import EvaluateConfig
from minitron_megatron.data.folder import Data, DataSizes, open_data
from minitron_megatron.data.same_tokenizer import check_same_tokenizer
from minitron_megatron.data.tokenizer import check_tokenizer, tokenizer_stamps
from minitron_megatron.data.windows import WindowPlan, taken
from minitron_megatron.errors import UserError
from minitron_megatron.evaluate.harness import wanted_tasks
from minitron_megatron.models.limits import check_layout, check_sequence
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.outputs import check_command_output
from minitron_megatron.parallel.layout import Layout, world_size_from_env


@dataclass(frozen=True)
class Judging:
    """What is judged, checked: a model folder with its teacher and data, if any, or (`hf`) a Hugging Face folder.

    `count` is the number of windows, `inputs` are digests for the manifest.
    """

    layout: Layout | None
    folder: ModelFolder | None
    teacher: ModelFolder | None
    data: Data | None
    count: int
    inputs: dict[str, str]
    hf: Path | None = None


def check_evaluate(cfg: EvaluateConfig) -> Judging:
    """Models, layout, data, names of tasks and output. Raises UserError."""
    _check_asked(cfg)
    if cfg.hf is not None:
        sizes = check_folder(Path(cfg.hf), tokenizer=bool(cfg.tasks))
        data, count = _windows(cfg, sizes) if cfg.data.path is not None else (None, 0)
        if data is not None:
            check_same_tokenizer(data, {"hf": cfg.hf})
        # Its digest is made of all its bytes: later.
        inputs = {**({"data": data.digest} if data else {}), **task_stamps(wanted_tasks(cfg.tasks))}
        check_command_output(cfg, inputs)
        return Judging(None, None, None, data, count, inputs, Path(cfg.hf))
    layout = Layout.from_config(cfg.parallel)
    folder = open_model_folder(cfg.model.folder("model"))
    teacher = open_model_folder(cfg.teacher.folder("teacher")) if cfg.teacher.path else None
    for one in (folder, *([teacher] if teacher else [])):
        check_layout(one.shape, layout)
        check_weights(one)
    if teacher:
        check_teacher(teacher.shape, folder.shape)
    data, count = _open_data(cfg, folder, layout)
    if data is not None:
        check_same_tokenizer(data, {"model": folder.path, "teacher": teacher and teacher.path})
    digests = {"model": folder, "teacher": teacher, "data": data}
    inputs = {name: there.digest for name, there in digests.items() if there is not None}
    if cfg.tasks:
        check_tokenizer(folder.path)
        configs = file_stamps(folder.path, [folder.path / HF_FILES / name for name in CONFIG_FILES])
        inputs |= {**tokenizer_stamps(folder), **configs, **task_stamps(wanted_tasks(cfg.tasks))}
    check_command_output(cfg, inputs)
    return Judging(layout, folder, teacher, data, count, inputs)


def check_teacher(teacher: ModelShape, model: ModelShape) -> None:
    """Raise UserError unless both say how probable each of the same tokens is."""
    if teacher.vocab_size != model.vocab_size:
        raise UserError(
            f"teacher= has a vocabulary of {teacher.vocab_size}, model= of {model.vocab_size}: their distributions can only be "
            "compared over the same one; leave teacher= out"
        )


def _check_asked(cfg: EvaluateConfig) -> None:
    """Raise UserError where what is asked for does not go together."""
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
            "beside this one, or give the folder to import_hf and use model= and teacher="
        )
    if world_size_from_env() > 1:
        raise UserError(
            "hf= runs in one process, as transformers does: start it without torchrun, or import it and use model="
        )


def _open_data(cfg: EvaluateConfig, folder: ModelFolder, layout: Layout) -> tuple[Data | None, int]:
    """The data, if any, and how many windows of them."""
    if cfg.data.path is None:
        return None, 0
    check_sequence(cfg.data.sequence_length, layout)
    return _windows(cfg, folder.shape)


def _windows(cfg: EvaluateConfig, sizes: DataSizes) -> tuple[Data, int]:
    data = open_data(cfg.data.path, cfg.split, sizes, cfg.data.sequence_length)
    windows = len(WindowPlan(data, cfg.split, cfg.data.sequence_length))
    return data, taken("samples", cfg.samples, windows, cfg.split)


@dataclass(frozen=True)
class HfSizes:
    """What data must fit, of any architecture."""

    vocab_size: int
    max_position_embeddings: int


def check_folder(folder: Path, *, tokenizer: bool) -> HfSizes:
    """Raise UserError unless it is a Hugging Face folder with safetensors weights, and a tokenizer where tasks need one."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"hf={folder} has no config.json with .safetensors weights: give the output of export_hf, or another "
            "Hugging Face folder"
        )
    config = load_json(folder / "config.json")
    if "auto_map" in config:
        raise UserError(f"hf={folder} brings code of its own (auto_map in config.json), which is not run: remove it")
    if tokenizer:
        check_tokenizer(folder)
    sizes = {name: config.get(name) for name in ("vocab_size", "max_position_embeddings")}
    odd = next((name for name, size in sizes.items() if type(size) is not int or size < 1), None)
    if odd:
        raise UserError(f"{folder / 'config.json'}: {odd} must be a whole number above 0, not {sizes[odd]!r}")
    return HfSizes(**sizes)
