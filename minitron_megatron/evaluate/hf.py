"""A Hugging Face folder for lm-evaluation-harness, by the harness's own transformers backend; nothing in it may run code."""

import hashlib
import json
from pathlib import Path
from typing import Any

from minitron_megatron.checkpoints.folder import joint_digest
from minitron_megatron.config import EvaluateConfig
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.parallel.job import pick_device

_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}


def check_folder(folder: Path) -> None:
    """Raise UserError unless it is a Hugging Face folder with safetensors weights and a tokenizer."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"hf={folder} has no config.json with .safetensors weights: give the output of launch/export_hf.py, or another "
            "Hugging Face folder"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error})") from None
    if not isinstance(config, dict) or "auto_map" in config:
        raise UserError(f"hf={folder} brings code of its own (auto_map in config.json), which is not run: remove it")
    load_tokenizer(folder)


def digest_of(folder: Path) -> str:
    """The digest of all files of a folder, which are read for it."""
    found = {}
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with open(file, "rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").digest()
    return joint_digest(found)


def load_hf(folder: Path, cfg: EvaluateConfig) -> Any:
    """The harness's HFLM of it. Raises UserError where transformers cannot load it."""
    from lm_eval.models.huggingface import HFLM

    try:
        return HFLM(
            pretrained=str(folder),
            tokenizer=load_tokenizer(folder),
            backend="causal",
            dtype=_DTYPES[cfg.precision],
            batch_size=cfg.trainer.micro_batch_size,
            device=pick_device(cfg.device).type,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"hf={folder} cannot be loaded by transformers ({in_one_line(error, 200)})") from None
