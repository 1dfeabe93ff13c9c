"""A Hugging Face folder as transformers computes it: loss on our windows; hf_tasks.py has the tasks.

Nothing in the folder may run code. The windows, their order and their masks are those of model folders (data/datasets.py), so
an export has the loss of the folder that it was made of, to the rounding of the two implementations.
"""

from pathlib import Path

import torch
from torch.nn import functional

from minitron_megatron.checkpoints.digests import digest_of_files
from minitron_megatron.checkpoints.folder import load_json
from minitron_megatron.checkpoints.hf_folder import check_loaded
from minitron_megatron.config import EvaluateConfig
from minitron_megatron.console import progress
from minitron_megatron.data.datasets import MicroBatches, Windows
from minitron_megatron.data.folder import Data
from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.evaluate.perplexity import loss_figures
from minitron_megatron.parallel.job import pick_device
from minitron_megatron.parallel.precision import auto_dtype

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def digest_of(folder: Path) -> str:
    """The digest of all files of a folder, which are read for it."""
    return digest_of_files(folder, (path.name for path in folder.iterdir() if path.is_file()))


def _dtype(folder: Path, precision: str) -> str:
    """The dtype to compute in: `auto` is the folder's own, or what the job has settled for bfloat16 (parallel/precision.py)."""
    if precision != "auto":
        return _DTYPES[precision]
    config = load_json(folder / "config.json")
    stored = config.get("dtype", config.get("torch_dtype"))
    return "auto" if stored is None else auto_dtype(str(stored))


def load_model(folder: Path, cfg: EvaluateConfig) -> torch.nn.Module:
    """The model of transformers' own class, on its device, with every weight out of the folder. Raises UserError."""
    from transformers import AutoModelForCausalLM

    how = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype(folder, cfg.precision), **how)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise cannot_be_loaded(folder, error) from None
    check_loaded(found, f"hf={folder}")
    return model.to(pick_device(cfg.device)).eval()


def cannot_be_loaded(folder: Path, error: Exception) -> UserError:
    """What is said of a folder that transformers refuses."""
    return UserError(f"hf={folder} cannot be loaded by transformers ({in_one_line(error, 200)})")


def hf_perplexity(model: torch.nn.Module, data: Data, cfg: EvaluateConfig, count: int) -> dict[str, float]:
    """`loss`, `perplexity` and `tokens` of the first `count` windows, as perplexity.py has them of a model folder."""
    windows, device = Windows(data, cfg.split, cfg.data.sequence_length), next(model.parameters()).device
    batches = MicroBatches(windows, range(count), cfg.trainer.micro_batch_size, data_rank=0, data_size=1)
    sums = torch.zeros(2, dtype=torch.float64)
    with progress("perplexity", len(batches), unit="micro-batches") as advance, torch.inference_mode():
        for batch in batches:
            tokens, labels, mask = (batch[name].to(device) for name in ("tokens", "labels", "loss_mask"))
            logits = model(input_ids=tokens, use_cache=False).logits
            # In float32, as model folders are judged: rows of logits in bfloat16 would be off in the third digit.
            nll = torch.stack(
                [
                    functional.cross_entropy(row.float(), of, reduction="none")
                    for row, of in zip(logits, labels, strict=True)
                ]
            )
            sums += torch.stack(((nll * mask).sum(dtype=torch.float64), mask.sum(dtype=torch.float64))).cpu()
            advance(1)
    nll, tokens = sums.tolist()
    return {**loss_figures(nll, tokens, f"hf={cfg.hf}"), "tokens": int(tokens)}
