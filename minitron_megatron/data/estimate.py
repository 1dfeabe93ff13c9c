"""How many tokens text has that is not prepared yet: small texts are tokenised, of large ones the first part of each file.

Compressed files hold more text than their size says: what it says then is a guess, and the plan calls it one.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from minitron_megatron.data.coverage import Losses
from minitron_megatron.data.encoding import Encoder
from minitron_megatron.data.text import PLAIN, documents

# Characters of each file that are tokenised, and how many files are looked at.
_CHARACTERS, _FILES = 1_000_000, 16
# Text in a byte of a compressed file, as in web text.
_UNPACKED = {".gz": 3.0, ".bz2": 4.0, ".xz": 4.0, ".zst": 3.0, ".parquet": 2.0}


def estimate_tokens(files: Sequence[Path], key: str, encoder: Encoder) -> tuple[int, bool]:
    """Tokens of all documents, with what opens and ends each, and whether they were counted.

    Says what the tokenizer cannot write of them. Raises UserError as reading does, and where that is most of it.
    """
    tokens, size_seen, whole, losses = 0, 0.0, True, Losses()
    step = max(1, len(files) // _FILES)
    looked_at = files[::step]
    for file in looked_at:
        characters = 0
        for text in documents(file, key):
            read = text[:_CHARACTERS]
            ids = encoder(read)
            tokens += len(ids)
            losses.add(len(read), *encoder.coverage.lost(read, ids), str(file))
            written = text if file.name.lower().endswith(PLAIN) else json.dumps({key: text}, ensure_ascii=False)
            size_seen += len(written[:_CHARACTERS].encode())
            characters += len(text)
            if characters > _CHARACTERS:
                whole = False
                break
    losses.say()
    if whole and len(looked_at) == len(files):
        return tokens, True
    total = sum(file.stat().st_size * _UNPACKED.get(file.suffix.lower(), 1.0) for file in files)
    return round(tokens * max(1.0, total / max(1.0, size_seen))), False
