"""nemo-toolkit itself, as far as a machine without GPUs runs it: `python -m tests.nemo_toolkit JOBS.json`, with its own Python.

JOBS is a list of [what, family, source, target]:

    load   NeMo's own loader (`ModelConnector.nemo_load`: the context, the model by its class, MegatronStrategy's load_checkpoint)
           fills a model, all NaN before, from the checkpoint folder `source`. `target` is a file with tokens, and gets logits.
    import NeMo's own importer makes the checkpoint folder `target` of the Hugging Face folder `source`.

The CPU adapter stands for CUDA, and Megatron's local layers for Transformer Engine's: their checkpoint keys are the same. The
norm is ours, since Megatron's in torch refuses `persist_layer_norm`, which NeMo's Llama has on.
"""

import json
import sys
from pathlib import Path

import torch

from minitron_megatron.models.norms import Norm
from minitron_megatron.parallel.cpu import adapter

MODELS = {family: f"{name}Model" for family, name in zip(
    ("llama", "mistral", "qwen2", "qwen3", "nemotron"), ("Llama", "Mistral", "Qwen2", "Qwen3", "Nemotron"), strict=True
)}  # fmt: skip


def prepare() -> None:
    """Stand-ins for kernels of GPU packages."""
    from megatron.core.models import backends
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import transformer_block
    from nemo.lightning.io import pl

    # It moves tensors from one GPU to another, and asserts that there is one.
    pl._fix_tensors_device = lambda checkpoint: checkpoint
    # Configs say apply_rope_fusion; `load` turns it off before anything is computed.
    rope_utils.fused_apply_rotary_pos_emb = lambda *_: None
    for module in (backends, gpt_layer_specs):
        module.LNImpl = module.WrappedTorchNorm = Norm
    transformer_block.LayerNormImpl = Norm


def load(family: str, source: str, file: str) -> None:
    """Load with NeMo, and write the logits of the tokens in `file` beside them."""
    from nemo.collections import llm
    from nemo.lightning import MegatronStrategy
    from nemo.lightning.base import teardown

    original = MegatronStrategy.load_checkpoint

    def load_over_nan(self, *args, **kwargs):
        for parameter in self.megatron_parallel.parameters():
            parameter.data.fill_(float("nan"))
        return original(self, *args, **kwargs)

    MegatronStrategy.load_checkpoint = load_over_nan
    try:
        model, trainer = getattr(llm, MODELS[family]).exporter("hf", source).nemo_load(Path(source))
    finally:
        MegatronStrategy.load_checkpoint = original
    held = torch.load(file)
    tokens = held["tokens"]
    model.config.apply_rope_fusion = False
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1]).triu(1).bool()
    with torch.no_grad():
        logits = model.eval()(tokens, positions, attention_mask=mask)
    about = {"class": type(model).__name__, "config": type(model.config).__name__}
    about["tokenizer"] = None if model.tokenizer is None else model.tokenizer.vocab_size
    torch.save({**held, "logits": logits, **about}, file)
    teardown(trainer, model)


def import_(family: str, source: str, target: str) -> None:
    """Import with NeMo."""
    from nemo.collections import llm

    getattr(llm, MODELS[family]).importer(f"hf://{source}")(Path(target))


def main() -> None:
    """The jobs one after another: NeMo takes half a minute to be imported."""
    prepare()
    with adapter():
        for what, *job in json.loads(Path(sys.argv[1]).read_text()):
            {"load": load, "import": import_}[what](*job)


if __name__ == "__main__":
    main()
