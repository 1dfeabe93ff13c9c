"""Every file that tasks of lm-evaluation-harness read which are files themselves, as inputs of what is made with them.

    task.yaml ── include: base.yaml ── dataset_path: /a/folder              every file in it
              ├─ task: [part.yaml, …]
              ├─ process_docs: !function utils.f                            utils.py, and the other programs beside it
              └─ dataset_kwargs: {data_files: {test: parts/*.jsonl}}        what the pattern finds

Nothing is built or run of what a task file says. Tasks that come with the harness go by their names, and are not looked into.
"""

import contextlib
import glob
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import yaml

from minitron_megatron.checkpoints.stamps import file_stamps, stamp_of_folder
from minitron_megatron.errors import UserError

# A path has fewer characters.
_LONGEST_PATH = 250
# A task file is smaller, in bytes; what is larger and is named by one is data.
_LARGEST_TASK = 2**20
# Files that a task may read: more are a disk that it names by mistake.
_MOST_FILES = 10_000
# Keys below which a path may be a folder or a pattern.
_OF_DATA = ("dataset_path", "dataset_kwargs")
_TASK_FILES = (".yaml", ".yml")
# Keys whose files are task files, whatever their names end with.
_OF_TASKS = ("include", "task")


def task_stamps(names: Iterable[str]) -> dict[str, str]:
    """Stamps of the task files among some names, and of all that they read, as inputs. Raises UserError for a whole disk."""
    tasks = [Path(name) for name in names if Path(name).is_file()]
    # By what they are, since several paths may lead to each: a task that includes itself would have paths without end.
    found = {path.resolve(): path for path in tasks}
    while tasks:
        task = tasks.pop()
        for path, is_task in _named_in(task):
            if found.setdefault(path.resolve(), path) is path and is_task:
                tasks.append(path)
        _check_bound(len(found), task)
    stamps = file_stamps(Path(), (path for path in found.values() if path.is_file()))
    for folder in (path for path in found.values() if path.is_dir()):
        files = [path for path in islice(folder.rglob("*"), _MOST_FILES + 1) if path.is_file()]
        _check_bound(len(files), folder)
        stamps |= stamp_of_folder(str(folder), folder, files)
    return stamps


def _check_bound(count: int, where: Path) -> None:
    if count > _MOST_FILES:
        raise UserError(f"tasks=: {where} names more than {_MOST_FILES:,} files: name those that the task reads")


def _named_in(task: Path) -> Iterator[tuple[Path, bool]]:
    """Files and folders that stand in a task file, and whether they are task files themselves."""
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        if task.stat().st_size > _LARGEST_TASK:
            return
        for key, node in _scalars(yaml.compose(task.read_text(encoding="utf-8"), yaml.SafeLoader)):
            if node.tag == "!function":
                module = task.parent / f"{node.value.rpartition('.')[0].replace('.', '/')}.py"
                # A program may import those beside it.
                yield from ((path, False) for path in islice(module.parent.glob("*.py"), _MOST_FILES + 1))
            elif len(node.value) < _LONGEST_PATH and "\0" not in node.value:
                for path in (Path(node.value), task.parent / node.value):
                    yield from _meant(key, path)


def _meant(key: str, path: Path) -> Iterator[tuple[Path, bool]]:
    """What a path below a key of a task file is: a file, or of data a folder or a pattern, too."""
    if path.is_file():
        yield path, key in _OF_TASKS or path.suffix in _TASK_FILES
    elif key in _OF_DATA and path.name and path.is_dir():
        yield path, False
    elif key in _OF_DATA and glob.has_magic(str(path)):
        for found in islice(glob.iglob(str(path), recursive=True), _MOST_FILES + 1):
            if Path(found).is_file():
                yield Path(found), False


def _scalars(root: yaml.Node | None) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Every plain value of a document, once, with the outermost of _OF_DATA, or else the nearest key, that it stands below."""
    todo: list[tuple[str, yaml.Node | None]] = [("", root)]
    seen: set[int] = set()
    while todo:
        key, node = todo.pop()
        if isinstance(node, yaml.ScalarNode):
            yield key, node
        elif node is not None and id(node) not in seen:
            seen.add(id(node))
            if isinstance(node, yaml.SequenceNode):
                todo += [(key, one) for one in node.value]
            else:
                todo += [(key if key in _OF_DATA else str(name.value), one) for name, one in node.value]
