"""Tiny random models, tokenizers and data, made anew for each test in its own folder; real formats throughout."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minitron_megatron.checkpoints.hf import import_hf
from minitron_megatron.config import ImportHfConfig, ModelConfig, PrepareDataConfig, TrainingDataConfig
from minitron_megatron.data.prepare import prepare_data

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 32,
}
# Sizes that every layout of up to four ranks divides.
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
OWN_SIZES = {
    "mistral": {"sliding_window": None},
    "nemotron": {
        "norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
}
TEXT = "The quick brown fox jumps over the lazy dog, while seven wizards quietly box five jugs of liquor. "


def tiny_tokenizer(folder: Path, text: str = TEXT) -> None:
    """A byte-level BPE tokenizer of 300 tokens, in Hugging Face's files; another one for another text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "nemotron")


def hf_model(seed: int = 0, *, family: str = "llama", spread: float = 0.1, **sizes):
    """A random model of transformers' class; every weight, norms and biases too, is random: nothing is equal by accident.

    `spread` is the standard deviation of matrices: 0.1 suits hidden sizes of some tens, wider models want less.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**SIZES, **OWN_SIZES.get(family, {}), **sizes}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **sizes, bos_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = name.endswith("norm.weight") and family != "nemotron"
            parameter.normal_(1.0 if is_gain else 0.0, spread if parameter.ndim == 2 else 0.1)
    return model.eval()


def save_hf(model, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save with transformers' own writer, tokenizer beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def imported(model, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The model as one of our folders."""
    hf = save_hf(model, folder / "hf", dtype)
    import_hf(ImportHfConfig(hf=str(hf), output=str(folder / "model")))
    return folder / "model"


def data_folder(folder: Path, model: Path, documents: int = 60) -> Path:
    """A prepared data folder of some thousand tokens."""
    folder.mkdir(exist_ok=True)
    text = folder / "text.jsonl"
    words = TEXT.split()
    lines = (" ".join(words[(i * j) % len(words)] for j in range(1, 60 + i)) for i in range(1, documents + 1))
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    output = str(folder / "data")
    prepare_data(PrepareDataConfig(input=str(text), model=model_option(model), validation_fraction=0.2, output=output))
    return Path(output)


def model_option(path: Path) -> ModelConfig:
    """`model=path`."""
    return ModelConfig(path=str(path))


def data_option(path: Path, sequence_length: int = 32) -> TrainingDataConfig:
    """`data.path=path`, to be read as often as a test likes."""
    return TrainingDataConfig(path=str(path), sequence_length=sequence_length, max_epochs=100)
