"""Whether data were tokenised as a model's own tokenizer does it: a token id stands for the same piece of text in both.

Data folders and model folders have their tokenizers' files. Where these are the same bytes, all is well. Other files may still be
the same tokenizer, saved by another version of its library or with another chat template: then pieces, merges and the end of a
document are compared, which say what an id is. How text is cut into pieces is compared by the files as well; where those differ,
both are loaded and given the same texts, and only then is torch imported.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import TOKENIZER, load_json
from minitron_megatron.checkpoints.tokenizer import (
    FILE,
    class_config,
    difference_of_text,
    read_tokenizer,
    tokenizer_digest,
    tokenizer_files,
)
from minitron_megatron.data.folder import Data, DataFolder
from minitron_megatron.data.tokenizer import tokenizer_path
from minitron_megatron.errors import UserError

log = logging.getLogger(__name__)


def check_same_tokenizer(data: Data, models: Mapping[str, Path | str | None]) -> None:
    """Raise UserError where a folder of the data was tokenised by another tokenizer than that of a model that reads it.

    Args:
        data: what is read.
        models: model folders, or Hugging Face folders, by the options that name them; those without a tokenizer have nothing
            to compare.
    """
    for option, model in models.items():
        if model is None or not tokenizer_files(tokenizer_path(Path(model))):
            continue
        for folder in data.folders:
            if tokenizer_files(folder.path / TOKENIZER):
                _check(folder, option, Path(model))


def _check(folder: DataFolder, option: str, model: Path) -> None:
    theirs, ours = folder.path / TOKENIZER, tokenizer_path(model)
    if tokenizer_digest(theirs) == tokenizer_digest(ours):
        return
    there, here = _parts(theirs), _parts(ours)
    difference = _first_difference(there, here, folder.results.get("end_of_document")) or _other_text(theirs, ours)
    if difference is not None:
        raise UserError(
            f"data.path={folder.path} was made with another tokenizer than that of {option}={model} ({difference}): prepare the "
            "data with this model's tokenizer"
        )
    if not there.keys() & here.keys():
        log.warning(
            "data.path=%s and %s=%s have tokenizers of different kinds, which are not compared",
            folder.path,
            option,
            model,
        )
    added = there.get("added", {}), here.get("added", {})
    odd = next((i for i in sorted(added[0].keys() & added[1].keys()) if added[0][i] != added[1][i]), None)
    if odd is not None:
        log.warning(
            "data.path=%s and %s=%s call special token %d differently: %r and %r",
            folder.path,
            option,
            model,
            odd,
            added[0][odd],
            added[1][odd],
        )


def _first_difference(there: Mapping[str, Any], here: Mapping[str, Any], end: Any) -> str | None:
    """What of the data's tokenizer is otherwise in the model's, and changes what ids mean; `end` is what ends a document."""
    for name in sorted(there.keys() & here.keys(), reverse=True):
        if (found := _difference(name, there, here)) is not None:
            return found
    ends = [_special(parts, end) for parts in (there, here)]
    if None not in ends and ends[0] != ends[1]:
        return f"documents end in token {end}, {ends[0]!r} in the data, {ends[1]!r} in the model's"
    return None


def _difference(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The same of one part."""
    one, other = there[name], here[name]
    if name == "added" or one == other:
        return None
    if name == "vocabulary":
        ids = {i: piece for piece, i in other.items()} | here.get("added", {})
        ordinary = sorted((i, piece) for piece, i in one.items() if i not in there.get("added", {}))
        odd = next(((i, piece) for i, piece in ordinary if ids.get(i) != piece), None)
        # The model's may have more.
        return None if odd is None else f"token {odd[0]} is {odd[1]!r} in the data, {ids.get(odd[0])!r} in the model's"
    return f"their {name} differ"


# Of tokenizer.json and tokenizer_config.json: what is compared by itself, or is of no effect on the ids of a plain text.
_COMPARED, _NO_EFFECT = (
    ("vocab", "merges"),
    ("added_tokens", "post_processor", "decoder", "padding", "truncation", "version"),
)
_OF_CHATS = (
    "chat_template",
    "added_tokens_decoder",
    "extra_special_tokens",
    "additional_special_tokens",
    "model_max_length",
)


def _other_text(there: Path, here: Path) -> str | None:
    """A text of which two tokenizers of the same pieces make other ids. Where either cannot be loaded, that is said."""
    if _cuts_text(there) == _cuts_text(here):
        return None
    try:
        return difference_of_text(read_tokenizer(there), read_tokenizer(here))
    except UserError as error:
        log.warning("%s: it is compared by its files alone", error)
        return None


def _cuts_text(folder: Path) -> list[Any]:
    """What the files say of how text is cut into pieces, and what chooses the tokenizer's class."""
    files = (load_json(folder / name) if (folder / name).is_file() else {} for name in (FILE, "tokenizer_config.json"))
    values, config = files
    model = values.get("model") if isinstance(values.get("model"), dict) else {}
    return [
        {key: value for key, value in model.items() if key not in _COMPARED},
        {key: value for key, value in values.items() if key not in ("model", *_NO_EFFECT)},
        {key: value for key, value in config.items() if key not in _OF_CHATS and not key.endswith("_token")},
        class_config(folder),
    ]


def _special(parts: Mapping[str, Any], token: Any) -> str | None:
    """A token by its id, as an added one or an ordinary one; None where neither says."""
    if token in parts.get("added", {}):
        return parts["added"][token]
    return next((piece for piece, i in parts.get("vocabulary", {}).items() if i == token), None)


def _parts(folder: Path) -> dict[str, Any]:
    """What says how text becomes ids, as far as the files have it: vocabulary {piece: id}, merges, added {id: text}."""
    parts: dict[str, Any] = {}
    if (folder / FILE).is_file():
        values = load_json(folder / FILE)
        model = values.get("model") if isinstance(values.get("model"), dict) else {}
        vocabulary, merges = model.get("vocab"), model.get("merges")
        if isinstance(vocabulary, list):  # unigrams, with their scores
            vocabulary = {str(one[0]): i for i, one in enumerate(vocabulary) if isinstance(one, list) and one}
        if isinstance(vocabulary, dict) and all(type(i) is int for i in vocabulary.values()):
            parts["vocabulary"] = vocabulary
        if isinstance(merges, list):
            parts["merges"] = [one if isinstance(one, str) else " ".join(map(str, one)) for one in merges]
        added = values.get("added_tokens")
        known = [one for one in added or [] if isinstance(one, dict) and type(one.get("id")) is int]
        parts["added"] = {one["id"]: str(one.get("content")) for one in known}
    elif (folder / "vocab.json").is_file():
        parts["vocabulary"] = {piece: i for piece, i in load_json(folder / "vocab.json").items() if type(i) is int}
        if (folder / "merges.txt").is_file():
            lines = (folder / "merges.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            parts["merges"] = [line for line in lines if line and not line.startswith("#version")]
    elif (folder / "tokenizer.model").is_file():
        parts["tokenizer.model"] = (folder / "tokenizer.model").read_bytes()
    return parts
