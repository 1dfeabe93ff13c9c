"""Megatron-LM itself, as far as a machine without GPUs runs it: `python -m tests.megatron_lm TOKENS LOGITS WORDS…`.

Its own parser and checks (`parse_and_validate_args`), its initialisation, its configs and builder of the model, and its
`load_checkpoint`, with the command line WORDS. Writes what the model computes of the tokens in the file TOKENS to LOGITS, with
the arguments that it ran with and the iteration that it would go on from. Run by torchrun, each rank has its shard.

The CPU adapter stands for CUDA. Megatron's local layers stand for Transformer Engine's: their checkpoint keys are the same.
"""

import sys

import torch

from minitron_megatron.models.norms import Norm
from minitron_megatron.parallel.cpu import adapter


def build(args):
    """The model as megatron.training builds it of its arguments."""
    from megatron.core.models import backends
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import transformer_block
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    if args.layernorm_zero_centered_gamma:
        # Without GPUs Megatron has no such norm.
        backends.LNImpl = transformer_block.LayerNormImpl = Norm
    config = gpt_config_from_args(args)
    return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def run(tokens: torch.Tensor) -> dict:
    """Start Megatron-LM by sys.argv, load and compute."""
    from megatron.core import parallel_state as ps
    from megatron.core.datasets import utils
    from megatron.training import arguments
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron

    # The wheel has them compiled, and no makefile.
    utils.compile_helpers = lambda: None
    # Tensor parallelism is checked against the card's generation.
    arguments.get_device_arch_version = lambda: 9
    args = arguments.parse_and_validate_args()
    initialize_megatron(allow_no_cuda=True)
    model = build(args)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    iteration, _ = load_checkpoint([model], None, None, strict=True)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1]).triu(1).bool()
    with torch.no_grad():
        logits = model.eval()(tokens, positions, mask)
    parts = [torch.empty_like(logits) for _ in range(ps.get_tensor_model_parallel_world_size())]
    torch.distributed.all_gather(parts, logits.contiguous(), group=ps.get_tensor_model_parallel_group())
    return {"logits": torch.cat(parts, dim=-1), "args": vars(args), "iteration": iteration}


def main() -> None:
    """Rank 0 writes what every rank has."""
    tokens, logits, *words = sys.argv[1:]
    sys.argv[1:] = words
    with adapter():
        result = run(torch.load(tokens))
    if torch.distributed.get_rank() == 0:
        plain = {key: value for key, value in result["args"].items() if type(value) in (int, float, str, bool)}
        torch.save({**result, "args": plain}, logits)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
