"""A smaller vocabulary for a tokenizer: which tokens stay, and the tokenizer's files for them.

A byte-pair tokenizer makes long tokens out of short ones, so a token stays only with those that it is made of:

    merges: t+h, th+e            "the" kept ──▶ "th", "t", "h", "e" kept too

Special tokens and the bytes stay always: every text can still be written, frequent words in as few tokens as before.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minitron_megatron.checkpoints.folder import ModelFolder, load_json
from minitron_megatron.checkpoints.hf_folder import HF_FILES
from minitron_megatron.checkpoints.tokenizer import CLASS_FILE, FILE, TEMPLATES, class_config, read_tokenizer
from minitron_megatron.data.token_ids import New, by_name, renumber
from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.plain_files import read_json
from minitron_megatron.plain_text import one_line

log = logging.getLogger(__name__)

KEPT_FILE = "kept_token_ids.json"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# Other files of a tokenizer: those that have ids under names of keys, and by token; text without ids; and those that say what
# tokenizer.json says, for other programs, and cannot be cut here.
_WITH_IDS, _BY_TOKEN, _TEXTS = ("tokenizer_config.json", "special_tokens_map.json"), "added_tokens.json", (".jinja",)
_SAID_TWICE = ("tokenizer.model", "vocab.json", "merges.txt")


class BytePairs:
    """The vocabulary and merges of a tokenizer.json. Raises UserError where it is another kind of tokenizer."""

    def __init__(self, folder: Path) -> None:
        try:
            self.file = read_json(folder / FILE)
            kind = self.file["model"]["type"]
            if kind == "BPE":
                self._read(self.file["model"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / FILE} cannot be read ({type(error).__name__}: {in_one_line(error, 100)}): target.vocab_size needs it"
            ) from None
        if kind != "BPE":
            raise UserError(
                f"{folder / FILE} is a {one_line(str(kind))[:40]} tokenizer: target.vocab_size can cut byte-pair (BPE) ones only"
            )
        # A token may be made in several ways: the first is the one that text usually takes.
        self.made_of: dict[str, tuple[str, str]] = {}
        for a, b in self.merges:
            self.made_of.setdefault(a + b, (a, b))

    def _read(self, model: dict[str, Any]) -> None:
        self.ids: dict[str, int] = dict(model["vocab"])
        self.added: dict[str, int] = {token["content"]: token["id"] for token in self.file.get("added_tokens", [])}
        odd = next((t for ids in (self.ids, self.added) for t, i in ids.items() if type(i) is not int or i < 0), None)
        if odd is not None:
            raise ValueError(f"the id of {odd!r} is none")
        self.merges: list[tuple[str, str]] = [_pair(merge) for merge in model["merges"]]
        self.unknown: str | None = model.get("unk_token")
        self.byte_fallback = bool(model.get("byte_fallback"))

    def always(self) -> set[int]:
        """Ids that stay whatever their frequency."""
        basic = {
            i for t, i in self.ids.items() if (_BYTE.fullmatch(t) if self.byte_fallback else t not in self.made_of)
        }
        unknown = {self.ids[self.unknown]} if self.unknown in self.ids else set()
        return basic | unknown | set(self.added.values())

    def with_parts(self, token: str) -> set[int]:
        """A token's id and those of all it is made of."""
        found: set[int] = set()
        waiting = [token]
        while waiting:
            one = waiting.pop()
            if self.ids[one] not in found:
                found.add(self.ids[one])
                waiting += [part for part in self.made_of.get(one, ()) if part in self.ids]
        return found


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return str(first), str(second)


def choose_tokens(folder: Path, counts: np.ndarray, size: int) -> np.ndarray:
    """The `size` token ids that stay, ascending: the most frequent with what they are made of; ties to the lower id.

    Args:
        folder: the tokenizer's.
        counts: how often each id stands in the calibration data, [vocabulary].
        size: how many stay.

    Raises:
        UserError: not a byte-pair tokenizer, or `size` is too small for the tokens that must stay.
    """
    pairs = BytePairs(folder)
    kept = pairs.always() | special_ids(folder, len(counts))
    if max(kept) >= len(counts):
        raise UserError(f"{folder} has token {max(kept)}, and the model beside it a vocabulary of {len(counts)}")
    if size < len(kept):
        raise UserError(
            f"target.vocab_size={size} is too small: {len(kept)} special and single-byte tokens of {folder} must stay"
        )
    names = {i: token for token, i in pairs.ids.items()}
    for i in np.argsort(-counts, kind="stable").tolist():
        if len(kept) == size:
            break
        more = (pairs.with_parts(names[i]) if i in names else {i}) - kept
        if len(kept) + len(more) <= size:
            kept |= more
    return np.array(sorted(kept))


def write_tokenizer(source: Path, target: Path, kept: np.ndarray, rows: int | None = None) -> None:
    """A tokenizer's files with the kept ids alone, numbered anew in ascending order, in a new folder. Raises UserError.

    `rows` are those of the vocabulary of the source's model.
    """
    pairs, new = BytePairs(source), numbered(kept)
    lost = sorted((pairs.always() | special_ids(source, rows)) - set(new))
    if lost:
        raise UserError(f"vocab leaves out token {lost[0]}, a special or single-byte token of {source}: keep it")
    cut = cut_files(source, new)
    cut[FILE] = cut_tokenizer(pairs, new, source / FILE)
    target.mkdir()
    for name, values in cut.items():
        (target / name).write_text(json.dumps(values, indent=None if name == FILE else 2, ensure_ascii=False), "utf-8")
    for file in sorted(source.iterdir()):
        if file.suffix in _TEXTS:
            shutil.copyfile(file, target / file.name)
        elif file.name == TEMPLATES:
            shutil.copytree(file, target / TEMPLATES)
        elif file.name == CLASS_FILE:
            (target / CLASS_FILE).write_text(class_config(source) or "{}", encoding="utf-8")
        elif file.name not in (*cut, *_SAID_TWICE):
            log.warning("%s left out: which ids of the whole vocabulary it has is not known", file)
    _check_written(source, target, new, rows)


def special_ids(folder: Path, rows: int | None = None) -> set[int]:
    """Ids of all special and added tokens, as transformers loads them: some stand in tokenizer_config.json alone."""
    tokenizer = read_tokenizer(folder, rows)
    return {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


def _check_written(source: Path, target: Path, new: New, rows: int | None = None) -> None:
    """Raise UserError unless a cut tokenizer, as it is loaded, has the tokens of its source that stay, with their new ids."""
    own, cut = read_tokenizer(source, rows), read_tokenizer(target, rows and len(new))
    wanted = {token: new[i] for token, i in own.get_vocab().items() if i in new}
    found = cut.get_vocab()
    odd = sorted(token for token in {*wanted, *found} if wanted.get(token) != found.get(token))
    if odd:
        was, now = (ids.get(odd[0], "none") for ids in (wanted, found))
        raise UserError(f"the cut tokenizer of {source} has {now} for token {odd[0]!r}, and the cut model {was}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        if new.get(getattr(own, name)) != getattr(cut, name):
            raise UserError(f"the cut tokenizer of {source} has {name} {getattr(cut, name)}: no longer the same token")
    for token, i in own.get_added_vocab().items():
        ids, there = (one(token, add_special_tokens=False)["input_ids"] for one in (own, cut))
        if ids == [i] and there != [new[i]]:
            raise UserError(f"the cut tokenizer of {source} reads {token!r} as {there}: no longer as the same token")


def numbered(kept: np.ndarray) -> New:
    """New id of each token that stays, by its old one."""
    return {old: i for i, old in enumerate(kept.tolist())}


def cut_files(folder: Path, new: New) -> dict[str, dict[str, Any]]:
    """The JSON files of a tokenizer beside tokenizer.json, in the new numbering, by name. Raises UserError."""
    cut = {name: renumber(load_json(folder / name), new, name) for name in _WITH_IDS if (folder / name).is_file()}
    if (folder / _BY_TOKEN).is_file():
        cut[_BY_TOKEN] = by_name("a token", load_json(folder / _BY_TOKEN), new, str(folder / _BY_TOKEN))
    return cut


def cut_configs(folder: ModelFolder, new: New) -> dict[str, dict[str, Any]]:
    """Hugging Face's configs of a model folder in the new numbering, by name. Raises UserError."""
    files = sorted((folder.path / HF_FILES).glob("*.json"))
    return {file.name: renumber(load_json(file), new, str(file)) for file in files}


def check_cut(folder: ModelFolder) -> None:
    """Raise UserError where a file of a model folder cannot follow a cut of its vocabulary: before anything is measured."""
    pairs = BytePairs(folder.tokenizer_path)
    new = {i: i for i in range(folder.shape.vocab_size)}
    cut_tokenizer(pairs, new, folder.tokenizer_path / FILE)
    cut_files(folder.tokenizer_path, new)
    cut_configs(folder, new)


def cut_tokenizer(pairs: BytePairs, new: New, where: Path) -> dict[str, Any]:
    """What tokenizer.json says, in the new numbering. Raises UserError."""
    file = dict(pairs.file)
    vocabulary = {token: new[i] for token, i in pairs.ids.items() if i in new}
    merges = [list(m) for m in pairs.merges if all(t in vocabulary for t in (*m, m[0] + m[1]))]
    file["model"] = {**file["model"], "vocab": vocabulary, "merges": merges}
    try:
        file["added_tokens"] = [{**token, "id": new[token["id"]]} for token in file.get("added_tokens", [])]
        ids = {**vocabulary, **{token: new[i] for token, i in pairs.added.items()}}
        if file.get("post_processor") is not None:
            file["post_processor"] = _renumbered(file["post_processor"], ids)
        if isinstance(file.get("padding"), Mapping):
            file["padding"] = {**file["padding"], "pad_id": ids[file["padding"]["pad_token"]]}
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{where} is damaged ({type(error).__name__}: {in_one_line(error, 100)}): a token that it names is none of its own"
        ) from None
    return file


def _renumbered(processor: Any, ids: Mapping[str, int]) -> Any:
    """A post-processor, or a part of one, with the ids of the tokens that it names."""
    if isinstance(processor, list):
        return [_renumbered(one, ids) for one in processor]
    if not isinstance(processor, Mapping):
        return processor
    found = {key: _renumbered(value, ids) for key, value in processor.items()}
    if isinstance(found.get("ids"), list) and isinstance(found.get("tokens"), list):
        found["ids"] = [ids[token] for token in found["tokens"]]
    for key in ("sep", "cls"):
        if isinstance(found.get(key), list):
            found[key] = [found[key][0], ids[found[key][0]]]
    return found
