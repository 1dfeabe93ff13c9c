"""What a tokenizer cannot write of a text: characters that become no token at all, or the unknown one.

    byte level, byte fallback     every text is written: nothing is counted, nothing costs time
    an unknown token              what became it is lost                              by the ids, and then by their places
    byte pairs without either     characters that are not in the vocabulary vanish    by the characters that there are

Everything that reads text with a tokenizer follows this rule: what is lost is counted and said, and most of a text is refused.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from minitron_megatron.errors import UserError

log = logging.getLogger(__name__)
# Characters that no vocabulary is likely to have: what writes them writes any.
_RARE = "\U00010330\ua66e\U0002a6a5\U0001f9ff\ue123"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
# A text of which more is lost than this is another tokenizer's.
_MOST = 0.5
_LONGEST = 20


@dataclass
class Losses:
    """Characters of a text, how many of them are lost, and the first that are, with the place that has them."""

    characters: int = 0
    lost: int = 0
    example: str = ""
    where: str = ""

    def add(self, characters: int, lost: int, example: str, where: str) -> None:
        """Of a text of so many characters so many are lost, as `example`."""
        self.characters += characters
        if lost and not self.lost:
            self.example, self.where = example, where
        self.lost += lost

    @property
    def most(self) -> bool:
        """Whether more is lost than is written."""
        return self.lost > _MOST * self.characters

    def __str__(self) -> str:
        share = f"{100 * self.lost / max(1, self.characters):.2g} % of the characters"
        return f"{share} of the text have no token in this tokenizer (as {self.example!r} in {self.where})"

    def say(self) -> None:
        """Warn of what is lost, if anything is. Raises UserError where it is most of the text."""
        if self.most:
            raise UserError(f"{self}: give text, or a model, whose tokenizer was made for its script")
        if self.lost:
            log.warning("%s: they are left out, or become its unknown token", self)


class Coverage:
    """Which characters a Hugging Face tokenizer can write."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._backend = tokenizer, getattr(tokenizer, "backend_tokenizer", None)
        self._unknown: int | None = getattr(tokenizer, "unk_token_id", None)
        if self._unknown is None and (name := getattr(getattr(self._backend, "model", None), "unk_token", None)):
            self._unknown = self._backend.token_to_id(name)
        # Of the characters that were met, those that vanish.
        self._met: set[str] = set()
        self._vanish: set[str] = set()
        try:
            self._has_unknown = self._unknown is not None and any(self._unknown in self._ids(one) for one in _RARE)
            self.whole = not self._has_unknown and not any(map(self._vanishes, _RARE))
        except Exception:  # of its library: what it does not know it refuses by itself, and loses nothing
            self._has_unknown, self.whole = False, True

    def lost(self, text: str, ids: Sequence[int] | None = None) -> tuple[int, str]:
        """How many characters of a text are lost, and the first of them; `ids` are its tokens, where they are known."""
        if self.whole:
            return 0, ""
        if self._has_unknown:
            ids = self._ids(text) if ids is None else ids
            return self._became_unknown(text) if self._unknown in ids else (0, "")
        there = set(text)
        self._vanish |= {one for one in there - self._met if self._vanishes(one)}
        self._met |= there
        gone = there & self._vanish
        # A letter says more than a space.
        first = min(gone, key=lambda one: (one.isspace(), text.index(one)), default="")
        return sum(map(text.count, gone)), first

    def of_texts(self, texts: Iterable[tuple[str, str]]) -> Losses:
        """What is lost of some texts, each with its place."""
        found = Losses()
        for text, where in () if self.whole else texts:
            found.add(len(text), *self.lost(text), where)
        return found

    def _ids(self, text: str, **how: Any) -> Any:
        how = {"add_special_tokens": False, "verbose": False, "split_special_tokens": True, **how}
        found = self._tokenizer(text, **how)
        return found if "return_offsets_mapping" in how else found["input_ids"]

    def _became_unknown(self, text: str) -> tuple[int, str]:
        if self._backend is None:
            return self._ids(text).count(self._unknown), ""
        found = self._ids(text, return_offsets_mapping=True)
        places = zip(found["input_ids"], found["offset_mapping"], strict=True)
        gone = [text[start:end] for token, (start, end) in places if token == self._unknown]
        return sum(map(len, gone)), gone[0][:_LONGEST] if gone else ""

    def _vanishes(self, character: str) -> bool:
        """Whether a character, alone and within a word, becomes nothing; what a tokenizer takes out of every text does not."""
        if self._backend is None:
            return not character.isspace() and not self._ids(character)
        return all(self._goes(text) for text in (character, 3 * character))

    def _goes(self, text: str) -> bool:
        normalizer, cutter = self._backend.normalizer, self._backend.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer else text
        pieces = [piece for piece, _ in cutter.pre_tokenize_str(text)] if cutter else [text]
        return any(map(self._lacks, filter(None, pieces)))

    def _lacks(self, piece: str) -> bool:
        """Whether no token has one of the characters of a piece, but for the mark of a space before it."""
        values = [token.value for token in self._backend.model.tokenize(piece)]
        return bool(set(piece) - {"\u2581"} - set("".join(values))) and not any(map(_BYTE.fullmatch, values))
