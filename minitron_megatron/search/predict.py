"""How much a shape would lose, predicted from importance scores: what orders the shapes, before any training.

    predicted damage = w_layers · D_layers + w_hidden · D_hidden + w_ffn · D_ffn + w_heads · D_heads

Each D is 0 where nothing is cut, and a relative squared error of what the axis carries when the best are kept, which is what
prune keeps (importance as in arXiv 2407.14679, section 2.2; contiguous layers as in 2408.11796):

    D_hidden   1 − Σ_kept s² / Σ s²                       over the residual stream's channels
    D_ffn      mean over kept layers of 1 − Σ_kept s² / Σ s²    over a layer's neurons
    D_heads    the same over a layer's query heads; the groups that go take theirs with them
    D_layers   2 Σ_cut BI; with a layer analysis, what its judge says of the block that goes (`_judged`)

Scores of channels and heads are sizes of activations: what is cut of a vector is, relative to its square norm, the sum of the
squares that go. Between unit vectors the square of the difference is 2 (1 − cos): twice the Block Influence. It is no share of
the sum over layers, since the first layer often has most of it and would make all others seem free. That the parts add up, and
that an error on one axis costs as much as on another, is assumed; the papers order shapes by training each for a while.
"""

import math
from dataclasses import dataclass

import numpy as np

from minitron_megatron.config import PruneOptions, RankConfig
from minitron_megatron.errors import UserError
from minitron_megatron.importance.layers import LayerAnalysis
from minitron_megatron.importance.scores import Scores
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.prune.select import choose
from minitron_megatron.search.space import Space, uniform

AXES = ("layers", "hidden", "ffn", "heads")


@dataclass(frozen=True)
class Predictor:
    """Weighted losses of each size of a space's axes: layers [a], hidden [b], ffn [a, c], heads [a, d], float64."""

    space: Space
    layers: np.ndarray
    hidden: np.ndarray
    ffn: np.ndarray
    heads: np.ndarray

    def parts(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Predicted damage of these shapes by axis, [n] each."""
        layers, hidden, ffn, pair = self.space.positions(numbers)
        found = (self.layers[layers], self.hidden[hidden], self.ffn[layers, ffn], self.heads[layers, pair])
        return dict(zip(AXES, found, strict=True))

    def loss(self, numbers: np.ndarray) -> np.ndarray:
        """Predicted damage of these shapes: [n]."""
        return sum(self.parts(numbers).values())


def make_predictor(
    source: ModelShape,
    scores: Scores,
    space: Space,
    rank: RankConfig,
    options: PruneOptions,
    analysis: LayerAnalysis | None = None,
) -> Predictor:
    """Tables of what every size loses.

    Raises:
        UserError: no weight is above 0, or the analysis cannot judge one of the space's numbers of layers.
    """
    weights = rank.weights
    if not any(getattr(weights, axis) for axis in AXES):
        raise UserError("rank.weights are all 0: nothing would tell one shape from another")
    kept, gone = _layers(source, scores, space, options, analysis)
    heads = np.stack([_lost_with_heads(source, scores.heads, pair, options, rank.power) for pair in space.heads], 1)
    ffn = lost(scores.ffn, space.ffn, rank.power)
    return Predictor(
        space,
        weights.layers * gone,
        weights.hidden * lost(scores.hidden, space.hidden, rank.power),
        weights.ffn * np.stack([ffn[layers].mean(0) for layers in kept]),
        weights.heads * np.stack([heads[layers].mean(0) for layers in kept]),
    )


def lost(scores: np.ndarray, kept: np.ndarray, power: float) -> np.ndarray:
    """Share of the worth that goes when the best k are kept, for each k in `kept`: scores [..., n] to [..., len(kept)]."""
    worth = np.sort(np.abs(scores.astype(np.float64)) ** power, axis=-1)[..., ::-1].cumsum(-1)
    return 1 - worth[..., kept - 1] / _whole(worth[..., -1:])


def _whole(worth: np.ndarray) -> np.ndarray:
    """What shares are taken of; where all scores are 0 nothing tells the channels apart, and nothing kept is worth anything."""
    return np.maximum(worth, np.finfo(np.float64).tiny)


def _lost_with_heads(
    source: ModelShape, scores: np.ndarray, pair: np.ndarray, options: PruneOptions, power: float
) -> np.ndarray:
    """Share of each layer's heads that goes, [layers], for (heads, groups): of those that prune would choose."""
    shape = uniform(source)
    heads, groups = pair.tolist()
    target = shape.resized(num_attention_heads=heads, num_query_groups=groups)
    chosen = choose(shape, target, Scores({"heads": scores}, ""), [], options).heads
    if chosen is None:
        return np.zeros(len(scores))
    worth = np.abs(scores.astype(np.float64)) ** power
    left = np.take_along_axis(worth, chosen.reshape(len(worth), -1), axis=1).sum(1)
    return 1 - left / _whole(worth.sum(1))


def _layers(
    source: ModelShape, scores: Scores, space: Space, options: PruneOptions, analysis: LayerAnalysis | None
) -> tuple[list[np.ndarray], np.ndarray]:
    """For each number of layers: those that stay, as prune chooses them, and what those that go are worth [a]."""
    shape, all_kept, gone = uniform(source), [], []
    influence = scores.layers.astype(np.float64)
    for count in space.layers.tolist():
        cut, target = shape.num_layers - count, shape.resized(num_layers=count)
        block = analysis.best_block(cut, options.judge, options.keep_last_layers) if analysis and cut else range(0)
        kept = choose(shape, target, scores, list(block), options).layers
        all_kept.append(kept)
        if block:
            gone.append(_judged(analysis, block, options.judge, shape.vocab_size))
        else:
            gone.append(2 * np.delete(influence, kept).sum())
    return all_kept, np.asarray(gone)


def _judged(analysis: LayerAnalysis, block: range, judge: str, vocab_size: int) -> float:
    """What an analysis says of the model without a block, 0 where it is as good as whole.

    bi: twice the block's influence. loss: how far the loss has gone from the whole model's to that of guessing, ln(vocabulary).
    task: the share of the whole model's accuracy that is gone.
    """
    base, without = analysis.base, analysis.blocks[len(block)][block.start]
    if judge == "bi":
        share = 2 * without.bi
    elif judge == "loss":
        share = (without.loss - base.loss) / max(math.log(vocab_size) - base.loss, 1e-9)
    else:
        share = 1 - (without.accuracy or 0.0) / max(base.accuracy or 0.0, 1e-9)
    return max(share, 0.0)
