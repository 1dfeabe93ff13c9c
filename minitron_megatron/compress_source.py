"""What `launch/compress.py` starts from: a model, and text or data, checked by their files; tokens are counted later.

hf=    ──import_hf──▶ teacher
input= ─prepare_data─▶ data
"""

from dataclasses import dataclass, replace
from pathlib import Path

from minitron_megatron.checkpoints.folder import MANIFEST, ModelFolder, open_model_folder
from minitron_megatron.checkpoints.hf_folder import HfFolder
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.checkpoints.stamps import file_stamps, stamp_of_files
from minitron_megatron.chosen import Text
from minitron_megatron.composing import Stage, compose_stage, naming
from minitron_megatron.compress_given import NO_MODEL, is_rehearsal, own_options
from minitron_megatron.config import CompressConfig
from minitron_megatron.data.encoding import Encoder
from minitron_megatron.data.estimate import estimate_tokens
from minitron_megatron.data.folder import data_digest, open_data
from minitron_megatron.data.prepare import check_documents, check_fraction, find_inputs
from minitron_megatron.data.same_tokenizer import check_same_tokenizer
from minitron_megatron.data.tokenizer import check_tokenizer, check_vocabulary, load_tokenizer, tokenizer_stamps
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.outputs import check_command_output

TEACHER, DATA = "teacher", "data"
# Below so many bytes of text a tenth of it is for validation, rather than a twentieth.
_SMALL_TEXT = 8_000_000


@dataclass(frozen=True)
class Source:
    """What all starts from.

    Attributes:
        model: the first model's folder; of hf= the one that it is going to be imported into.
        shape: its sizes.
        text: tokens that there are; None before they are counted, and in a rehearsal without data.
        ready: whether the data are prepared.
        stages: import_hf and prepare_data, where they are needed.
        inputs: what tells that something else is started from, by name.
        files: text that is to be prepared.
    """

    model: str
    shape: ModelShape
    text: Text | None
    ready: bool
    stages: tuple[Stage, ...]
    inputs: dict[str, str]
    files: tuple[Path, ...] = ()


def open_source(cfg: CompressConfig) -> Source:
    """The model, and text or data, as far as their files tell. Raises UserError."""
    model, shape, inputs, stages = _open_model(cfg)
    if cfg.budget.table:
        inputs |= file_stamps(Path(), [Path(cfg.budget.table)])
    if not cfg.input:
        text = None
        if cfg.data.path and not is_rehearsal(cfg):
            data, inputs["data"] = open_data(cfg.data.path, "train", shape, 1), data_digest(cfg.data.path)
            check_same_tokenizer(data, {"hf": cfg.hf, "model": cfg.model.path})
            text = Text(data.tokens("train"), data.tokens("validation"), exact=True)
        return Source(model, shape, text, text is not None, stages, inputs)
    files = find_inputs(cfg.input)
    inputs["data"] = stamp_of_files(files)
    if model != NO_MODEL:
        check_tokenizer(cfg.hf or model)
    small = sum(file.stat().st_size for file in files) < _SMALL_TEXT
    typed = cfg.input if isinstance(cfg.input, str) else list(cfg.input)
    with naming("prepare_data"):
        own = {"validation_fraction": 0.1 if small else 0.05, **own_options(cfg, "prepare_data"), "processes": 1}
        stage = compose_stage(cfg, "prepare_data", {"model": model, "input": typed}, own, Path(cfg.output) / DATA)
        check_fraction(stage.config.validation_fraction)
    return Source(model, shape, None, False, (*stages, stage), inputs, tuple(files))


def _open_model(cfg: CompressConfig) -> tuple[str, ModelShape, dict[str, str], tuple[Stage, ...]]:
    """The first model's folder, its sizes, what tells that it is another one, and its import if it needs one."""
    if is_rehearsal(cfg):
        return NO_MODEL, ModelShape.from_dict(cfg.model.sizes("model"), "model"), {}, ()
    if cfg.hf:
        hf = HfFolder(cfg.hf)
        hf.check()
        return str(Path(cfg.output) / TEACHER), hf.shape, dict(hf.stamps), (_import_stage(cfg, hf),)
    folder: ModelFolder = open_model_folder(cfg.model.folder("model"))
    check_weights(folder)
    # The digest is that of the weights alone.
    inputs = {"model": folder.digest, **tokenizer_stamps(folder)}
    return str(folder.path), folder.shape, inputs, ()


def count_text(cfg: CompressConfig, source: Source) -> Source:
    """The source with its tokens: those of data that are prepared by now, or counted or estimated in text. Raises UserError."""
    if not source.files or source.model == NO_MODEL:
        return source
    stage = source.stages[-1]
    if (stage.output / MANIFEST).is_file():
        data = open_data(str(stage.output), "train", source.shape, 1)
        return replace(source, text=Text(data.tokens("train"), data.tokens("validation"), exact=True), ready=True)
    with naming("prepare_data"):
        check_documents(list(source.files), stage.config)
    tokenizer_of = Path(cfg.hf or source.model)
    tokenizer = load_tokenizer(tokenizer_of)
    check_vocabulary(tokenizer_of, tokenizer)
    tokens, exact = estimate_tokens(source.files, stage.config.text_key, Encoder.of(tokenizer, stage.config))
    for_validation = round(stage.config.validation_fraction * tokens)
    return replace(source, text=Text(tokens - for_validation, for_validation, exact))


def _import_stage(cfg: CompressConfig, hf: HfFolder) -> Stage:
    """The import. Raises UserError where what is there was imported from other files."""
    with naming("import_hf"):
        stage = compose_stage(cfg, "import_hf", {"hf": cfg.hf}, {"processes": 1}, Path(cfg.output) / TEACHER)
        check_command_output(stage.config, hf.stamps)
    return stage
