"""NaN and infinity in weights, noticed while the weights pass by on their way from one file to another.

A number is neither where not all bits of its exponent are set. Seen as integers, these are the largest of their sign:

    bfloat16   0 … 7f7f numbers above 0   7f80 … 7fff inf, NaN   8000 … ff7f numbers below 0   ff80 … ffff −inf, NaN
                                          └─ largest as signed                                 └─ largest as unsigned

So two maxima of integers find them, which NumPy takes at the speed of memory; it knows no bfloat16.
"""

import numpy as np

# By width in bytes: integers as which numbers are seen, and the first of them that is inf, of each sign.
_SEEN_AS = {
    2: (np.int16, 0x7F80, np.uint16, 0xFF80),
    4: (np.int32, 0x7F800000, np.uint32, 0xFF800000),
}
# Bytes that are looked at, and given a checksum, while they are in a core's cache.
BLOCK_BYTES = 2**19


def has_odd(numbers: np.ndarray) -> bool:
    """Whether there is a NaN or an infinity among numbers, seen as integers of the width of bfloat16 or float32; any shape."""
    signed, above, unsigned, below = _SEEN_AS[numbers.itemsize]
    return bool(numbers.size) and bool(numbers.view(signed).max() >= above or numbers.view(unsigned).max() >= below)


def first_odd(numbers: np.ndarray) -> int:
    """Place of the first NaN or infinity among numbers [n] that have one."""
    signed, above, unsigned, below = _SEEN_AS[numbers.itemsize]
    return int(((numbers.view(signed) >= above) | (numbers.view(unsigned) >= below)).argmax())
