"""A tokenizer's files with what decides how they are read, and whether two folders give the same ids.

transformers' AutoTokenizer chooses its class by tokenizer_config.json and by the config.json beside it: the same files give other
ids beside another one. So a tokenizer that leaves its model takes the deciding keys along, as a config.json of its own.

    HF folder/config.json ──▶ MODEL/tokenizer/config.json: model_type, … ──▶ export/config.json, that of the exported model
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import TOKENIZER, load_json
from minitron_megatron.errors import UserError, in_one_line

log = logging.getLogger(__name__)

FILE = "tokenizer.json"
TOKENIZER_FILES = (
    FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Chat templates with names, one a file.
TEMPLATES = "additional_chat_templates"
CLASS_FILE = "config.json"
# Keys of config.json that AutoTokenizer reads.
_DECIDING = ("model_type", "model_name", "tokenizer_class", "transformers_version")

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")

# Where tokenizers differ: spaces, digits, case, composed letters, scripts without spaces, control characters, special strings.
_PROBES = (
    "Hello world, it's a TEST of what DON'T and we'll become.",
    "  two before, two  inside, two after  ",
    "\n\nlines\n\n\n  indented\n\ttab\t\ttabs \r\n end\n",
    "1 12 123 1234 12345678 3.14 1,000 0x1F 2024-01-31",
    "naïve café Ångström \u0041\u030a e\u0301 \ufb01 \u00bd \u2460 \u3000 \u00a0 \u200b",
    "Привет, мир! Γειά σου! שלום مرحبا नमस्ते ไทย",
    "東京は日本の首都です。한국어 文字",
    "👩‍👩‍👧 🇫🇷 \U0001f600 \ue000 \x07",
    "def f(x): return {\"a\": [1, 2], 'b': x**2 != 0}  # done\n    pass",
    "https://example.org/a_b?c=d&e=%20f user@mail.com #tag ... --- ___ ''' \"\"\"",
    "x </s> y <s> <unk> <pad> <|endoftext|> <|im_start|>z",
    " ",
    "a",
)
# Words of the vocabulary itself that are tried as well.
_OWN_WORDS = 400


def tokenizer_files(folder: Path) -> list[Path]:
    """A tokenizer's files: all of a folder that has nothing else, the known ones of a folder with a model's weights."""
    if not folder.is_dir():
        return []
    if folder.name == TOKENIZER and not any(folder.glob("*.safetensors")):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    known = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return sorted([*known, *(path for path in (folder / TEMPLATES).glob("*.jinja") if path.is_file())])


def class_config(folder: Path) -> str | None:
    """What the config.json beside a tokenizer decides of it, as a config.json; None where it decides nothing."""
    file = folder / CLASS_FILE
    values = load_json(file) if file.is_file() else {}
    found = {key: values[key] for key in _DECIDING if isinstance(values.get(key), str)}
    return json.dumps(found, indent=2) + "\n" if found else None


def _contents(folder: Path) -> dict[str, Path | str]:
    """A tokenizer's files by their names in its folder, and the text of its config.json; nothing where there is no tokenizer."""
    files = {file.relative_to(folder).as_posix(): file for file in tokenizer_files(folder)}
    files.pop(CLASS_FILE, None)
    decides = class_config(folder) if files else None
    return files | ({CLASS_FILE: decides} if decides else {})


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a tokenizer's files, the same beside a model and alone."""
    whole = hashlib.sha256()
    for name, content in sorted(_contents(folder).items()):
        whole.update(name.encode() + b"\0" + (content.encode() if isinstance(content, str) else content.read_bytes()))
    return "sha256:" + whole.hexdigest()


def copy_tokenizer(source: Path, target: Path, *, alone: bool = True) -> None:
    """Copy a tokenizer's files into a folder, which is made if there are any; `alone`: with what decides its class."""
    for name, content in _contents(source).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, target / name)
        elif alone:
            (target / name).write_text(content, encoding="utf-8")


def carry_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer of a foreign folder. Raises UserError where the copy is not the same tokenizer."""
    copy_tokenizer(source, target)
    if not target.is_dir():
        return
    try:
        own = read_tokenizer(source)
    except UserError as error:
        log.warning("%s: it is copied as it is", error)
        return
    if (found := difference(own, read_tokenizer(target))) is not None:
        raise UserError(
            f"{source}: its tokenizer is another one without the rest of the folder ({found}): save it again with its "
            "save_pretrained()"
        )


def export_tokenizer(source: Path, target: Path, rows: int | None = None) -> None:
    """Copy a model folder's tokenizer beside the config.json of an export. Raises UserError where it is another one there.

    `rows` are those of the model's vocabulary. Another class may be chosen there: that of Mistral, for a Llama that is exported
    as one. Then tokenizer.json is written as the first class has built it.
    """
    copy_tokenizer(source, target, alone=False)
    try:
        own = read_tokenizer(source, rows)
    except UserError as error:
        log.warning("%s: it is copied as it is", error)
        return
    there = read_tokenizer(target, rows)
    found = difference(own, there)
    if found is not None and hasattr(own, "backend_tokenizer"):
        _write_as_built(own, target)
        there = read_tokenizer(target, rows)
        found = difference(own, there)
    if found is not None:
        raise UserError(
            f"{source}: transformers reads this tokenizer as {type(own).__name__}, and as {type(there).__name__} beside the "
            f"export's {CLASS_FILE}, with other ids ({found}): import the model again with the tokenizer that it was trained with"
        )


def _write_as_built(tokenizer: Any, target: Path) -> None:
    """Write what a class has made of the files into them: its pieces, and the special tokens that it takes by itself."""
    tokenizer.backend_tokenizer.save(str(target / FILE))
    file = target / "tokenizer_config.json"
    values = load_json(file) if file.is_file() else {}
    values |= {name: str(token) for name in _SPECIAL if (token := getattr(tokenizer, name)) is not None}
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tokenizer(path: Path, rows: int | None = None) -> Any:
    """The Hugging Face tokenizer of a folder: no hub, no remote code. Raises UserError.

    With the `rows` of a model's vocabulary it is without tokens beyond them that are in no file: transformers adds to some
    classes a token of its own, which the model has no row for and no text gives.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a tokenizer's files can be wrong in as many ways as transformers has loaders
        raise UserError(f"{path}: the tokenizer cannot be loaded ({in_one_line(error, 200)})") from None
    if rows is not None and hasattr(tokenizer, "backend_tokenizer"):
        _drop(tokenizer, path, rows)
    return tokenizer


def _drop(tokenizer: Any, path: Path, rows: int) -> None:
    """Have a tokenizer without the tokens from `rows` on that are in none of its files."""
    beyond = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if number >= rows}
    gone = {token for token in beyond if not any(_names(file, token) for file in tokenizer_files(path))}
    if not gone:
        return
    from tokenizers import Tokenizer

    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values["added_tokens"] = [one for one in values["added_tokens"] if one["content"] not in gone]
    for name in _SPECIAL:
        if getattr(tokenizer, name) in gone:
            setattr(tokenizer, name, None)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(values))
    _say_dropped(path, ", ".join(sorted(gone)), rows)


def _names(file: Path, token: str) -> bool:
    """Whether a file of a tokenizer has a token, spelt as it is or as in JSON; chat templates, which may name any, aside."""
    if file.name == CLASS_FILE or file.suffix == ".jinja":
        return False
    if file.name == "tokenizer_config.json":
        values = load_json(file)
        return token in json.dumps({**values, "chat_template": None}, ensure_ascii=False)
    content = file.read_bytes()
    return token.encode() in content or json.dumps(token)[1:-1].encode() in content


@cache
def _say_dropped(path: Path, tokens: str, rows: int) -> None:
    log.info("%s: %s left out: transformers adds it beyond the model's %d rows, and no file has it", path, tokens, rows)


def difference(one: Any, other: Any) -> str | None:
    """What tells two tokenizers apart: vocabulary, special tokens, chat templates, or the ids of a text; None for nothing."""
    if (odd := _first_other(one.get_vocab(), other.get_vocab())) is not None:
        return odd
    for name in (*_SPECIAL, "chat_template"):
        if getattr(one, name) != getattr(other, name):
            return f"another {name}"
    added = [f"a{token} b" for token in list(one.get_added_vocab())[:_OWN_WORDS]]
    return difference_of_text(one, other) or _other_ids(one, other, [*probes(one), *added])


def difference_of_text(one: Any, other: Any) -> str | None:
    """A text that two tokenizers give other ids, where special tokens are text and nothing is put around it."""
    return _other_ids(one, other, probes(one), add_special_tokens=False, split_special_tokens=True)


def probes(tokenizer: Any) -> list[str]:
    """Texts in which tokenizers differ, and words of this one's vocabulary, with and without spaces between."""
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))
    step = max(1, len(ids) // _OWN_WORDS)
    words = [tokenizer.decode([i]) for i in ids[::step]]
    return [*_PROBES, " ".join(words), *(a + b for a, b in pairwise(words[::8]))]


def _other_ids(one: Any, other: Any, texts: list[str], **how: Any) -> str | None:
    both = ([tokenizer(text, verbose=False, **how)["input_ids"] for text in texts] for tokenizer in (one, other))
    for text, a, b in zip(texts, *both, strict=True):
        if a != b:
            at = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
            return f"{text[:30]!r} is {a[at : at + 3]} and {b[at : at + 3]} from its token {at} on"
    return None


def _first_other(one: Mapping[str, int], other: Mapping[str, int]) -> str | None:
    """The first token, by its name, that has another id."""
    odd = (
        next((token for token in sorted({*one, *other}) if one.get(token) != other.get(token)), None)
        if one != other
        else None
    )
    return None if odd is None else f"token {odd!r} is {one.get(odd, 'none')} and {other.get(odd, 'none')}"
