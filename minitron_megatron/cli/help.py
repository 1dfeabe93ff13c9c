"""What `--help` shows of a command: every option with its type, default and line of documentation, and the presets."""

from minitron_megatron.cli.arguments import presets
from minitron_megatron.cli.spelling import called, line_of
from minitron_megatron.config import REQUIRED, CommandConfig, Option, model_options, options
from minitron_megatron.console import console
from minitron_megatron.effects import typed

# Columns where there is no terminal: help is read, tables of results are searched.
_WIDTH = 100


def show_help(name: str, config_class: type[CommandConfig]) -> None:
    """Print every option with its type, default and line of documentation, and the presets."""
    from rich.table import Table

    screen = console(_WIDTH)
    screen.print(f"{called(name)}: {(config_class.__doc__ or '').strip()}\n", highlight=False)
    for line in (f"{line_of(name)} {example(config_class)}", f"{line_of(name, processes=2)} …\n"):
        screen.print(f"  {line}", highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("option", "type", "default", ""):
        # Names stay whole, whatever is left for the rest.
        whole = column == "option"
        table.add_column(column, overflow="fold", style="bold" if whole else "", no_wrap=whole)
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


def example(config_class: type[CommandConfig]) -> str:
    """A command line with every required option."""
    words = [f"{o.name}=…" for o in _shown(config_class) if o.default == REQUIRED]
    return " ".join(words)
