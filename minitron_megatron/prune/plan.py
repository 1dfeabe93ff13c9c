"""The prune plan: a YAML file that a person can read and edit, and that repeats a pruning without scores.

model: sha256:…                 digest of the model it was made for
target: {num_layers: 30, hidden_size: 432, …}
layers: 0-29                    kept source layers (counted from 0)
hidden: 0-3 5 7-431             kept channels; `all` where the axis is kept whole
ffn: {0: 0-5 9 …, 1: …}         per source layer
kv_groups: all
q_heads: {0: {0: 0-2, 1: 0 2 3}, …}    per source layer and source group
digest: sha256:…                of the kept indices; not checked, so that the file can be edited
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from minitron_megatron.checkpoints.folder import load_yaml
from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.prune.select import TARGETS, Kept, target_shape

FILE = "plan.yaml"
ALL = "all"


def write_plan(file: Path, model_digest: str, target: ModelShape, kept: Kept) -> None:
    """Write a plan."""
    values = {
        "model": model_digest,
        "target": {name: getattr(target, name) for name in TARGETS},
        "digest": kept_digest(kept),
        "layers": ranges(kept.layers),
        "hidden": ALL if kept.hidden is None else ranges(kept.hidden),
        "ffn": _per_layer(kept.ffn, kept.layers),
        "kv_groups": _per_layer(kept.kv_groups, kept.layers),
        "q_heads": _per_layer(kept.q_heads, kept.layers),
    }
    file.write_text(yaml.safe_dump(values, sort_keys=False, width=120), encoding="utf-8")


def kept_digest(kept: Kept) -> str:
    """SHA-256 over the kept indices."""
    whole = hashlib.sha256()
    for axis in ("layers", "hidden", "ffn", "kv_groups", "q_heads"):
        chosen = getattr(kept, axis)
        whole.update(f"{axis}:".encode() + (b"all" if chosen is None else np.asarray(chosen, "<i8").tobytes()))
    return "sha256:" + whole.hexdigest()


def read_plan(file: Path, source: ModelShape, model_digest: str) -> tuple[ModelShape, Kept]:
    """Read and check a plan for a model. Raises UserError when it is for another model or does not make sense."""
    if not file.is_file():
        raise UserError(f"plan={file} does not exist: give the plan.yaml of a pruned model")
    values = load_yaml(file)
    names = {"model", "target", "digest", "layers", "hidden", "ffn", "kv_groups", "q_heads"}
    wrong = sorted(set(values) ^ names)
    if wrong:
        raise UserError(f"plan={file}: {wrong[0]} is {'missing' if wrong[0] in names else 'not a key of a plan'}")
    if values["model"] != model_digest:
        raise UserError(f"plan={file} was made for another model (digest differs)")
    if not isinstance(values["target"], dict) or set(values["target"]) != set(TARGETS):
        raise UserError(f"plan={file}: target must give {', '.join(TARGETS)}")
    if not all(type(size) is int for size in values["target"].values()):
        raise UserError(f"plan={file}: every size of target must be a whole number")
    target = target_shape(source, values["target"], [])
    read = _Reader(file, values)
    layers = read.indices("layers", values["layers"], source.num_layers, target.num_layers)
    n = source.num_layers
    per_group = source.num_query_groups
    kept = Kept(
        layers=layers,
        hidden=read.axis("hidden", source.hidden_size, target.hidden_size),
        ffn=read.per_layer("ffn", layers, n, source.ffn_hidden_size, target.ffn_hidden_size),
        kv_groups=read.per_layer("kv_groups", layers, n, source.num_query_groups, target.num_query_groups),
        q_heads=read.per_group(layers, n, per_group, source.heads_per_group, target.heads_per_group),
    )
    return target, kept


def ranges(indices: np.ndarray) -> str:
    """Ascending indices as text: `0-3 5 7-9`."""
    indices = np.asarray(indices)
    starts = np.flatnonzero(np.diff(indices, prepend=indices[0] - 2) != 1)
    ends = np.append(starts[1:], len(indices)) - 1
    pairs = zip(indices[starts].tolist(), indices[ends].tolist(), strict=True)
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def _per_layer(chosen: np.ndarray | None, layers: np.ndarray) -> Any:
    if chosen is None:
        return ALL
    if chosen.ndim == 3:
        return {int(i): {g: ranges(heads) for g, heads in enumerate(chosen[i])} for i in layers}
    return {int(i): ranges(chosen[i]) for i in layers}


class _Reader:
    """Turns a plan's text back into arrays, with errors that name the line's key."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file, self.values = file, values

    def indices(self, key: str, text: Any, length: int, count: int) -> np.ndarray:
        try:
            spans = [[int(n) for n in span.split("-")] for span in str(text).split()]
            if any(len(span) > 2 or max(span) >= 2**31 for span in spans):
                raise ValueError(text)
            if any(span[-1] >= length for span in spans):
                raise UserError(f"plan={self.file}: {key} must stay within 0 to {length - 1}")
            found = np.concatenate([np.arange(span[0], span[-1] + 1) for span in spans])
        except (ValueError, IndexError):
            raise UserError(f"plan={self.file}: {key} is not a list of indices such as '0-3 5 7-9'") from None
        if len(found) != count:
            raise UserError(f"plan={self.file}: {key} keeps {len(found)} indices, target says {count}")
        if (np.diff(found) <= 0).any() or found[0] < 0 or found[-1] >= length:
            raise UserError(f"plan={self.file}: {key} must be ascending, without repeats, from 0 to {length - 1}")
        return found

    def axis(self, key: str, length: int, count: int) -> np.ndarray | None:
        if self.values[key] == ALL:
            if count != length:
                raise UserError(f"plan={self.file}: {key} keeps all {length}, target says {count}")
            return None
        return self.indices(key, self.values[key], length, count)

    def _entry(self, key: str, entries: Any, name: int) -> Any:
        if not isinstance(entries, dict) or name not in entries:
            raise UserError(f"plan={self.file}: {key} has no entry {name}")
        return entries[name]

    def per_layer(self, key: str, layers: np.ndarray, n: int, length: int, count: int) -> np.ndarray | None:
        if self.values[key] == ALL:
            return self.axis(key, length, count)
        out = np.zeros((n, count), np.int64)
        for i in layers.tolist():
            out[i] = self.indices(f"{key}.{i}", self._entry(key, self.values[key], i), length, count)
        return out

    def per_group(self, layers: np.ndarray, n: int, groups: int, length: int, count: int) -> np.ndarray | None:
        if self.values["q_heads"] == ALL:
            return self.axis("q_heads", length, count)
        out = np.zeros((n, groups, count), np.int64)
        for i in layers.tolist():
            entry = self._entry("q_heads", self.values["q_heads"], i)
            for g in range(groups):
                text = self._entry(f"q_heads.{i}", entry, g)
                out[i, g] = self.indices(f"q_heads.{i}.{g}", text, length, count)
        return out
