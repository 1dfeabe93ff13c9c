"""Folders of a report without files: what their manifests, metrics and results say is given."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron_megatron.models.shape import ModelShape
from minitron_megatron.report.folders import RunFolder
from minitron_megatron.report.lineage import Lineage, trace


class Folder(RunFolder):
    """A folder that has read its files already."""

    def read_json(self, file: str) -> Any:
        return vars(self)["answers"][file]


def folder(
    name: str,
    *,
    answers: Mapping[str, Any] | None = None,
    shape: ModelShape | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
    starts: int | None = None,
    files: Sequence[str] = (),
    **manifest: Any,
) -> Folder:
    """A folder of this name; `manifest` goes over what each has, whose digest is `of NAME`."""
    own = {"command": "python launch/x.py", "digest": f"of {name}", "made": name, "files": [*files, *(answers or {})]}
    own |= {"inputs": {}, "config": {}, "results": {}, "processes": 1, "seconds": 10.0, "device": "cpu"}
    one = Folder(Path("/outputs", name), name, own | manifest)
    vars(one).update(answers=answers or {}, shape=shape, metrics=list(metrics), starts=starts)
    return one


def traced(*folders: Folder) -> Lineage:
    """Those folders and who was made from whom."""
    return trace(folders)
