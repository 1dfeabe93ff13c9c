"""Token ids in the JSON files beside a model, numbered anew where its vocabulary is cut.

    "eos_token_id": 7, [7, 9]            an id, or several      those that went are left out
    "bad_words_ids": [[3, 4], [5]]       phrases of ids         one that lost an id is left out
    "forced_decoder_ids": [[1, 7]]       positions with ids     left out with its id
    "lang_to_id": {"<|en|>": 7}          names with ids         left out with its id
    "added_tokens_decoder": {"7": …}     what is of an id       left out with its id

Keys are told by their names, wherever they stand. What looks like ids and is of another form is dropped, and said.
"""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from minitron_megatron.errors import UserError
from minitron_megatron.models.config_keys import shown

log = logging.getLogger(__name__)

_IDS = re.compile(r".*_token_(ids?|index)|(begin_)?suppress_tokens|stop_token_ids|.*_tokens_ids?")
_PHRASES = ("bad_words_ids", "force_words_ids", "stop_words_ids")
_POSITIONS = ("forced_decoder_ids",)
_BIASES = ("sequence_bias",)
_NAMED = re.compile(r".*_to_id|added_tokens_encoder")
_BY_ID = ("added_tokens_decoder",)
# Ends as ids do, and is none: labels of classifiers are numbered apart.
_OTHER_IDS = frozenset(("id2label", "label2id"))
_LOOKS_LIKE_IDS = re.compile(r"(.*_)?ids?")

New = Mapping[int, int]


def renumber(values: Mapping[str, Any], new: New, where: str) -> dict[str, Any]:
    """A file's values with its token ids in the new numbering.

    Args:
        values: of the whole file, nested as they are.
        new: new id of each token that stays, by its old one.
        where: the file, for errors.

    Raises:
        UserError: what must be ids is something else; it names the key.
    """
    return {key: _value(key, value, new, where) for key, value in values.items()}


def _value(key: str, value: Any, new: New, where: str) -> Any:
    if value is None or key in _OTHER_IDS:
        return value
    if _IDS.fullmatch(key):
        return _ids(key, value, new, where)
    if key in _PHRASES:
        return _phrases(key, value, new, where)
    if key in _POSITIONS:
        return _pairs(key, value, where, lambda position, one: [position, new[one]] if one in new else None)
    if key in _BIASES:
        return _pairs(key, value, where, lambda phrase, bias: _bias(key, phrase, bias, new, where))
    if _NAMED.fullmatch(key) and isinstance(value, Mapping):
        return by_name(key, value, new, where)
    if key in _BY_ID and isinstance(value, Mapping):
        kept = {name: one for name, one in value.items() if _id(key, _whole(name), where) in new}
        return {str(new[int(name)]): one for name, one in kept.items()}
    if isinstance(value, Mapping):
        return renumber(value, new, where)
    if isinstance(value, list):
        if _LOOKS_LIKE_IDS.fullmatch(key):
            return _dropped(key, where)
        return [renumber(one, new, where) if isinstance(one, Mapping) else one for one in value]
    return _dropped(key, where) if _LOOKS_LIKE_IDS.fullmatch(key) and type(value) is int else value


def by_name(key: str, value: Mapping[str, Any], new: New, where: str) -> dict[str, int]:
    """Ids by the names of their tokens, without those that went. Raises UserError."""
    return {name: new[one] for name, one in value.items() if _id(key, one, where) in new}


def _whole(name: Any) -> Any:
    return int(name) if isinstance(name, str) and name.isdecimal() else name


def _dropped(key: str, where: str) -> None:
    log.warning("%s: %s left out: its ids are of the whole vocabulary", where, key)


def _ids(key: str, value: Any, new: New, where: str) -> Any:
    """An id, or a list of some; null where none is left."""
    if isinstance(value, list):
        kept = [new[_id(key, one, where)] for one in value if _id(key, one, where) in new]
        return kept if kept or not value else None
    return new.get(_id(key, value, where))


def _id(key: str, value: Any, where: str) -> int:
    if type(value) is not int:
        raise UserError(f"{where}: {key} has {shown(value)}, which is no token id")
    return value


def _phrases(key: str, value: Any, new: New, where: str) -> Any:
    """Phrases, each a list of ids, or lists of those: what lost a part is left out; null where nothing is left."""
    if not isinstance(value, list):
        raise UserError(f"{where}: {key}={shown(value)} must be lists of token ids")
    kept = [one for one in (_phrase(key, part, new, where) for part in value) if one]
    return kept or None


def _phrase(key: str, value: Any, new: New, where: str) -> list[Any] | None:
    if not isinstance(value, list):
        raise UserError(f"{where}: {key} has {shown(value)}, which is no list of token ids")
    if any(isinstance(one, list) for one in value):
        # Each of these words may stand in place of the others.
        return [one for one in (_phrase(key, part, new, where) for part in value) if one]
    ids = [_id(key, one, where) for one in value]
    return [new[one] for one in ids] if all(one in new for one in ids) else None


def _pairs(key: str, value: Any, where: str, of: Callable[[Any, Any], list[Any] | None]) -> Any:
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return _dropped(key, where)
    return [pair for pair in (of(*pair) for pair in value) if pair] or None


def _bias(key: str, phrase: Any, bias: Any, new: New, where: str) -> list[Any] | None:
    kept = _phrase(key, phrase, new, where)
    return [kept, bias] if kept else None
