"""The words of a command line: which are refused, and what Hydra is given of the others.

    model=outputs/x  ──▶  model.path=outputs/x       teacher=PRESET  ──▶  model@teacher=PRESET       optim=my.yaml  ──▶  its words
    samples=1e3      ──▶  samples=1000

`model=FOLDER` and `model=PRESET` are told apart here. What is typed is checked before anything reads it as a value; of what Hydra
cannot read, the word is shown as it is to be typed.
"""

import difflib
import os
import re
from decimal import Decimal
from pathlib import Path

from minitron_megatron.cli import spelling
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.cli.spelling import called
from minitron_megatron.config import (
    MODEL_OPTIONS,
    CommandConfig,
    Option,
    free_options,
    model_options,
    options,
)
from minitron_megatron.errors import UserError
from minitron_megatron.preset_files import is_preset_file, words_of_file
from minitron_megatron.words import PLAIN_VALUE, quoted

# In the repository a link to its conf/; a package has the folder itself.
CONF = Path(__file__).resolve().parent.parent / "conf"
# How deep lists, mappings and the names of options may be nested; an option has three levels.
DEEPEST = 50
# What options of plain types take, in words.
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}
# Numbers with a point or an exponent, none of them part of a word or in quotes; longer ones are nobody's count.
_FLOAT = re.compile(r"(?<![\w.'\"+-])[+-]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?(?![\w.'\"])")
_MOST_DIGITS = 40
# Of a list or mapping: texts in quotes, what divides it, and everything else.
_PARTS = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[\[\]{},]|[^\[\]{},]+""")


def words_after_dashes(words: list[str], option: str) -> list[str]:
    """Words after `--` as the list that is the value of one option: nothing in them needs quotes of Hydra's."""
    if "--" not in words:
        return words
    own, after = words[: words.index("--")], words[words.index("--") + 1 :]
    return [*own, f"{option}=[{','.join(map(quoted, after))}]"]


def words_that_stand_alone(words: list[str], option: str) -> list[str]:
    """Words that are neither options nor flags as the value of one option."""
    alone = [
        word for word in words if not word.startswith("-") and not (is_override(word) and not os.path.exists(word))
    ]
    if not alone:
        return words
    value = alone[0] if len(alone) == 1 else f"[{','.join(map(quoted, alone))}]"
    return [*(word for word in words if word not in alone), f"{option}={value}"]


def is_override(word: str) -> bool:
    """Whether a word sets an option, rather than being one of Hydra's flags or a flag's value (`--cfg job`)."""
    return "=" in word and not word.startswith("-")


def is_for_hydra(word: str) -> bool:
    """Whether a word sets an option of Hydra's own."""
    return word.startswith(("hydra.", "hydra/", "+hydra"))


def check_words(words: list[str], name: str, config_class: type[CommandConfig]) -> None:
    """Refuse unknown options and presets, options given twice, and deletions. Raises UserError."""
    known = [o.name for o in options(config_class)]
    groups = presets(name)
    models = model_options(config_class)
    free = free_options(config_class)
    seen: set[str] = set()
    for word in words:
        if word.startswith("~"):
            raise UserError(f"{word}: options cannot be deleted, only set")
        key, _, value = word.lstrip("+").partition("=")
        if max(_depth(word), key.count(".")) > DEEPEST:
            raise UserError(f"{key[:40]}{'…' * (len(key) > 40)} is nested more than {DEEPEST} deep: write it flat")
        if "${" in word and not {"-m", "--multirun"} & set(words):
            raise UserError(f"{word} has an interpolation (${{…}}), which is only for -m: write the value")
        if not is_override(word) or is_for_hydra(word):
            continue
        if re.search(r"\d{301}", value):  # more digits than the largest float has
            raise UserError(f"{key}= has a number of more than 300 digits: write a smaller one")
        if key in seen:
            raise UserError(f"{key}= is given twice")
        seen.add(key)
        if key.partition(".")[0] in free:
            continue
        if key in groups and key not in MODEL_OPTIONS:
            if not is_preset_file(value):
                _check_preset(key, value, groups[key])
        elif key not in known and key not in models and not any(o.startswith(f"{key}.") for o in known):
            near = difflib.get_close_matches(key, [*known, *groups, *models], n=1)
            near = near or difflib.get_close_matches(key.partition(".")[0], free, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown option {key!r} of {called(name)}: {hint}--help lists all")


def _depth(word: str) -> int:
    """Brackets that are open at once at the most; in quotes they count too."""
    deepest = depth = 0
    for sign in word:
        depth += (sign in "([{") - (sign in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _check_preset(group: str, value: str, names: list[str]) -> None:
    wrong = [v for v in value.split(",") if v not in names and not value.startswith(("{", "["))]
    if wrong:
        near = difflib.get_close_matches(wrong[0], names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(names)}"
        if os.path.isdir(wrong[0]):
            ranked = os.path.join(wrong[0], "targets", "rank_01.yaml")
            inside = f", such as {ranked}" if os.path.isfile(ranked) else ""
            hint = f"it is a folder: give a preset's file{inside}, or one of {', '.join(names)}"
        raise UserError(f"{group}={wrong[0]} is not a preset of conf/{group}: {hint}")


def with_preset_files(
    words: list[str], name: str, config_class: type[CommandConfig]
) -> tuple[list[str], dict[str, list[str]]]:
    """The words with every file of one's own in place of a preset taken apart: what it sets comes before them.

    Gives the words, and the options that each file sets. Raises UserError, naming the file, for what is wrong in it.
    """
    free = free_options(config_class)
    known = [o.name for o in options(config_class) if o.name not in free]
    models = model_options(config_class)
    groups = [*presets(name), *models]
    taken: list[str] = []
    keys: dict[str, list[str]] = {}
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if not is_override(word) or key not in groups or not is_preset_file(value):
            continue
        found = words_of_file(key, value, known, groups)
        try:
            check_words(found, name, config_class)
        except UserError as error:
            raise UserError(f"{key}={value}: {error}") from None
        keys[word.lstrip("+")] = [one.partition("=")[0] for one in found]
        taken += found
    own = [word for word in words if word.lstrip("+") not in keys]
    return [*taken, *own], keys


QUOTES = "'\""


def as_override(word: str, config_class: type[CommandConfig]) -> str:
    """`model=outputs/x` sets model.path, `model=PRESET` takes conf/model/PRESET.yaml; odd characters are quoted."""
    if not is_override(word):
        return word
    key, _, value = word.lstrip("+").partition("=")
    if not value:
        return f"{key}=''"
    if value == "~" or value.startswith("~/"):
        value = os.path.expanduser(value)
    value = _as_one_writes(value)
    if key in model_options(config_class):
        if os.path.isfile(CONF / "model" / f"{value}.yaml"):
            return f"{group_of(key)}={value}"
        key = f"{key}.path"
    if key.partition(".")[0] in free_options(config_class):
        return f"++{key}={value}"
    option = _option(key, config_class)
    if option and option.whole:
        value = _FLOAT.sub(_digits, value)
    if _takes_list(key, config_class) and value[0] not in "[{$" and "," not in value and value != "null":
        return f"{key}=[{value if PLAIN_VALUE.fullmatch(value) or value[0] in QUOTES else quoted(value)}]"
    if _takes_text(key, config_class) and not PLAIN_VALUE.fullmatch(value) and value[0] not in f"{QUOTES}[{{$":
        value = quoted(value)
    return f"{key}={value}"


def _as_one_writes(path: str) -> str:
    """A path that is there without what a shell's completion or a detour adds: `a/`, `./a` and `b/../a` are the option `a`."""
    plain = os.path.normpath(path)
    return plain if plain != path and os.path.exists(path) and os.path.samefile(path, plain) else path


def group_of(model_option: str) -> str:
    """The config group that an option such as `teacher` takes presets from, as each command's conf file lists it."""
    return "model" if model_option == "model" else f"model@{model_option}"


def _option(key: str, config_class: type[CommandConfig]) -> Option | None:
    return next((o for o in options(config_class) if o.name == key.lstrip("+~")), None)


def _takes_list(key: str, config_class: type[CommandConfig]) -> bool:
    """Whether one value may stand for a list of it."""
    option = _option(key, config_class)
    return option is not None and option.type in ("list[str]", "list[int]")


def _takes_text(key: str, config_class: type[CommandConfig]) -> bool:
    option = _option(key, config_class)
    return option is not None and ("str" in option.type or option.type == "Any")


def _digits(found: re.Match) -> str:
    """A whole number such as 1e9 or 2.5e9 with its digits written out; any other as it was typed."""
    number = Decimal(found[0])
    whole = abs(number.adjusted()) < _MOST_DIGITS and number == number.to_integral_value()
    return str(int(number)) if whole else found[0]


def explain_unreadable(word: str, config_class: type[CommandConfig]) -> str:
    """One line for a word that Hydra cannot read: what its option takes, or the same word with the quotes that it needs."""
    key, _, value = word.lstrip("+").partition("=")
    option = _option(key, config_class)
    if option and (kind := KINDS.get(option.type.partition(" ")[0])):
        return f"{key}={value} must be {kind}"
    in_quotes = f"{key}={_text_in_quotes(value) if option and option.type.startswith('str') else _in_quotes(value)}"
    if _is_readable(in_quotes):
        return f"{key}={value} cannot be read: odd characters need quotes, as in {spelling.quoted(in_quotes)}"
    return f"{key}={value} cannot be read: close its brackets, and put quotes around odd characters"


def _in_quotes(value: str) -> str:
    """A value with Hydra's quotes: around it, or around what is odd in a list or mapping."""
    if value[:1] not in ("[", "{"):
        return _text_in_quotes(value)
    found, opened = [], []
    for part in _PARTS.findall(value):
        if part in "[{":
            opened.append(part)
        elif part in "]}" and opened:
            opened.pop()
        elif part not in "]}," and part[0] not in QUOTES:
            name, colon, item = part.partition(":") if opened[-1:] == ["{"] else ("", "", part)
            odd = item.strip() and not PLAIN_VALUE.fullmatch(item.strip())
            part = f"{name}{colon}{_text_in_quotes(item.strip()) if odd else item}"
        found.append(part)
    return "".join(found)


def _text_in_quotes(text: str) -> str:
    """In double ones where the shell needs single ones around the word."""
    return f'"{text}"' if re.search(r"[$`!]", text) and not re.search(r"""["'\\]""", text) else quoted(text)


def _is_readable(word: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def presets(name: str) -> dict[str, list[str]]:
    """Groups of conf/ that a command can use (those its own conf file lists, and models), with their presets."""
    own = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    models = model_options(COMMANDS[name].config)
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(path for path in CONF.iterdir() if path.is_dir())
        if f"- {folder.name}:" in own or (folder.name == "model" and models)
    }
