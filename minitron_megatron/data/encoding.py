"""How a document becomes token ids: what opens it, its text, what ends it. Everything that reads data sees just this.

    [begin]  text  end  [begin]  text  end …

    end     the tokenizer's end of sequence; where that ends a turn of a chat (<|im_end|>, <|eot_id|>), the end of a text that the
            base model knows (<|endoftext|>, <|end_of_text|>)
    begin   the beginning of sequence (BOS) where the tokenizer puts one before a text by itself; nothing where it does not
    text    the text alone: a special token's string in it, such as </s>, is spelled out and is no token. A corpus about language
            models is full of such strings, and each would be a border between documents that is none.

What was chosen is in the data's manifest (docs/data.md).
"""

import itertools
import re
from typing import Any

from minitron_megatron.config import PrepareDataConfig
from minitron_megatron.data.coverage import Coverage
from minitron_megatron.errors import UserError

AUTO, NONE = "auto", "none"
# Tokens that end a turn of a chat, and tokens that end a text, as tokenizers call them.
CHAT_ENDS = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endofturn|>", "<turn|>", "<extra_id_1>")
)
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class Encoder:
    """Texts to ids. Raises UserError for a token that the tokenizer does not have."""

    def __init__(self, tokenizer: Any, *, begin: str = AUTO, end: str = AUTO, special_tokens: str = "text") -> None:
        """Of a Hugging Face tokenizer; `begin`, `end` and `special_tokens` are options of prepare_data."""
        self.tokenizer, self.spell = tokenizer, special_tokens == "text"
        self.coverage = Coverage(tokenizer)
        self.ids = special_ids(tokenizer)
        self.end_token = _end(tokenizer, self.ids) if end == AUTO else end
        self.begin_token = _begin(tokenizer) if begin == AUTO else None if begin == NONE else begin
        self.end = self._id(self.end_token, "end_of_document")
        self.begin = None if self.begin_token is None else self._id(self.begin_token, "begin_of_document")
        # An unknown character becomes a special token as well.
        self.never = frozenset(self.ids.values()) - {tokenizer.unk_token_id}
        self.strings = re.compile("|".join(map(re.escape, sorted(self.ids, key=len, reverse=True))) or r"(?!)")

    @classmethod
    def of(cls, tokenizer: Any, cfg: PrepareDataConfig) -> "Encoder":
        """As the options say."""
        return cls(tokenizer, begin=cfg.begin_of_document, end=cfg.end_of_document, special_tokens=cfg.special_tokens)

    def __call__(self, text: str) -> list[int]:
        """A document's ids."""
        ids = self._text(text)
        opened = self.begin is None or self.begin == self.end or ids[:1] == [self.begin]
        return [*([] if opened else [self.begin]), *ids, self.end]

    def names_tokens(self, text: str) -> bool:
        """Whether a special token's string is in a text."""
        return self.strings.search(text) is not None

    def results(self) -> dict[str, Any]:
        """For the manifest: ids and strings of what is between documents, and how special tokens in the text were read."""
        return {
            "end_of_document": self.end,
            "end_of_document_token": self.end_token,
            "begin_of_document": self.begin,
            "begin_of_document_token": self.begin_token,
            "special_tokens": "text" if self.spell else "token",
        }

    def __str__(self) -> str:
        opens = "nothing opens" if self.begin_token is None else f"{self.begin_token} opens"
        own = self.tokenizer.eos_token
        why = "" if self.end_token == own else f" (the tokenizer's own end, {own}, does not)"
        return f"{opens} a document, {self.end_token} ends it{why}"

    def _id(self, token: str, option: str) -> int:
        found = self.ids.get(token)
        if found is None:
            known = ", ".join(sorted(self.ids)[:8])
            raise UserError(f"{option}={token} is no special token of this tokenizer: use one of {known}")
        return found

    def _text(self, text: str) -> list[int]:
        ids = self._plain(text)
        if self.spell and not self.never.isdisjoint(ids):
            # Models that look up whole pieces (Unigram, WordLevel) find the string among them: no piece may hold all of it.
            cuts = [0, *(match.start() + 1 for match in self.strings.finditer(text)), len(text)]
            pieces = [text[first:last] for first, last in itertools.pairwise(cuts)]
            ids = [one for piece in pieces for one in self._plain(piece)]
            if not self.never.isdisjoint(ids):
                token = next(name for name, number in self.ids.items() if number in self.never & set(ids))
                raise UserError(
                    f"this tokenizer makes its special token {token!r} of plain text, too: use special_tokens=token"
                )
        return ids

    def _plain(self, text: str) -> list[int]:
        how = {"add_special_tokens": False, "verbose": False, "split_special_tokens": self.spell}
        return self.tokenizer(text, **how)["input_ids"]


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of a tokenizer's special tokens by their strings."""
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {**added, **named}


def _end(tokenizer: Any, ids: dict[str, int]) -> str:
    """What ends a text."""
    if tokenizer.eos_token not in CHAT_ENDS:
        return tokenizer.eos_token
    return next((token for token in TEXT_ENDS if token in ids), tokenizer.eos_token)


def _begin(tokenizer: Any) -> str | None:
    """The BOS, where the tokenizer opens a text with it."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    return tokenizer.bos_token if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None
