"""From a command line to a checked config and one clear line when something is wrong: what cli/main.py calls.

Hydra composes the config out of conf/, the dataclasses and the command line (cli/arguments.py). How a command ends when something
is wrong: ending.py.
"""

import logging
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from minitron_megatron import __version__
from minitron_megatron.cli.arguments import (
    CONF,
    KINDS,
    as_override,
    check_words,
    explain_unreadable,
    is_for_hydra,
    is_override,
    with_preset_files,
    words_after_dashes,
    words_that_stand_alone,
)
from minitron_megatron.cli.commands import COMMANDS, Command
from minitron_megatron.cli.flags import check_flags
from minitron_megatron.cli.logs import be_quiet, left_unsaid, start_logging
from minitron_megatron.cli.spelling import called
from minitron_megatron.config import CommandConfig, check, flat, options
from minitron_megatron.console import speaks, write_anywhere
from minitron_megatron.effects import Need
from minitron_megatron.errors import UserError, of_folders
from minitron_megatron.idle import adapted_defaults, given_options, idle_options
from minitron_megatron.lengths import settle_lengths
from minitron_megatron.preset_files import naming_files
from minitron_megatron.words import quoted

log = logging.getLogger(__name__)
# The repository, where its launch/ is beside the package.
ROOT = CONF.parent.parent


def command(entry: Command, *, only_check: bool = False) -> None:
    """Compose a command's config from sys.argv, check it, and do the work unless `only_check`. Raises UserError."""
    name, config_class = entry.name, entry.config
    write_anywhere()
    arguments = sys.argv[1:]
    if entry.after_dashes:
        arguments = words_after_dashes(arguments, entry.after_dashes)
    if entry.bare:
        arguments = words_that_stand_alone(arguments, entry.bare)
    if "--help" in arguments or "-h" in arguments:
        if speaks():
            from minitron_megatron.cli.help import show_help

            show_help(name, config_class)
        return
    if "--version" in arguments:
        if speaks():
            print(__version__)
        return
    be_quiet()
    # Python puts a script's folder first, where evaluate.py would stand for Hugging Face's package of that name.
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != ROOT / "launch"]
    check_flags(arguments, name, config_class)
    check_words(arguments, name, config_class)
    words, files = with_preset_files(arguments, name, config_class)
    with naming_files(files):
        _hydra(entry, [as_override(word, config_class) for word in words], only_check, typed_options(arguments))


def typed_options(words: list[str]) -> frozenset[str]:
    """Names of the options that words set."""
    return frozenset(word.lstrip("+").partition("=")[0] for word in words if is_override(word))


def _hydra(entry: Command, words: list[str], only_check: bool, given: frozenset[str]) -> None:
    """Have Hydra compose the config, and run the command with it; Hydra's own complaints become one line.

    `given` are the options that were typed.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name=f"{entry.name}_options", node=entry.config)
    flags = [word for word in words if not is_override(word)]
    try:
        if flags or any(is_for_hydra(word) for word in words):
            if only_check:
                return
            _hydras_main(entry, flags, [word for word in words if is_override(word)], given)
            return
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            _run(entry, hydra.compose(config_name=entry.name, overrides=words), given, only_check)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, entry.config)) from None


def _run(entry: Command, composed: Any, given: frozenset[str], only_check: bool = False) -> None:
    """Check a composed config, run the command with it, and say what comes next."""
    lacking = _lacking(composed, entry.config)
    config = _checked(composed, entry.name, entry.config, [need.told for need in lacking])
    if any(need.always for need in lacking):
        raise UserError(f"{called(entry.name)} needs {'; '.join(need.told for need in lacking)}")
    if isinstance(config, CommandConfig):
        check_processes(config)
    with of_folders():
        _check_place(entry.name, config)
        given = given_options(config, given)
        settled = settle_lengths(config)
    idle = idle_options(config, given, called(entry.name))
    start_logging()
    if only_check:
        with of_folders(), left_unsaid():
            entry.only_check(config)
        return
    for line in [*idle, *([settled] if settled else []), *adapted_defaults(config)]:
        log.info("%s", line)
    entry(config)
    if isinstance(config, CommandConfig):
        # Not before: mistakes are said sooner without it.
        from minitron_megatron.cli.next_command import show_next

        show_next(entry.name, config)


def _check_place(name: str, config: Any) -> None:
    """Raise UserError where a command's output cannot be made: before anything heavy is imported.

    From here on `output` is the folder that was meant: where it is a link, the one that it leads to.
    """
    if not isinstance(output := getattr(config, "output", None), str):
        return
    from minitron_megatron.checkpoints.folder import check_place
    from minitron_megatron.checkpoints.places import place_of

    place = Path(output)
    if name == "report" and place.suffix in (".html", ".md"):
        place = place.parent
    elif (meant := place_of(place)) != place:
        place = meant
        config.output = str(meant)
    check_place(place, try_it=speaks() and not getattr(config, "dry_run", False))


def _hydras_main(entry: Command, flags: list[str], words: list[str], given: frozenset[str]) -> None:
    """Hydra's own way of starting, which knows its flags; it composes the config twice."""
    import hydra
    from omegaconf.errors import OmegaConfBaseException

    stopped: list[BaseException] = []

    def run(composed: Any) -> None:
        # What goes through Hydra gets lines of its own added: carry it past.
        try:
            _run(entry, composed, given)
        except OmegaConfBaseException as error:
            stopped.append(UserError(_first_line(error)))
        except SystemExit:
            raise
        except BaseException as error:
            stopped.append(error)

    # The working directory stays, and no folders or log files of Hydra's appear in it: what -m writes of itself goes elsewhere.
    with tempfile.TemporaryDirectory() as away:
        own = [
            "hydra.run.dir=.",
            f"hydra.sweep.dir={quoted(away)}",
            "hydra.sweep.subdir=.",
            "hydra.output_subdir=null",
            "hydra/job_logging=disabled",
            "hydra/hydra_logging=disabled",
        ]
        sys.argv = [sys.argv[0], *flags, *words, *own]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # the exceptions themselves, not Hydra's own way of exiting
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=entry.name)(run)()
    if stopped:
        raise stopped[0]


def compose(name: str, words: list[str]) -> Any:
    """The checked config that a command would get from these words; for use within another command.

    Raises UserError as that command would.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    config_class = COMMANDS[name].config
    check_words(words, name, config_class)
    words, files = with_preset_files(words, name, config_class)
    ConfigStore.instance().store(name=f"{name}_options", node=config_class)
    with naming_files(files):
        try:
            composed = hydra.compose(config_name=name, overrides=[as_override(word, config_class) for word in words])
            config = _checked(composed, name, config_class)
            given = given_options(config, typed_options(words))
            settle_lengths(config)
            for line in idle_options(config, given, name):
                _say_once(f"{name}: {line}")
            return config
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error, config_class)) from None


@cache
def _say_once(line: str) -> None:
    """Stages are composed more than once."""
    log.info("%s", line)


def _checked(composed: Any, name: str, config_class: type[CommandConfig], lacking: Sequence[str] = ()) -> Any:
    """The config as a dataclass, every value checked on its own; `lacking` is told where a required option lacks too."""
    from omegaconf import OmegaConf

    if missing := _missing(composed, config_class):
        raise UserError(f"{called(name)} needs {'; '.join([*lacking, *missing])}")
    config = OmegaConf.to_object(composed)
    check(config)
    return config


def check_processes(config: CommandConfig) -> None:
    """Raise UserError when the job has other processes than parallel.world_size says; a dry run may plan for any number."""
    planned, started = config.parallel.world_size, os.environ.get("WORLD_SIZE")
    if planned is None or planned == int(started or 1) or (config.dry_run and started is None):
        return
    raise UserError(
        f"parallel.world_size={planned}, but {started or 1} {'were' if started else 'was'} started: leave it out, start as "
        "many with torchrun, or plan with dry_run=true and without torchrun"
    )


def _lacking(composed: Any, config_class: type[CommandConfig]) -> list[Need]:
    """What a command needs and was not given, its required options aside."""
    from omegaconf import OmegaConf

    defaults = {o.name: o.default for o in options(config_class)}

    def is_given(option: str) -> bool:
        value = OmegaConf.select(composed, option)
        values = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        return any(one not in (None, defaults.get(name)) for name, one in flat({option: values}).items())

    return [need for need in getattr(config_class, "needs", ()) if not any(map(is_given, need.names))]


def _missing(composed: Any, config_class: type[CommandConfig]) -> list[str]:
    """Required options that are not given, as they are told."""
    from omegaconf import OmegaConf

    def is_missing(option: str) -> bool:
        node, _, key = option.rpartition(".")
        return OmegaConf.is_missing(OmegaConf.select(composed, node) if node else composed, key)

    return [f"{o.name}=… ({o.doc})" for o in options(config_class) if is_missing(o.name)]


# OmegaConf's names of what an option takes.
_KINDS = {"Integer": KINDS["int"], "Float": KINDS["float"], "Boolean": KINDS["bool"], "bool": KINDS["bool"]}


def explain(error: Exception, config_class: type[CommandConfig] = CommandConfig) -> str:
    """One line for a complaint of Hydra or OmegaConf about options of `config_class`."""
    from hydra.errors import OverrideParseException

    if isinstance(error, OverrideParseException):
        return explain_unreadable(str(error.override), config_class)
    return _first_line(error)


def _first_line(error: Exception) -> str:
    """What is wrong, by the innermost cause, with the option's full name."""
    cause = error.__cause__ if error.__cause__ is not None else error
    lines = [line.strip() for line in f"{cause}\n{error}".splitlines() if line.strip()]
    key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    if needed := re.fullmatch(r"field '(.+)' is not Optional", lines[0]):
        return f"{key or needed[1]}=null: it needs a value; leave it out for its default"
    if odd := re.fullmatch(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+).*", lines[0]):
        return f"{key}={odd[1]} must be {_KINDS.get(odd[2], odd[2])}"
    if lines[0].endswith("is not a ListConfig, list or tuple."):
        return f"{key} must be a list, as {key}=[…,…]"
    return f"{key}: {lines[0]}" if key and key not in lines[0] else lines[0]


def resolved_config(config: CommandConfig) -> dict[str, Any]:
    """Plain values of every option, for manifests."""
    return asdict(config)
