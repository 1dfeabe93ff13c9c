"""Words that set no option: flags of Hydra's, which are kept, and what people type of habit, told how it is written here.

prune --model=x  ·  prune -o x  ·  prune model x  ·  prune --nproc-per-node 2  ·  prune --cfg job
"""

import difflib
from collections.abc import Iterable
from typing import NoReturn

from minitron_megatron.cli.arguments import is_override, presets
from minitron_megatron.cli.spelling import called
from minitron_megatron.cli.start_words import OF_TORCHRUN, nearest_start
from minitron_megatron.config import CommandConfig, free_options, model_options, options
from minitron_megatron.errors import UserError

# Hydra's flags with the words that may follow each: None for any one word.
_CFG = ("job", "hydra", "all")
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_OF_HYDRA: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("--help", "-h", "--hydra-help", "--resolve", "--run", "-r", "--multirun", "-m"), ()),
    **dict.fromkeys(("--shell-completion", "-sc"), ()),
    **dict.fromkeys(("--cfg", "-c"), _CFG),
    **dict.fromkeys(("--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"), None),
    "--experimental-rerun": None,
}
# Its value may be left out.
_INFORM = ("--info", "-i")


def check_flags(words: list[str], name: str, config_class: type[CommandConfig]) -> None:
    """Refuse what is neither an option nor a flag of Hydra's, with how it is written. Raises UserError."""
    left = list(words)
    before = ""
    while left:
        word = left.pop(0)
        flag, has_value, value = word.partition("=")
        if is_override(word) or word == "--" or word.startswith("~"):
            pass
        elif flag in _INFORM:
            if not has_value and left[:1] and left[0] in _INFO:
                left.pop(0)
        elif flag in _OF_HYDRA:
            _take_value(flag, value if has_value else None, left)
        elif before.endswith("=") and not word.startswith("-"):
            raise UserError(f"{before} {word} has a blank in it: write {before}{word}")
        else:
            _refuse(word, left, name, config_class)
        before = word


def _take_value(flag: str, value: str | None, left: list[str]) -> None:
    wanted = _OF_HYDRA[flag]
    if wanted == ():
        return
    value = left.pop(0) if value is None and left else value
    if value is None or (wanted and value not in wanted):
        what = f"one of {', '.join(wanted)}, as in {flag} {wanted[0]}" if wanted else "a word after it"
        raise UserError(f"{flag} needs {what}")


def _refuse(word: str, left: list[str], name: str, config_class: type[CommandConfig]) -> NoReturn:
    """Say how a word is written that sets no option; `left` are the words after it."""
    dashes = word.startswith("-")
    typed, has_value, value = word.lstrip("-+").partition("=")
    kinds = _kinds(name, config_class)
    key = typed.replace("-", "_") if dashes else typed
    if not has_value:
        value = _value_after(left) or ("true" if kinds.get(key) == "bool" else "…")
    if key in kinds or key.partition(".")[0] in free_options(config_class):
        how = f"{word}: options have no dashes" if dashes else f"{key} is an option"
        raise UserError(f"{how}: write {key}={value}")
    if word.startswith("--") and (start := nearest_start(word)):
        says = f"{start} 2 {name}" if OF_TORCHRUN[start] else f"{start} {name}"
        raise UserError(f"{word} is no option of {called(name)}: several processes are started as minitron {says} …")
    near = difflib.get_close_matches(key, kinds, n=1)
    hint = f"did you mean {near[0]}={value}? " if near else ""
    without = ", without dashes" if dashes else ""
    raise UserError(
        f"{word or repr(word)} is no option of {called(name)}: {hint}options are written name=value{without}; --help lists all"
    )


def _kinds(name: str, config_class: type[CommandConfig]) -> dict[str, str]:
    """What each option takes, by its name; models and presets, which may be given in its place, too."""
    others: Iterable[str] = [*presets(name), *model_options(config_class)]
    return {**dict.fromkeys(others, "str"), **{o.name: o.type for o in options(config_class)}}


def _value_after(left: list[str]) -> str | None:
    """The value that follows in words of its own, as in `model x`, `model = x` and `model =x`."""
    words = left[1:] if left[:1] == ["="] else left
    value = words[0].removeprefix("=") if words else ""
    return None if not value or "=" in value or value.startswith("-") else value
