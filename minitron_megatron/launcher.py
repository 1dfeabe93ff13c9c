"""From a command line to a checked config and one clear line when something is wrong: what cli/main.py calls.

Hydra composes the config out of conf/, the dataclasses and the command line. `model=FOLDER` and `model=PRESET` are told
apart here. How a command ends when something is wrong: ending.py.
"""

import difflib
import logging
import os
import re
import shlex
import sys
import warnings
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from minitron_megatron.cli.commands import COMMANDS, Command
from minitron_megatron.config import (
    MODEL_OPTIONS,
    REQUIRED,
    CommandConfig,
    Option,
    check,
    free_options,
    model_options,
    options,
)
from minitron_megatron.console import console, speaks, write_anywhere
from minitron_megatron.effects import typed
from minitron_megatron.errors import UserError
from minitron_megatron.idle import adapted_defaults, given_options, idle_options
from minitron_megatron.lengths import settle_lengths
from minitron_megatron.plain_text import escaped
from minitron_megatron.preset_files import is_preset_file, naming_files, words_of_file
from minitron_megatron.words import PLAIN_VALUE, quoted

log = logging.getLogger(__name__)
# The command as it was typed; sys.argv is Hydra's later on.
TYPED = list(sys.argv)
# In the repository a link to its conf/; a package has the folder itself.
CONF = Path(__file__).resolve().parent / "conf"
# The repository, where its launch/ is beside the package.
ROOT = CONF.parent.parent
# Chatter of the libraries that says nothing to a user of these commands.
_HARMLESS = (
    ".*[Aa]pex is not installed.*",
    ".*absl.logging is not installed.*",
    ".*[Tt]ransformer.?[Ee]ngine.*",
    ".*GPTModel IS DEPRECATED.*",
    ".*cuda.*not available.*",
    ".*CUDA is not available.*",
    ".*_all_gather_base.*",
    ".*_reduce_scatter_base.*",
    ".*torch.distributed.reduce_op.*",
    ".*TypedStorage is deprecated.*",
    ".*no current CUDA stream.*",
    ".*ShardedTensor.*deprecated.*",
    ".*CPU random generator seem to be failing.*",
    ".*using the device under current context.*",
    ".*torch.distributed is disabled, unavailable or uninitialized.*",
    ".*full scope is deprecated.*",
    ".*argument order of load has been changed.*",
    ".*deprecating ShardedTensor.*",
    ".*invalid escape sequence.*",
    ".*grad attribute of a Tensor that is not a leaf.*",
    ".*is experimental and still under active development.*",
)


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
            show_help(name, config_class)
        return
    _quiet()
    # Python puts a script's folder first, where evaluate.py would stand for Hugging Face's package of that name.
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != ROOT / "launch"]
    check_words(arguments, name, config_class)
    words, files = with_preset_files(arguments, name, config_class)
    with naming_files(files):
        _hydra(entry, [_rewrite(word, config_class) for word in words], only_check, typed_options(arguments))


def typed_options(words: list[str]) -> frozenset[str]:
    """Names of the options that words set."""
    return frozenset(word.lstrip("+").partition("=")[0] for word in words if _is_override(word))


def _hydra(entry: Command, words: list[str], only_check: bool, given: frozenset[str]) -> None:
    """Have Hydra compose the config, and run the command with it; Hydra's own complaints become one line.

    `given` are the options that were typed.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name=f"{entry.name}_options", node=entry.config)
    flags = [word for word in words if not _is_override(word)]
    try:
        if flags or any(_is_for_hydra(word) for word in words):
            _hydras_main(entry, flags, [word for word in words if _is_override(word)], given)
            return
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            _run(entry, hydra.compose(config_name=entry.name, overrides=words), given, only_check)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from None


def _run(entry: Command, composed: Any, given: frozenset[str], only_check: bool = False) -> None:
    """Check a composed config, run the command with it, and say what comes next."""
    config = _checked(composed, entry.name, entry.config)
    if isinstance(config, CommandConfig):
        check_processes(config)
    _check_place(entry.name, config)
    given = given_options(config, given)
    settled = settle_lengths(config)
    idle = idle_options(config, given, called(entry.name))
    _logging()
    if only_check:
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
    """Raise UserError where a command's output cannot be made: before anything heavy is imported."""
    if not isinstance(output := getattr(config, "output", None), str):
        return
    from minitron_megatron.checkpoints.folder import check_place

    place = Path(output)
    if name == "report" and place.suffix in (".html", ".md"):
        place = place.parent
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

    # The working directory stays, and no folders or log files of Hydra's appear in it.
    own = [
        "hydra.run.dir=.",
        "hydra.sweep.dir=.",
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
    """The checked config that launch/NAME.py would get from these words; for use within another command.

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
            composed = hydra.compose(config_name=name, overrides=[_rewrite(word, config_class) for word in words])
            config = _checked(composed, name, config_class)
            given = given_options(config, typed_options(words))
            settle_lengths(config)
            for line in idle_options(config, given, name):
                _say_once(f"{name}: {line}")
            return config
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error)) from None


@cache
def _say_once(line: str) -> None:
    """Stages are composed more than once."""
    log.info("%s", line)


def _checked(composed: Any, name: str, config_class: type[CommandConfig]) -> Any:
    """The config as a dataclass, every value checked on its own."""
    from omegaconf import OmegaConf

    _check_required(composed, name, config_class)
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


def _check_required(composed: Any, name: str, config_class: type[CommandConfig]) -> None:
    from omegaconf import OmegaConf

    def is_missing(option: str) -> bool:
        node, _, key = option.rpartition(".")
        return OmegaConf.is_missing(OmegaConf.select(composed, node) if node else composed, key)

    missing = [o for o in options(config_class) if is_missing(o.name)]
    if missing:
        what = ", ".join(f"{o.name}=… ({o.doc})" for o in missing)
        raise UserError(f"{called(name)} needs {what}")


def _is_override(word: str) -> bool:
    """Whether a word sets an option, rather than being one of Hydra's flags or a flag's value (`--cfg job`)."""
    return "=" in word and not word.startswith("-")


def _is_for_hydra(word: str) -> bool:
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
        if not _is_override(word) or _is_for_hydra(word):
            continue
        key, _, value = word.lstrip("+").partition("=")
        if (
            "${" in value
            and not {"-m", "--multirun"} & set(words)
            and (key in models or _takes_text(key, config_class))
        ):
            raise UserError(f"{word} has an interpolation (${{…}}), which is only for -m: write the value")
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
            raise UserError(f"unknown option {key!r} of {called(name)}: {hint}(--help lists all)")


def _check_preset(group: str, value: str, names: list[str]) -> None:
    wrong = [v for v in value.split(",") if v not in names and not value.startswith(("{", "["))]
    if wrong:
        near = difflib.get_close_matches(wrong[0], names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(names)}"
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
        if not _is_override(word) or key not in groups or not is_preset_file(value):
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


def _rewrite(word: str, config_class: type[CommandConfig]) -> str:
    """`model=outputs/x` sets model.path, `model=PRESET` takes conf/model/PRESET.yaml; odd characters are quoted."""
    if not _is_override(word):
        return word
    key, _, value = word.lstrip("+").partition("=")
    if not value:
        return f"{key}=''"
    if value == "~" or value.startswith("~/"):
        value = os.path.expanduser(value)
    if key in model_options(config_class):
        if (CONF / "model" / f"{value}.yaml").is_file():
            return f"{group_of(key)}={value}"
        key = f"{key}.path"
    if key.partition(".")[0] in free_options(config_class):
        return f"++{key}={value}"
    if _takes_text(key, config_class) and not PLAIN_VALUE.fullmatch(value) and value[0] not in "'\"[{$":
        value = quoted(value)
    return f"{key}={value}"


def group_of(model_option: str) -> str:
    """The config group that an option such as `teacher` takes presets from, as each command's conf file lists it."""
    return "model" if model_option == "model" else f"model@{model_option}"


def words_after_dashes(words: list[str], option: str) -> list[str]:
    """Words after `--` as the list that is the value of one option: nothing in them needs quotes of Hydra's."""
    if "--" not in words:
        return words
    own, after = words[: words.index("--")], words[words.index("--") + 1 :]
    return [*own, f"{option}=[{','.join(map(quoted, after))}]"]


def words_that_stand_alone(words: list[str], option: str) -> list[str]:
    """Words that are neither options nor flags as the value of one option."""
    alone = [
        word for word in words if not word.startswith("-") and not (_is_override(word) and not Path(word).exists())
    ]
    if not alone:
        return words
    value = alone[0] if len(alone) == 1 else f"[{','.join(map(quoted, alone))}]"
    return [*(word for word in words if word not in alone), f"{option}={value}"]


def _takes_text(key: str, config_class: type[CommandConfig]) -> bool:
    found = next((o for o in options(config_class) if o.name == key.lstrip("+~")), None)
    return found is not None and ("str" in found.type or found.type == "Any")


def explain(error: Exception) -> str:
    """One line for a complaint of Hydra or OmegaConf."""
    from hydra.errors import OverrideParseException

    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read ({_first_line(error)}): put quotes around odd characters"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    """What is wrong, by the innermost cause, with the option's full name."""
    cause = error.__cause__ if error.__cause__ is not None else error
    lines = [line.strip() for line in f"{cause}\n{error}".splitlines() if line.strip()]
    key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    if needed := re.fullmatch(r"field '(.+)' is not Optional", lines[0]):
        return f"{key or needed[1]}=null: it needs a value; leave it out for its default"
    return f"{key}: {lines[0]}" if key and key not in lines[0] else lines[0]


def show_help(name: str, config_class: type[CommandConfig]) -> None:
    """Print every option with its type, default and line of documentation, and the presets."""
    from rich.table import Table

    screen = console()
    screen.print(f"{called(name)}: {(config_class.__doc__ or '').strip()}\n", highlight=False)
    python = "python " * called(name).endswith(".py")
    screen.print(f"  {python}{called(name)} {example(config_class)}", highlight=False, soft_wrap=True)
    screen.print(f"  minitron --nproc-per-node 2 {name} …\n", highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("option", "type", "default", ""):
        table.add_column(column, overflow="fold", style="bold" if column == "option" else "")
    for o in _shown(config_class):
        default = "required" if o.default == REQUIRED else "" if o.default is None else str(o.default)
        words = f" [{', '.join(map(typed, o.choices))}]" if o.choices else ""
        table.add_row(o.name, o.type.replace(" | None", ""), default, o.doc + words)
    screen.print(table)
    for kind, names in presets(name).items():
        screen.print(
            f"\n{kind}=PRESET or FILE.yaml: {', '.join(names)}",
            highlight=False,
            soft_wrap=True,
        )
    screen.print("\nHydra's own flags work too: --cfg job shows the composed config, -m runs several.", highlight=False)


def _shown(config_class: type[CommandConfig]) -> list[Option]:
    """The options for people: a model is one option there, its sizes come by preset."""
    shown = []
    for o in options(config_class):
        first, dot, last = o.name.partition(".")
        if dot and first in model_options(config_class):
            if last == "path":
                doc = config_class.__dataclass_fields__[first].metadata["doc"]
                if doc:
                    shown.append(Option(first, "str", None, doc, ()))
                else:
                    doc = "model folder, or a preset where weights are not needed"
                    shown.insert(0, Option(first, "str", REQUIRED, doc, ()))
            elif last == "engine":
                shown.append(o)
            continue
        shown.append(o)
    return shown


def presets(name: str) -> dict[str, list[str]]:
    """Groups of conf/ that a command can use (those its own conf file lists, and models), with their presets."""
    own = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    models = model_options(COMMANDS[name].config)
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(path for path in CONF.iterdir() if path.is_dir())
        if f"- {folder.name}:" in own or (folder.name == "model" and models)
    }


def example(config_class: type[CommandConfig]) -> str:
    """A command line with every required option."""
    words = [f"{o.name}=…" for o in _shown(config_class) if o.default == REQUIRED]
    return " ".join(words)


def called(name: str) -> str:
    """What a command is called where this one was started: launch/NAME.py, or minitron NAME."""
    return f"minitron {name}" if TYPED[0].startswith("minitron ") else f"launch/{name}.py"


def command_line() -> str:
    """The command as it was typed, for manifests."""
    program = TYPED[0].split(" ") if TYPED[0].startswith("minitron ") else ["python", TYPED[0]]
    return shlex.join([*program, *TYPED[1:]])


def resolved_config(config: CommandConfig) -> dict[str, Any]:
    """Plain values of every option, for manifests."""
    return asdict(config)


def _quiet() -> None:
    # Progress is shown by one bar of our own (console.py); read when tqdm is first imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    for library in (
        "megatron.core.models.gpt.gpt_model",
        "megatron.core.utils",
        "megatron.core.distributed.distributed_data_parallel",
        "megatron.core.dist_checkpointing.strategies.torch",
        "torch.utils.cpp_extension",
        # Without a home that can be written it makes itself a folder, and says so in six lines.
        "matplotlib",
    ):
        logging.getLogger(library).setLevel(logging.ERROR)


class _PlainLines(logging.Formatter):
    """What is logged, as text."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


def _logging() -> None:
    """Lines of the program by rich from rank 0; warnings and errors from the others."""
    from rich.logging import RichHandler

    handler = RichHandler(console=console(), show_path=False, show_level=False, log_time_format="%H:%M:%S")
    handler.setFormatter(_PlainLines("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("minitron_megatron").setLevel(logging.INFO if speaks() else logging.WARNING)
    # Hydra's own set-up silences every logger that was there before it.
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("minitron_megatron") and isinstance(logger, logging.Logger):
            logger.disabled = False
