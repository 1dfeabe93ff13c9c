"""The prune plan: a YAML file that a person can read and edit, and that repeats a pruning without scores.

model: sha256:…                 digest of the model it was made for
target: {num_layers: 30, hidden_size: 432, …}     ffn_hidden_size may be a list, one size a kept layer
digest: sha256:…                of what is kept; not checked, so that the file can be edited
layers: 0-29                    kept source layers (counted from 0)
hidden: 0-3 5 7-431             kept channels; `all` where the axis is kept whole
vocab: all                      kept token ids
ffn: {0: 0-5 9 …, 1: …}         kept neurons, per source layer
kv_groups: {0: 0 2, 1: 0+1 2+3, …}    kept groups, per source layer; 0+1 is the average of two
q_heads: {0: 0 1, 4 5}          kept query heads of each of these groups, counted over the whole layer
merged_heads: {0: 1<2 5<6}      residual head merging: head 1 becomes 2·head 1 − head 2; `none` without
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from minitron_megatron.checkpoints.folder import load_yaml
from minitron_megatron.config import PruneOptions
from minitron_megatron.errors import UserError
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.prune.select import TARGETS, Kept, target_shape

FILE = "plan.yaml"
ALL, NONE = "all", "none"
_KEYS = ("model", "target", "digest", "layers", "hidden", "vocab", "ffn", "kv_groups", "q_heads", "merged_heads")


def write_plan(file: Path, model_digest: str, target: ModelShape, kept: Kept) -> None:
    """Write a plan."""
    sizes = {name: getattr(target, name) for name in TARGETS}

    def per_layer(chosen: Any, text: Callable[[Any], str]) -> Any:
        return ALL if chosen is None else {i: text(chosen[i]) for i in kept.layers.tolist()}

    values = {
        "model": model_digest,
        "target": {name: list(size) if isinstance(size, tuple) else size for name, size in sizes.items()},
        "digest": kept_digest(kept),
        "layers": ranges(kept.layers),
        "hidden": ALL if kept.hidden is None else ranges(kept.hidden),
        "vocab": ALL if kept.vocab is None else ranges(kept.vocab),
        "ffn": per_layer(kept.ffn, ranges),
        "kv_groups": per_layer(kept.kv_groups, lambda groups: " ".join("+".join(map(str, g)) for g in groups.tolist())),
        "q_heads": per_layer(kept.heads, lambda groups: ", ".join(map(ranges, groups))),
        "merged_heads": NONE,
    }
    if kept.partners is not None:
        values["merged_heads"] = {i: _merged(kept.heads[i], kept.partners[i]) for i in kept.layers.tolist()}
    file.write_text(yaml.safe_dump(values, sort_keys=False, width=120), encoding="utf-8")


def _merged(heads: np.ndarray, partners: np.ndarray) -> str:
    pairs = zip(heads.reshape(-1).tolist(), partners.reshape(-1).tolist(), strict=True)
    return " ".join(f"{head}<{partner}" for head, partner in pairs if partner >= 0)


def kept_digest(kept: Kept) -> str:
    """SHA-256 over what is kept."""
    whole = hashlib.sha256()
    for axis in ("layers", "hidden", "vocab", "ffn", "kv_groups", "heads", "partners"):
        chosen = getattr(kept, axis)
        whole.update(f"{axis}:".encode())
        per_layer = chosen is not None and axis not in ("layers", "hidden", "vocab")
        for part in [chosen[i] for i in kept.layers.tolist()] if per_layer else [chosen]:
            whole.update(b"all" if part is None else np.asarray(part, "<i8").tobytes() + b";")
    return "sha256:" + whole.hexdigest()


def read_plan(file: Path, source: ModelShape, model_digest: str) -> tuple[ModelShape, Kept]:
    """Read and check a plan for a model. Raises UserError when it is for another model or does not make sense."""
    if not file.is_file():
        raise UserError(f"plan={file} does not exist: give the plan.yaml of a pruned model")
    values = load_yaml(file)
    wrong = sorted(set(values) ^ set(_KEYS), key=str)
    if wrong:
        raise UserError(f"plan={file}: {wrong[0]} is {'missing' if wrong[0] in _KEYS else 'not a key of a plan'}")
    if values["model"] != model_digest:
        raise UserError(f"plan={file} was made for another model (digest differs)")
    if not isinstance(values["target"], dict) or set(values["target"]) != set(TARGETS):
        raise UserError(f"plan={file}: target must give {', '.join(TARGETS)}")
    merging = isinstance(values["kv_groups"], dict) and any("+" in str(text) for text in values["kv_groups"].values())
    try:
        target = target_shape(source, values["target"], [], PruneOptions(groups="mean" if merging else "drop"))
    except UserError as error:
        raise UserError(f"plan={file}: {error}") from None
    return target, _Reader(file, values, source, target).kept()


def ranges(indices: np.ndarray) -> str:
    """Ascending indices as text: `0-3 5 7-9`."""
    indices = np.asarray(indices)
    starts = np.flatnonzero(np.diff(indices, prepend=indices[0] - 2) != 1)
    ends = np.append(starts[1:], len(indices)) - 1
    pairs = zip(indices[starts].tolist(), indices[ends].tolist(), strict=True)
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


class _Reader:
    """Turns a plan's text back into arrays, with errors that name the line's key."""

    def __init__(self, file: Path, values: Mapping[str, Any], source: ModelShape, target: ModelShape) -> None:
        self.file, self.values, self.source, self.target = file, values, source, target

    def kept(self) -> Kept:
        """Everything that stays."""
        source, target = self.source, self.target
        layers = self.indices("layers", self.values["layers"], source.num_layers, target.num_layers)
        groups = self.kv_groups(layers)
        heads = self.heads(layers, groups)
        if (groups is None) != (heads is None):
            raise self.error("kv_groups and q_heads go together: both all, or both by layer")
        return Kept(
            layers=layers,
            hidden=self.axis("hidden", source.hidden_size, target.hidden_size),
            vocab=self.axis("vocab", source.vocab_size, target.vocab_size),
            ffn=self.ffn(layers),
            kv_groups=groups,
            heads=heads,
            partners=self.partners(layers, heads),
        )

    def error(self, what: str) -> UserError:
        """What is wrong in this file."""
        return UserError(f"plan={self.file}: {what}")

    def indices(self, key: str, text: Any, length: int, count: int) -> np.ndarray:
        """Ascending indices below `length`, `count` of them."""
        try:
            spans = [[int(n) for n in span.split("-")] for span in str(text).split()]
            if any(len(span) > 2 or max(span) >= 2**31 for span in spans):
                raise ValueError(text)
            if any(span[-1] >= length for span in spans):
                raise self.error(f"{key} must stay within 0 to {length - 1}")
            found = np.concatenate([np.arange(span[0], span[-1] + 1) for span in spans])
        except (ValueError, IndexError):
            raise self.error(f"{key} is not a list of indices such as '0-3 5 7-9'") from None
        if len(found) != count:
            raise self.error(f"{key} keeps {len(found)} indices, target says {count}")
        if (np.diff(found) <= 0).any() or (count and (found[0] < 0 or found[-1] >= length)):
            raise self.error(f"{key} must be ascending, without repeats, from 0 to {length - 1}")
        return found

    def axis(self, key: str, length: int, count: int) -> np.ndarray | None:
        """An axis of the whole model."""
        if self.values[key] == ALL:
            if count != length:
                raise self.error(f"{key} keeps all {length}, target says {count}")
            return None
        return self.indices(key, self.values[key], length, count)

    def entry(self, key: str, layer: int) -> str:
        """A layer's text."""
        entries = self.values[key]
        if not isinstance(entries, dict) or layer not in entries:
            raise self.error(f"{key} has no entry {layer}")
        return str(entries[layer])

    def ffn(self, layers: np.ndarray) -> dict[int, np.ndarray] | None:
        """Neurons of each layer."""
        there = self.source.ffn_of_layers
        wanted = dict(zip(layers.tolist(), self.target.ffn_of_layers, strict=True))
        if self.values["ffn"] == ALL:
            cut = next((i for i, size in wanted.items() if size != there[i]), None)
            if cut is not None:
                raise self.error(f"ffn keeps all {there[cut]} of layer {cut}, target says {wanted[cut]}")
            return None
        return {i: self.indices(f"ffn.{i}", self.entry("ffn", i), there[i], size) for i, size in wanted.items()}

    def kv_groups(self, layers: np.ndarray) -> np.ndarray | None:
        """Groups of each layer, each one or the average of several."""
        count, whole = self.target.num_query_groups, self.source.num_query_groups
        if self.values["kv_groups"] == ALL:
            if count != whole:
                raise self.error(f"kv_groups keeps all {whole}, target says {count}")
            return None
        found = {}
        for i in layers.tolist():
            text = self.entry("kv_groups", i)
            # Without averages, ranges are allowed too.
            parts = text.split() if "+" in text else ranges_to_list(text)
            try:
                groups = [[int(g) for g in part.split("+")] for part in parts]
            except ValueError:
                raise self.error(f"kv_groups.{i} is not a list of groups such as '0 2' or '0+1 2+3'") from None
            flat = [g for group in groups for g in group]
            if len(groups) != count or len({len(g) for g in groups}) != 1:
                raise self.error(f"kv_groups.{i} must give {count} groups, each of as many source groups")
            if len(set(flat)) != len(flat) or not all(0 <= g < whole for g in flat):
                raise self.error(f"kv_groups.{i} must name groups from 0 to {whole - 1}, each once")
            if [min(g) for g in groups] != sorted(min(g) for g in groups):
                raise self.error(f"kv_groups.{i} must be ascending")
            found[i] = groups
        if len({len(groups[0]) for groups in found.values()}) != 1:
            raise self.error("kv_groups must average as many groups in every layer")
        return self.per_layer(found)

    def heads(self, layers: np.ndarray, groups: np.ndarray | None) -> np.ndarray | None:
        """Query heads of each group."""
        per_group, count = self.source.heads_per_group, self.target.heads_per_group
        if self.values["q_heads"] == ALL:
            if self.target.num_attention_heads != self.source.num_attention_heads:
                raise self.error(f"q_heads keeps all, target says {self.target.num_attention_heads}")
            return None
        if groups is None:
            raise self.error("kv_groups and q_heads go together: both all, or both by layer")
        found = {}
        for i in layers.tolist():
            texts = self.entry("q_heads", i).split(",")
            if len(texts) != len(groups[i]):
                raise self.error(
                    f"q_heads.{i} must give the heads of {len(groups[i])} groups, with commas between them"
                )
            found[i] = [self.indices(f"q_heads.{i}", t, self.source.num_attention_heads, count) for t in texts]
            for group, heads in zip(groups[i].tolist(), found[i], strict=True):
                stray = [h for h in heads.tolist() if h // per_group not in group]
                if stray:
                    raise self.error(f"q_heads.{i}: head {stray[0]} is not in group {'+'.join(map(str, group))}")
        return self.per_layer(found)

    def partners(self, layers: np.ndarray, heads: np.ndarray | None) -> np.ndarray | None:
        """For each kept head the one merged into it."""
        if self.values["merged_heads"] == NONE:
            return None
        if heads is None:
            raise self.error("merged_heads without q_heads: nothing is cut that could be merged")
        found = {}
        for i in layers.tolist():
            kept = heads[i].reshape(-1).tolist()
            try:
                pairs = {int(a): int(b) for a, b in (p.split("<") for p in self.entry("merged_heads", i).split())}
            except ValueError:
                raise self.error(f"merged_heads.{i} is not a list such as '1<2 5<6'") from None
            for head, partner in pairs.items():
                if head not in kept or partner in kept or not 0 <= partner < self.source.num_attention_heads:
                    raise self.error(
                        f"merged_heads.{i}: {head}<{partner} must merge a head that goes into one that stays"
                    )
            found[i] = [[pairs.get(h, -1) for h in group] for group in heads[i].tolist()]
        return self.per_layer(found)

    def per_layer(self, found: Mapping[int, Any]) -> np.ndarray:
        """An array over source layers; layers that go are zero."""
        first = np.asarray(next(iter(found.values())))
        out = np.zeros((self.source.num_layers, *first.shape), np.int64)
        for layer, values in found.items():
            out[layer] = values
        return out


def ranges_to_list(text: str) -> list[str]:
    """`0-2 5` as [0, 1, 2, 5], each as text; what is not a range stays as it is."""
    out = []
    for span in text.split():
        first, dash, last = span.partition("-")
        whole = dash and first.isdigit() and last.isdigit() and int(last) < 2**20
        out += [str(i) for i in range(int(first), int(last) + 1)] if whole else [span]
    return out
