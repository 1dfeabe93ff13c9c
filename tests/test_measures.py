"""What is measured of distributions beside the loss: entropy and the most probable token, over a sharded vocabulary."""

import pytest
import torch

from tests.test_distill import VOCABULARY, random_logits


def entropy_and_argmax(logits):
    """Of this rank's columns of the logits."""
    from megatron.core import parallel_state as ps

    from minitron_megatron.models.vocab_parallel import vocab_parallel_argmax, vocab_parallel_entropy

    mine = logits.chunk(ps.get_tensor_model_parallel_world_size(), -1)[ps.get_tensor_model_parallel_rank()]
    over = {"vocab_size": VOCABULARY, "group": ps.get_tensor_model_parallel_group()}
    return vocab_parallel_entropy(mine, **over), vocab_parallel_argmax(mine, **over)


@pytest.mark.parametrize("ranks", [1, 4])
def test_entropy_and_argmax_are_those_of_the_whole_vocabulary(gloo, ranks):
    """In float64; padded columns are highest and do not count; of equal logits on two ranks the smallest id wins."""
    logits = random_logits(11)
    logits[..., VOCABULARY:] = 100.0
    logits[0, :, [7, 270, 299]] = 50.0
    log_p = torch.log_softmax(logits[..., :VOCABULARY], -1)
    wanted = logits[..., :VOCABULARY].argmax(-1)
    wanted[0] = 7
    for entropy, found in gloo(ranks, entropy_and_argmax, logits, layout={"tensor": ranks}):
        torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-12, atol=1e-12)
        assert torch.equal(found, wanted)
