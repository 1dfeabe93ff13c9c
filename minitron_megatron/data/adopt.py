"""Datasets that Megatron-LM's tools have written, as a data folder: the same files, checked, with a manifest.

tools/preprocess_data.py --append-eod ──▶ PREFIX.bin, PREFIX.idx ──adopt_data──▶ data folder, its files hard links to those
"""

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import TOKENIZER, Output
from minitron_megatron.checkpoints.stamps import stamp
from minitron_megatron.checkpoints.tokenizer import copy_tokenizer, tokenizer_digest
from minitron_megatron.config import AdoptDataConfig
from minitron_megatron.console import print_table, speaks
from minitron_megatron.data.encoding import special_ids
from minitron_megatron.data.indexed import Split, beside, open_split
from minitron_megatron.data.tokenizer import (
    check_tokenizer,
    check_vocabulary,
    load_tokenizer,
    tokenizer_path,
)
from minitron_megatron.errors import UserError
from minitron_megatron.outputs import check_command_output, command_output

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adopting:
    """Splits that were opened, the folder of their tokenizer, and digests for the manifest."""

    splits: dict[str, Split]
    inputs: dict[str, str]


def check_adopt(cfg: AdoptDataConfig) -> Adopting:
    """Datasets, tokenizer and output, before transformers is there. Raises UserError."""
    splits = {name: _open(getattr(cfg, name), name) for name in ("train", "validation")}
    if len({split.dtype for split in splits.values()}) > 1:
        raise UserError("train= and validation= hold ids of different types: make both with one tokenizer")
    files = check_tokenizer(cfg.model.folder("model"))
    inputs = {"tokenizer": tokenizer_digest(files), **{name: _stamps(split) for name, split in splits.items()}}
    check_command_output(cfg, inputs)
    return Adopting(splits, inputs)


def adopt_data(cfg: AdoptDataConfig, checked: Adopting | None = None) -> None:
    """`launch/adopt_data.py`: .bin/.idx prefixes into a data folder. One process works; others of a torchrun job return."""
    if not speaks():
        return
    checked = checked or check_adopt(cfg)
    splits, inputs = checked.splits, checked.inputs
    folder = Path(cfg.model.folder("model"))
    tokenizer, files = load_tokenizer(folder), tokenizer_path(folder)
    vocabulary = check_vocabulary(folder, tokenizer)
    if cfg.dry_run:
        _print("would be adopted", splits)
        return
    for name, split in splits.items():
        split.check_ids(vocabulary, f"{name}={split.prefix}", whole=True)
    borders = _borders(splits, tokenizer)
    with command_output(cfg, inputs) as out:
        if out.done:
            return
        copy_tokenizer(files, out.path / TOKENIZER)
        for name, split in splits.items():
            _take(split, name, out)
        out.results |= {
            "vocab_size": vocabulary,
            "token_dtype": splits["train"].dtype.name,
            **borders,
            "tokenizer": inputs["tokenizer"],
        }
    _print(f"{cfg.output}: adopted", splits)


def _open(prefix: str, name: str) -> Split:
    split = open_split(Path(prefix), f"{name}={prefix}")
    if not split.tokens:
        raise UserError(f"{name}={prefix} has no tokens")
    return split


def _stamps(split: Split) -> str:
    return ", ".join(stamp(beside(split.prefix, ending)) for ending in (".bin", ".idx"))


def _borders(splits: dict[str, Split], tokenizer: Any) -> dict[str, Any]:
    """What ends the documents that are there, a special token, and opens them, the BOS or nothing: for the manifest.

    A warning where nothing ends them: they would run into each other.
    """
    special, eos = {number: token for token, number in special_ids(tokenizer).items()}, tokenizer.eos_token_id
    last, first = ({int(split.ids[place]) for split in splits.values()} for place in (-1, 0))
    end = last.pop() if len(last) == 1 and last <= set(special) else eos
    for name, split in splits.items():
        if split.ids[-1] != end:
            log.warning(
                "%s=%s: its last document does not end in token %d: was it written with --append-eod?",
                name,
                split.prefix,
                end,
            )
    begin = tokenizer.bos_token_id if first == {tokenizer.bos_token_id} and tokenizer.bos_token_id != end else None
    log.info("%s opens a document, %s ends it", special.get(begin, "nothing"), special.get(end, end))
    tokens = {"end_of_document_token": special.get(end), "begin_of_document_token": special.get(begin)}
    return {"end_of_document": end, "begin_of_document": begin, **tokens}


def _take(split: Split, name: str, out: Output) -> None:
    """The split's files in the folder: hard links, or copies on another file system."""
    for ending in (".bin", ".idx"):
        source, target = beside(split.prefix, ending).resolve(), out.path / f"{name}{ending}"
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
    # The text is not there to be measured.
    out.results[name] = {"documents": split.documents, "tokens": split.tokens, "bytes": None}


def _print(title: str, splits: dict[str, Split]) -> None:
    print_table(title, ["split", "documents", "tokens"], [[n, s.documents, s.tokens] for n, s in splits.items()])
