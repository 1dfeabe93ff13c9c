"""The folder that `launch/search.py` writes, read again: which shapes it ranked, and how each is cut from the model."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitron_megatron.asked import STARTED_IN
from minitron_megatron.checkpoints.folder import load_yaml, read_manifest, read_output
from minitron_megatron.config import PruneOptions
from minitron_megatron.errors import UserError
from minitron_megatron.prune.named import CANDIDATES as FILE
from minitron_megatron.prune.named import TARGETS
from minitron_megatron.search.space import SIZES


def target_file(rank: int) -> str:
    """The target of a ranked shape, inside the folder."""
    return f"{TARGETS}/rank_{rank:02d}.yaml"


@dataclass(frozen=True)
class Source:
    """What the shapes are cut from, and how heads, groups and layers go."""

    model: str
    scores: str
    layers: str | None
    prune: PruneOptions

    def options(self, target: Mapping[str, int], layers_of_source: int) -> dict[str, Any]:
        """Options of launch/prune.py for a shape, without target and output."""
        given = {"model": self.model, "scores": self.scores}
        # A layer analysis says which layers go: without any that go, prune refuses it.
        if self.layers and target["num_layers"] < layers_of_source:
            given["layers"] = self.layers
        plain = asdict(PruneOptions())
        return given | {f"prune.{k}": v for k, v in asdict(self.prune).items() if v != plain[k]}


@dataclass(frozen=True)
class Ranked:
    """A ranked shape: its sizes as options of `target`, and what it was predicted to lose."""

    rank: int
    target: dict[str, int]
    predicted_loss: float

    @property
    def options(self) -> dict[str, int]:
        """Its sizes as options of launch/prune.py."""
        return {f"target.{name}": size for name, size in self.target.items()}


@dataclass(frozen=True)
class SearchFolder:
    """A whole search: where from, what was ranked, its digest, and those of what it was made from by name."""

    path: Path
    source: Source
    ranked: list[Ranked]
    digest: str
    inputs: dict[str, str]

    @property
    def model_digest(self) -> str:
        """Of the model that was searched."""
        return self.inputs["model"]

    def target(self, one: Ranked) -> Path:
        """The file that `target=` takes."""
        return self.path / target_file(one.rank)


def _place(search: Path, written: str, digest: str, manifest: Mapping[str, Any]) -> str:
    """Where an input of a search is: where it was, or as far from the search as it was, where all were moved together."""
    start = str(manifest.get(STARTED_IN, ""))
    then, output = (
        Path(os.path.abspath(os.path.join(start, one))) for one in (written, manifest["config"].get("output") or "")
    )
    along = Path(os.path.normpath(search.absolute() / os.path.relpath(then, output)))
    if _digest(Path(written)) == digest or _digest(along) != digest:
        return written
    return str(along.relative_to(Path.cwd()) if along.is_relative_to(Path.cwd()) else along)


def _digest(folder: Path) -> str | None:
    """The digest of an output, of a run that of its model; None where there is none."""
    for one in (folder, folder / "model"):
        with contextlib.suppress(UserError):
            return str(read_manifest(one)["digest"])
    return None


def read_search(path: Path | str) -> SearchFolder:
    """Read the output of launch/search.py. Raises UserError where it is missing, damaged or something else."""
    path, manifest = Path(path), read_output(Path(path), FILE, "search")
    try:
        config, listed = manifest["config"], load_yaml(path / FILE)["candidates"]
        ranked = [
            Ranked(int(one["rank"]), {name: int(one[name]) for name in SIZES}, float(one["predicted_loss"]))
            for one in listed
            if "rank" in one
        ]
        inputs = {name: str(manifest["inputs"][name]) for name in ("model", "scores")}
        inputs |= {"layers": str(manifest["inputs"]["layers"])} if config["layers"] else {}
        places = {"model": config["model"]["path"], "scores": config["scores"], "layers": config["layers"]}
        places |= {name: _place(path, places[name], inputs[name], manifest) for name in inputs}
        source = Source(**places, prune=PruneOptions(**config["prune"]))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is damaged ({reason}): run search again") from None
    missing = [one.rank for one in ranked if target_file(one.rank) not in manifest["files"]]
    if missing or not ranked:
        what = f"no {target_file(missing[0])}" if missing else "no ranked shape"
        raise UserError(f"{path} has {what}: run search again")
    return SearchFolder(path, source, ranked, manifest["digest"], inputs)
