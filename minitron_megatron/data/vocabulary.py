"""A smaller vocabulary for a tokenizer: which tokens stay, and the tokenizer's files for them.

A byte-pair tokenizer makes long tokens out of short ones, so a token stays only with those that it is made of:

    merges: t+h, th+e            "the" kept ──▶ "th", "t", "h", "e" kept too

Special tokens and the bytes stay always: every text can still be written, frequent words in as few tokens as before.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minitron_megatron.checkpoints.folder import load_json
from minitron_megatron.errors import UserError
from minitron_megatron.plain_files import read_json

FILE = "tokenizer.json"
KEPT_FILE = "kept_token_ids.json"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class BytePairs:
    """The vocabulary and merges of a tokenizer.json. Raises UserError where it is another kind of tokenizer."""

    def __init__(self, folder: Path) -> None:
        try:
            self.file = read_json(folder / FILE)
            model = self.file["model"]
            kind = model["type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / FILE} cannot be read ({error}): target.vocab_size needs it") from None
        if kind != "BPE":
            raise UserError(
                f"{folder / FILE} is a {kind} tokenizer: target.vocab_size can cut byte-pair (BPE) ones only"
            )
        self.ids: dict[str, int] = model["vocab"]
        self.added: dict[str, int] = {token["content"]: token["id"] for token in self.file.get("added_tokens", [])}
        self.merges: list[tuple[str, str]] = [
            tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
        ]
        self.unknown: str | None = model.get("unk_token")
        self.byte_fallback = bool(model.get("byte_fallback"))
        # A token may be made in several ways: the first is the one that text usually takes.
        self.made_of: dict[str, tuple[str, str]] = {}
        for a, b in self.merges:
            self.made_of.setdefault(a + b, (a, b))

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
    kept = pairs.always()
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


def write_tokenizer(source: Path, target: Path, kept: np.ndarray) -> None:
    """Copy a tokenizer's folder with the kept ids alone, numbered anew in ascending order. Raises UserError."""
    pairs = BytePairs(source)
    new = {old: i for i, old in enumerate(kept.tolist())}
    lost = sorted(pairs.always() - set(new))
    if lost:
        raise UserError(f"vocab leaves out token {lost[0]}, a special or single-byte token of {source}: keep it")
    file, model = pairs.file, pairs.file["model"]
    model["vocab"] = {token: new[i] for token, i in pairs.ids.items() if i in new}
    model["merges"] = [list(m) for m in pairs.merges if all(t in model["vocab"] for t in (*m, m[0] + m[1]))]
    for token in file.get("added_tokens", []):
        token["id"] = new[token["id"]]
    _renumber(file.get("post_processor"), {**model["vocab"], **{t: new[i] for t, i in pairs.added.items()}})
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("tokenizer.model", "vocab.json", "merges.txt"))
    (target / FILE).write_text(json.dumps(file, ensure_ascii=False), encoding="utf-8")
    config = target / "tokenizer_config.json"
    if config.is_file():
        values = load_json(config)
        if "added_tokens_decoder" in values:
            values["added_tokens_decoder"] = {
                str(new[int(old)]): token for old, token in values["added_tokens_decoder"].items() if int(old) in new
            }
        config.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")


def _renumber(processor: Any, ids: Mapping[str, int]) -> None:
    """Token ids inside a post-processor, wherever they stand."""
    if isinstance(processor, list):
        for one in processor:
            _renumber(one, ids)
    elif isinstance(processor, dict):
        if isinstance(processor.get("ids"), list) and isinstance(processor.get("tokens"), list):
            processor["ids"] = [ids[token] for token in processor["tokens"]]
        for key in ("sep", "cls"):
            if isinstance(processor.get(key), list):
                processor[key] = [processor[key][0], ids[processor[key][0]]]
        for value in processor.values():
            _renumber(value, ids)


def renumber_config(config: Mapping[str, Any], kept: Iterable[int]) -> dict[str, Any]:
    """A Hugging Face config (or generation config) with its token ids in the new numbering; ids that went are null."""
    new = {old: i for i, old in enumerate(kept)}

    def of(value: Any) -> Any:
        return [new[v] for v in value if v in new] if isinstance(value, list) else new.get(value)

    return {key: of(value) if key.endswith("_token_id") else value for key, value in config.items()}
