"""Milliseconds of shapes that nobody has measured, from a table of some that somebody has.

    latency ≈ a + b · layers + c · parameters + d · cached values a token          a, b, c, d ≥ 0

A forward pass launches its kernels (a, and b a layer), reads and multiplies by every weight (c), and reads the keys and values of
the tokens before (d). The four are fitted by least squares of relative errors; below zero a term would make a model faster.
"""

import csv
import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import Sizes, cached_values, count_parameters
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.search.space import SIZES

# Of a second: tokens a second are taken as the time of one.
MILLISECONDS = 1000.0
_TERMS = 4


@dataclass(frozen=True)
class Latency:
    """A fit: coefficients [4], from how many shapes, and the largest relative error for one that is left out of it."""

    source: ModelShape
    coefficients: np.ndarray
    shapes: int
    error: float
    digest: str

    def milliseconds(self, sizes: Sizes) -> np.ndarray:
        """Estimates for shapes with these axis lengths: [n]."""
        return sum(c * term for c, term in zip(self.coefficients.tolist(), _terms(self.source, sizes), strict=True))


def read_latency(file: Path, source: ModelShape, measured_as: str = "latency_ms") -> Latency:
    """Fit a CSV of measured shapes: columns are sizes (those that are missing are the source's) and what was measured.

    That is latency_ms, or tokens_per_second, which is fitted as milliseconds a token.

    Raises:
        UserError: the file is missing or no such table, a shape is impossible, or there are fewer than 5.
    """
    try:
        content = file.read_bytes()
        rows = list(csv.DictReader(content.decode("utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"budget.table={file} cannot be read ({error})") from None
    columns = set(rows[0]) if rows else set()
    if measured_as not in columns or columns - {*SIZES, measured_as}:
        raise UserError(f"budget.table={file} must have the columns {measured_as} and sizes: {', '.join(SIZES)}")
    if len(rows) <= _TERMS:
        raise UserError(
            f"budget.table={file} has {len(rows)} shapes: measure {_TERMS + 1} or more, different on every axis"
        )
    read = [_row(file, line, row, source, measured_as) for line, row in enumerate(rows, 2)]
    terms = np.array([_terms(shape, {}) for shape, _ in read], np.float64)
    measured = np.array([value for _, value in read])
    return Latency(
        source,
        fit(terms, measured),
        len(rows),
        _left_out(terms, measured),
        f"sha256:{hashlib.sha256(content).hexdigest()}",
    )


def _row(
    file: Path, line: int, row: Mapping[str, str], source: ModelShape, measured_as: str
) -> tuple[ModelShape, float]:
    """A shape and its milliseconds."""
    try:
        value = float(row[measured_as])
        shape = source.resized(**{name: int(row[name]) for name in SIZES if name in row})
    except (ValueError, TypeError):
        raise UserError(f"budget.table={file}, line {line}: every column needs a number") from None
    except UserError as error:
        raise UserError(f"budget.table={file}, line {line}: {error}") from None
    if not 0 < value < math.inf:
        raise UserError(f"budget.table={file}, line {line}: {measured_as}={value} must be a number above 0")
    return shape, value if measured_as == "latency_ms" else MILLISECONDS / value


def _terms(shape: ModelShape, sizes: Sizes) -> tuple[object, ...]:
    layers = sizes.get("layers", shape.num_layers)
    return 1.0, layers, count_parameters(shape, sizes=sizes), cached_values(shape, sizes)


def fit(terms: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Coefficients c ≥ 0 of least Σ (terms · c / measured − 1)²: terms [n, k], measured [n], to [k].

    Every subset of the terms is tried: the optimum under c ≥ 0 is the unconstrained one of its own nonzero terms.
    """
    scale = terms.max(0)
    relative, best, least = terms / scale / measured[:, None], np.zeros(terms.shape[1]), np.inf
    for count in range(1, terms.shape[1] + 1):
        for subset in map(list, itertools.combinations(range(terms.shape[1]), count)):
            found = np.linalg.lstsq(relative[:, subset], np.ones(len(measured)), rcond=None)[0]
            residual = ((relative[:, subset] @ found - 1) ** 2).sum()
            if (found >= 0).all() and residual < least:
                best, least = np.zeros(terms.shape[1]), residual
                best[subset] = found
    return best / scale


def _left_out(terms: np.ndarray, measured: np.ndarray) -> float:
    """Largest relative error of an estimate for one measured shape by a fit to the others."""
    others = ~np.eye(len(measured), dtype=bool)
    estimates = [terms[i] @ fit(terms[rest], measured[rest]) for i, rest in enumerate(others)]
    return float(np.abs(np.array(estimates) / measured - 1).max())
