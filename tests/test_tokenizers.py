"""One tokenizer everywhere: beside its model, in a model folder, with data, and in an export; whole and cut."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from minitron_megatron.checkpoints.folder import TOKENIZER, read_manifest
from minitron_megatron.checkpoints.hf import export_hf, import_hf
from minitron_megatron.checkpoints.tokenizer import (
    carry_tokenizer,
    copy_tokenizer,
    difference,
    export_tokenizer,
    probes,
    read_tokenizer,
    tokenizer_digest,
)
from minitron_megatron.config import ExportHfConfig, ImportHfConfig, PrepareDataConfig
from minitron_megatron.data.prepare import prepare_data
from minitron_megatron.data.same_tokenizer import check_same_tokenizer
from minitron_megatron.data.tokenizer import check_vocabulary, load_tokenizer
from minitron_megatron.data.vocabulary import _check_written, choose_tokens, numbered, write_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.evaluate import checks as evaluate_checks
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import distill_checks
from tests.test_bounds import SMALL_SHAPE
from tests.tiny import FAMILIES, TEXT, hf_model, model_option, save_hf

CLASSES = (
    None,
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
    "GPT2Tokenizer",
    "TokenizersBackend",
)
KINDS = ("bytes", "sentencepiece")


def trained(kind: str) -> Tokenizer:
    """Byte-level pairs with Llama 3's digits, or pairs as SentencePiece has them, with a BOS before each text."""
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        digits = pre_tokenizers.Digits(individual_digits=True)
        made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        made.decoder = decoders.ByteLevel()
        start = {"special_tokens": ["<s>", "</s>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    else:
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        start = {"special_tokens": ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]}
    made.train_from_iterator([TEXT + " 12 123 1234"], trainers.BpeTrainer(vocab_size=320, **start))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


@pytest.fixture(scope="module")
def made():
    return {kind: trained(kind).to_str() for kind in KINDS}


def write(folder: Path, text: str, cls: str | None, family: str | None, **config) -> Path:
    """A tokenizer's files, beside the config.json of a model where there is a family."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(text)
    values = {"bos_token": "<s>", "eos_token": "</s>", **({"tokenizer_class": cls} if cls else {}), **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    if family:
        (folder / "config.json").write_text(json.dumps({"model_type": family, "transformers_version": "4.43.0"}))
    return folder


def check_everywhere(text: str, cls: str | None, family: str, where: Path, exported: str) -> None:
    """The tokenizer of a source, of a model folder, of data made with either, and of an export are one."""
    source = write(where / "hf", text, cls, family)
    carry_tokenizer(source, where / TOKENIZER)
    (where / "export").mkdir()
    (where / "export" / "config.json").write_text(own := json.dumps({"model_type": exported}))
    export_tokenizer(where / TOKENIZER, where / "export")
    copy_tokenizer(source, where / "data" / TOKENIZER)
    assert (
        tokenizer_digest(source) == tokenizer_digest(where / TOKENIZER) == tokenizer_digest(where / "data" / TOKENIZER)
    )
    assert (where / "export" / "config.json").read_text() == own
    one = read_tokenizer(source)
    for folder in (where / TOKENIZER, where / "export"):
        other = read_tokenizer(folder)
        assert [one(text)["input_ids"] for text in probes(one)] == [other(text)["input_ids"] for text in probes(one)]
        assert difference(one, other) is None


# Each is another tokenizer where no config.json is beside it.
OTHER_ALONE = [
    ("bytes", "LlamaTokenizerFast", "qwen2"),
    ("bytes", "GPT2Tokenizer", "nemotron"),
    ("sentencepiece", "LlamaTokenizerFast", "mistral"),
    ("sentencepiece", None, "qwen3"),
]


@pytest.mark.parametrize(("kind", "cls", "family"), OTHER_ALONE)
def test_a_tokenizer_is_the_same_everywhere(made, tmp_path, kind, cls, family):
    check_everywhere(made[kind], cls, family, tmp_path, family)
    alone = write(tmp_path / "alone", made[kind], cls, None)
    assert difference(read_tokenizer(tmp_path / "hf"), read_tokenizer(alone)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_any_class_is_the_same_everywhere(made, tmp_path, kind, family):
    for cls in CLASSES:
        check_everywhere(made[kind], cls, family, tmp_path / str(cls), family)


@pytest.mark.parametrize(("kind", "cls"), [("sentencepiece", "LlamaTokenizer"), ("bytes", "GPT2Tokenizer")])
def test_a_llama_that_is_exported_as_mistral_keeps_its_tokenizer(made, tmp_path, kind, cls):
    check_everywhere(made[kind], cls, "llama", tmp_path, "mistral")


def test_an_export_whose_tokenizer_would_be_another_one_is_refused(made, tmp_path):
    """Of a model that was trained with a tokenizer of no model: Qwen2's class builds its own."""
    write(tmp_path / TOKENIZER, made["bytes"], "LlamaTokenizerFast", None)
    write(tmp_path / "export", "", None, "qwen2")
    with pytest.raises(UserError, match=r"as TokenizersBackend, and as Qwen2Tokenizer beside the export's config.json"):
        export_tokenizer(tmp_path / TOKENIZER, tmp_path / "export")


def test_data_and_models_of_one_folder_agree_and_templates_travel(made, tmp_path, caplog):
    hf = save_hf(hf_model(family="qwen2", vocab_size=330), tmp_path / "hf")
    write(hf, made["bytes"], "LlamaTokenizerFast", None)
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tools.jinja").write_text("TOOLS")
    (hf / "notes.txt").write_text("")
    caplog.set_level(logging.INFO)
    import_hf(ImportHfConfig(hf=str(hf), output=str(tmp_path / "model")))
    assert [m for m in caplog.messages if "not imported" in m] == [f"{hf}: not imported: notes.txt"]
    export_hf(ExportHfConfig(model=model_option(tmp_path / "model"), output=str(tmp_path / "back")))
    assert difference(read_tokenizer(hf), read_tokenizer(tmp_path / "back")) is None
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 330
    assert read_tokenizer(tmp_path / "back").get_chat_template("tools") == "TOOLS"
    (tmp_path / "in.txt").write_text("\n\n".join(f"{TEXT} {i * 1234}" for i in range(9)))
    for name in ("hf", "model"):
        words = {"input": str(tmp_path / "in.txt"), "validation_fraction": 0.3}
        prepare_data(
            PrepareDataConfig(model=model_option(tmp_path / name), output=str(tmp_path / f"d_{name}"), **words)
        )
    both = [(tmp_path / name / "train.bin").read_bytes() for name in ("d_hf", "d_model")]
    assert both[0] == both[1]
    check_same_tokenizer(data_of(tmp_path / "d_hf"), {"teacher": tmp_path / "model"})


def data_of(*folders: Path) -> SimpleNamespace:
    return SimpleNamespace(folders=[SimpleNamespace(path=path, results={}) for path in folders])


def with_a_space_before(text: str) -> str:
    values = json.loads(text)
    values["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    return json.dumps(values)


@pytest.mark.parametrize(
    ("changed", "family", "says"),
    [
        (with_a_space_before, "llama", "from its token"),
        (str, "qwen2", "from its token"),
        (lambda text: json.dumps(json.loads(text), indent=1), "llama", None),
        (str, "mistral", None),
    ],
    ids=["pieces", "class", "saved again", "class of the same ids"],
)
def test_data_that_were_cut_into_other_pieces_are_refused(made, tmp_path, changed, family, says):
    write(tmp_path / "data" / TOKENIZER, made["bytes"], None, "llama")
    write(tmp_path / "model" / TOKENIZER, changed(made["bytes"]), None, family)
    if says is None:
        check_same_tokenizer(data_of(tmp_path / "data"), {"teacher": tmp_path / "model"})
        return
    with pytest.raises(UserError, match=says):
        check_same_tokenizer(data_of(tmp_path / "data"), {"teacher": tmp_path / "model"})


# --- Tokens of the library --------------------------------------------------------------------------------------------


def ids_in(folder: Path) -> set[int]:
    """Ids that the JSON files of a tokenizer and of a model's configs have."""
    found: set[int] = set()
    tokenizer, config = (
        json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")
    )
    found |= {*tokenizer["model"]["vocab"].values(), *(one["id"] for one in tokenizer["added_tokens"])}
    found |= set(map(int, config.get("added_tokens_decoder", {})))
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        found |= {one for key, one in values.items() if key.endswith("_token_id") and one is not None}
    return found


@pytest.mark.parametrize("model", ["model", "hf"])
def test_a_token_that_the_library_adds_beyond_a_full_vocabulary_needs_no_row(made, tmp_path, caplog, model):
    """Of a model folder and of a Hugging Face one: no text gives it, no file has it; said once, and in nothing that is made."""
    caplog.set_level(logging.INFO, "minitron_megatron")
    save_hf(hf_model(family="qwen2", vocab_size=320), tmp_path / "hf")
    write(tmp_path / "hf", made["bytes"], "Qwen2Tokenizer", None)
    import_hf(ImportHfConfig(hf=str(tmp_path / "hf"), output=str(tmp_path / "model")))
    assert len(read_tokenizer(tmp_path / "model" / TOKENIZER)) == 321
    text = f"{TEXT} <|endoftext|> and </s>. Привет."
    (tmp_path / "in.txt").write_text("\n\n".join(f"{text} {i}" for i in range(9)))
    options = {"input": str(tmp_path / "in.txt"), "model": model_option(tmp_path / model), "workers": 1}
    for special in ("text", "token"):
        prepare_data(PrepareDataConfig(**options, output=str(tmp_path / special), special_tokens=special))
        results = read_manifest(tmp_path / special)["results"]
        assert results["vocab_size"] == 320 and np.fromfile(tmp_path / special / "train.bin", "<u2").max() < 320
    tokenizer = load_tokenizer(tmp_path / model)
    assert max(tokenizer.get_vocab().values()) == 319 and tokenizer.pad_token is None and tokenizer.unk_token_id is None
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    (said,) = (one.getMessage() for one in caplog.records if "left out: transformers adds it" in one.getMessage())
    assert "<|endoftext|>" in said and "320 rows" in said
    if model == "model":
        export_hf(ExportHfConfig(model=model_option(tmp_path / "model"), output=str(tmp_path / "out")))
        assert max(ids_in(tmp_path / "out")) == 319
        kept = choose_tokens(tmp_path / "model" / TOKENIZER, np.arange(320, 0, -1), 290)
        write_tokenizer(tmp_path / "model" / TOKENIZER, tmp_path / "cut", kept, 320)
        assert max(ids_in(tmp_path / "cut")) == 289


def test_a_token_that_a_file_has_beyond_the_models_rows_is_refused(made, tmp_path):
    """With its id, or by its name alone: a text could give it."""
    save_hf(hf_model(family="qwen2", vocab_size=320), tmp_path / "hf")
    for more in ({"pad_token": "<|endoftext|>"}, {"added_tokens_decoder": decoder("<|endoftext|>")}):
        write(tmp_path / "hf", made["bytes"], "Qwen2Tokenizer", None, **more)
        with pytest.raises(UserError, match="its tokenizer has a vocabulary of 321, the model of 320"):
            check_vocabulary(tmp_path / "hf", load_tokenizer(tmp_path / "hf"))
    write(tmp_path / "hf", made["bytes"], "Qwen2Tokenizer", None, chat_template="{{ x }}<|endoftext|>")
    assert check_vocabulary(tmp_path / "hf", load_tokenizer(tmp_path / "hf")) == 320


# --- Cut vocabularies -------------------------------------------------------------------------------------------------


def decoder(*tokens: str, first: int = 320) -> dict:
    shared = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {str(i): {"content": t, "special": t != "<tool>", **shared} for i, t in enumerate(tokens, first)}


@pytest.mark.parametrize(
    ("config", "more", "added"),
    [
        ({"added_tokens_decoder": decoder("<|im_start|>", "<|im_end|>", "<tool>"), "eos_token": "<|im_end|>"}, None, 3),
        ({"pad_token": "<pad>"}, {"<pad>": 320}, 1),
        ({"pad_token": "<pad>"}, None, 1),
    ],
    ids=["of the config", "of added_tokens.json", "named alone"],
)
def test_tokens_that_stand_outside_tokenizer_json_stay(made, tmp_path, config, more, added):
    source = write(tmp_path / TOKENIZER, made["bytes"], "PreTrainedTokenizerFast", "llama", **config)
    if more:
        (source / "added_tokens.json").write_text(json.dumps(more))
    own = read_tokenizer(source)
    assert len(own) == 320 + added
    kept = choose_tokens(source, np.arange(330, 0, -1), 290)
    write_tokenizer(source, tmp_path / "cut", kept)
    cut = read_tokenizer(tmp_path / "cut")
    assert max(cut.get_vocab().values()) == 289 and own.get_added_vocab().keys() == cut.get_added_vocab().keys()
    assert (cut.eos_token, cut.pad_token) == (own.eos_token, own.pad_token)
    text = "The <|im_start|>quick<tool>fox<pad><|im_end|>"
    assert (
        cut.convert_ids_to_tokens(cut(text)["input_ids"])[-1:] == own.convert_ids_to_tokens(own(text)["input_ids"])[-1:]
    )
    assert cut.decode(cut(text)["input_ids"]) == own.decode(own(text)["input_ids"])
    if more:
        assert json.loads((tmp_path / "cut" / "added_tokens.json").read_text()) == {"<pad>": 289}


def test_a_cut_that_does_not_fit_the_model_is_refused(made, tmp_path):
    source = write(tmp_path / TOKENIZER, made["bytes"], None, "llama", pad_token="<pad>")
    with pytest.raises(UserError, match="has token 320, and the model beside it a vocabulary of 320"):
        choose_tokens(source, np.ones(320), 290)
    kept = np.array([*range(290), 320])
    with pytest.raises(UserError, match="vocab leaves out token 320, a special"):
        write_tokenizer(source, tmp_path / "cut", kept[:-1])
    write_tokenizer(source, tmp_path / "cut", kept)
    write(tmp_path / "cut", (tmp_path / "cut" / "tokenizer.json").read_text(), None, "llama", unk_token="<unk>")
    with pytest.raises(UserError, match=r"the cut tokenizer of \S+ has none for token '<pad>', and the cut model 290"):
        _check_written(source, tmp_path / "cut", numbered(kept))


@pytest.mark.parametrize("vocabulary", [SMALL_SHAPE.vocab_size - 1, SMALL_SHAPE.vocab_size + 1])
def test_a_teacher_has_the_vocabulary_of_its_student(vocabulary):
    teacher = replace(SMALL_SHAPE, vocab_size=vocabulary)
    with pytest.raises(UserError, match="has a vocabulary of"):
        distill_checks.check_pair(teacher, SMALL_SHAPE, None, Layout())
    with pytest.raises(UserError, match="has a vocabulary of"):
        evaluate_checks.check_teacher(teacher, SMALL_SHAPE)
    evaluate_checks.check_teacher(SMALL_SHAPE, SMALL_SHAPE.resized(num_layers=3))
