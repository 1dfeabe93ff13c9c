"""The tokenizer of a model folder or of a Hugging Face folder: where it is, and whether it fits the model."""

from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import SHAPE_FILE, TOKENIZER, ModelFolder, load_yaml
from minitron_megatron.checkpoints.hf_folder import has_tokenizer
from minitron_megatron.checkpoints.stamps import file_stamps
from minitron_megatron.checkpoints.tokenizer import read_tokenizer, tokenizer_files
from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.plain_files import read_json


def check_tokenizer(folder: Path | str) -> Path:
    """Where the tokenizer of a model folder or of a Hugging Face folder is. Raises UserError where there is none."""
    path = tokenizer_path(Path(folder))
    if not has_tokenizer(path):
        raise UserError(f"model={folder} has no tokenizer: import the model from a Hugging Face folder that has one")
    return path


def load_tokenizer(folder: Path | str) -> Any:
    """The Hugging Face tokenizer of a model folder or of a Hugging Face folder. Raises UserError."""
    path = check_tokenizer(folder)
    tokenizer = read_tokenizer(path, _rows(Path(folder)))
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no end-of-sequence token, which ends each document")
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the highest id: a vocabulary may have holes."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def tokenizer_stamps(folder: ModelFolder) -> dict[str, str]:
    """Stamps of the tokenizer's files of a model folder, as inputs of what reads text with it."""
    return file_stamps(folder.path, tokenizer_files(folder.tokenizer_path))


def check_vocabulary(folder: Path, tokenizer: Any) -> int:
    """Its size. Raises UserError when the tokenizer has ids that the model beside it does not; a tokenizer alone is fine."""
    size, known = vocabulary_size(tokenizer), _rows(folder)
    if known is not None and size > known:
        raise UserError(f"model={folder}: its tokenizer has a vocabulary of {size}, the model of {known}")
    return size


def _rows(folder: Path) -> int | None:
    """Rows of the vocabulary of the model in a folder; None where there is a tokenizer alone. Raises UserError."""
    if (folder / SHAPE_FILE).is_file():
        known = ModelShape.from_dict(load_yaml(folder / SHAPE_FILE), str(folder / SHAPE_FILE)).vocab_size
    elif (folder / "config.json").is_file():
        try:
            known = read_json(folder / "config.json").get("vocab_size")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{folder / 'config.json'} cannot be read ({error})") from None
    else:
        known = None
    return known if isinstance(known, int) else None


def tokenizer_path(folder: Path) -> Path:
    """Where a model folder, or a Hugging Face folder, has its tokenizer's files."""
    return folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder
