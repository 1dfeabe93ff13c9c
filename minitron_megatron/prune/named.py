"""A target that prune was given by the file of a search, `target=found/targets/rank_01.yaml`: is it still what was ranked?

The file may have been edited, and options of the command line go over it. What was predicted is of the shape that is listed in
candidates.yaml, so that one is compared, and the manifest says which search it was and which sizes are others.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import MANIFEST, load_yaml
from minitron_megatron.errors import UserError

log = logging.getLogger(__name__)
# In the folder of a search: what it ranked, and the folder of its targets.
CANDIDATES, TARGETS = "candidates.yaml", "targets"
_RANK = re.compile(r"rank_(\d+)\.yaml")


@dataclass(frozen=True)
class Named:
    """A ranked shape that prune was given by its file: the digest of the search, and sizes that are others now, [ranked, now]."""

    file: str
    rank: int
    search: str
    others: dict[str, list[Any]]

    def say(self) -> None:
        """Warn where it is no longer what the search ranked."""
        if self.others:
            said = ", ".join(f"{name}={now}, not {ranked}" for name, (ranked, now) in self.others.items())
            log.warning(
                "target=%s is not what the search ranked %d (%s): edited since, or an option goes over it; what was predicted is "
                "of the ranked one",
                self.file,
                self.rank,
                said,
            )


def named_target(words: Iterable[str], sizes: Mapping[str, Any]) -> Named | None:
    """The ranked shape that a command line names as `target=FILE` of a search, beside the sizes that are taken."""
    given = (word.lstrip("+").partition("=") for word in words)
    file = Path(next((value for key, _, value in given if key == "target"), ""))
    rank, search = _RANK.fullmatch(file.name), file.parent.parent
    if rank is None or file.parent.name != TARGETS or not (search / MANIFEST).is_file():
        return None
    try:
        digest, listed = str(load_yaml(search / MANIFEST)["digest"]), load_yaml(search / CANDIDATES)["candidates"]
        ranked = next(one for one in listed if one.get("rank") == int(rank[1]))
        both = {name: [ranked.get(name), size] for name, size in sizes.items()}
    except (UserError, KeyError, TypeError, AttributeError, StopIteration):
        return None
    return Named(str(file), int(rank[1]), digest, {name: pair for name, pair in both.items() if pair[0] != pair[1]})
