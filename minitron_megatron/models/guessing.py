"""A model that knows no more of a text than a guess among all tokens: weights of zeros, or an embedding of another model.

    loss of the labels on the data, nats a token ─▶ about log(vocabulary), or more? ─▶ one line, before anything is learned

A loss to such a teacher falls quickly and means nothing. It is a warning and no error, because rehearsals with random models
(launch/random_model.py) are meant to run.
"""

import logging
import math

from minitron_megatron.parallel import collectives

log = logging.getLogger(__name__)
# Of log(vocabulary), from which on a loss is that of guessing: few tokens are looked at, and their mean is off by a few percent.
# A model that knows no more than how frequent each token is has about 0.7.
SHARE = 0.95


def is_guessing(loss: float, vocab_size: int) -> bool:
    """Whether a mean loss, nats a token, is no better than a guess among `vocab_size` tokens; one that is not finite is."""
    return not loss < SHARE * math.log(vocab_size)


def warn_of_guessing(model: str, loss: float, vocab_size: int) -> None:
    """Name a model (as in "teacher=outputs/llama") whose loss on the data is that of guessing: one line from rank 0."""
    if is_guessing(loss, vocab_size) and collectives.is_rank_zero():
        log.warning(
            "%s predicts this text no better than a guess: its loss is %.4g nats a token, and log(vocabulary) is %.4g. "
            "Are these its weights, its embedding, its tokenizer's data?",
            model,
            loss,
            math.log(vocab_size),
        )
