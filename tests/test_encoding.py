"""What stands between documents, and that text is text: tokenizers of chats, with a BOS, and of several models."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.config import AdoptDataConfig, PrepareDataConfig
from minitron_megatron.data.adopt import adopt_data
from minitron_megatron.data.encoding import Encoder, special_ids
from minitron_megatron.data.estimate import estimate_tokens
from minitron_megatron.data.folder import open_data
from minitron_megatron.data.indexed import SplitWriter
from minitron_megatron.data.prepare import prepare_data
from minitron_megatron.data.text import find_files
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import UserError
from tests.tiny import TEXT, hf_model, imported, model_option

CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tokenizer_folder(folder: Path, special: list[str], *, bos: str | None, eos: str, adds_bos: bool = False) -> Path:
    """A byte-level BPE tokenizer with these special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
        )
    return written(made, folder, bos, eos)


def written(made: Tokenizer, folder: Path, bos: str | None, eos: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, **({"bos_token": bos} if bos else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return load_tokenizer(tokenizer_folder(tmp_path_factory.mktemp("chat"), CHAT, bos=CHAT[1], eos=CHAT[2]))


def test_a_special_tokens_string_is_text_unless_asked_for(chat):
    text = "The fox writes <|im_end|> and <|endoftext|>, <|im_start|>then jumps."
    spelled, read = Encoder(chat), Encoder(chat, special_tokens="token")
    assert not set(spelled(text)[:-1]) & set(special_ids(chat).values()) and chat.decode(spelled(text)[:-1]) == text
    assert [i for i in read(text)[:-1] if i < 3] == [2, 0, 1] and chat.decode(read(text)[:-1]) == text
    assert spelled.names_tokens(text) and not spelled.names_tokens(TEXT)
    assert spelled(TEXT) == read(TEXT)
    assert (spelled.results()["special_tokens"], read.results()["special_tokens"]) == ("text", "token")


@given(st.lists(st.sampled_from([*CHAT, "<|", "|>", "im_end", " ", "fox", "\n", "é"]), max_size=12).map("".join))
def test_whatever_the_text_it_stays_that_text_and_no_border(chat, text):
    ids = Encoder(chat)(text)
    assert ids.count(ids[-1]) == 1 and chat.decode(ids[:-1]) == text


def test_the_end_of_a_turn_does_not_end_a_document(chat):
    encoder = Encoder(chat)
    assert encoder.results() == {
        "end_of_document": 0,
        "end_of_document_token": "<|endoftext|>",
        "begin_of_document": None,
        "begin_of_document_token": None,
        "special_tokens": "text",
    }
    assert str(encoder) == (
        "nothing opens a document, <|endoftext|> ends it (the tokenizer's own end, <|im_end|>, does not)"
    )
    asked = Encoder(chat, end="<|im_end|>", begin="<|im_start|>")
    assert asked("a") == [1, *Encoder(chat)("a")[:-1], 2]
    for option in ("begin", "end"):
        with pytest.raises(
            UserError, match=rf"{option}_of_document=</s> is no special token .*: use one of <|endoftext"
        ):
            Encoder(chat, **{option: "</s>"})


@pytest.mark.parametrize(
    ("special", "bos", "eos", "adds", "opens", "ends"),
    [
        (["<s>", "</s>"], "<s>", "</s>", False, None, "</s>"),
        (["<s>", "</s>"], "<s>", "</s>", True, "<s>", "</s>"),
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|begin_of_text|>", "<|eot_id|>", True, 0, 1),
        (["<|im_end|>"], None, "<|im_end|>", False, None, "<|im_end|>"),
        (["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>", True, "<|endoftext|>", "<|endoftext|>"),
    ],
    ids=["no BOS of its own", "BOS", "chat with BOS", "chat alone", "one token for both"],
)
def test_documents_are_opened_as_the_tokenizer_opens_texts(tmp_path, special, bos, eos, adds, opens, ends):
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, special, bos=bos, eos=eos, adds_bos=adds))
    encoder = Encoder(tokenizer)
    opens, ends = (special[one] if isinstance(one, int) else one for one in (opens, ends))
    assert (encoder.begin_token, encoder.end_token) == (opens, ends)
    ids, plain = encoder("fox"), tokenizer("fox", add_special_tokens=False)["input_ids"]
    # One token between two documents, not two.
    begin = [] if opens in (None, ends) else [special.index(opens)]
    assert ids == [*begin, *plain, special.index(ends)]
    assert Encoder(tokenizer, begin="none")("fox") == [*plain, special.index(ends)]
    if begin:
        assert Encoder(tokenizer, special_tokens="token")(f"{opens}fox") == ids


def test_a_model_that_looks_up_whole_pieces_spells_them_too(tmp_path):
    scores = {"<unk>": 0.0, "</s>": 0.0, "\u2581": -2.0, "a": -3.0, "<": -5.0, "/": -5.0, "s": -5.0, ">": -5.0}
    made = Tokenizer(models.Unigram(list(scores.items()), 0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>"])
    tokenizer = load_tokenizer(written(made, tmp_path / "unigram", None, "</s>"))
    assert tokenizer("a</s>a", add_special_tokens=False, split_special_tokens=True)["input_ids"].count(1) == 1
    ids = Encoder(tokenizer)("a</s>a")
    assert ids.count(1) == 1 and ids[-1] == 1 and tokenizer.decode(ids[:-1]).replace(" ", "") == "a</s>a"
    words = Tokenizer(models.WordLevel({"$": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["$"])
    encoder = Encoder(load_tokenizer(written(words, tmp_path / "words", None, "$")))
    with pytest.raises(UserError, match=r"special token '\$' of plain text, too: use special_tokens=token"):
        encoder("a $ a")


# In data folders


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder whose tokenizer ends turns of a chat."""
    folder = tmp_path_factory.mktemp("model")
    path = imported(hf_model(), folder)
    for file in (path / "tokenizer").iterdir():
        file.unlink()
    tokenizer_folder(path / "tokenizer", CHAT, bos=CHAT[1], eos=CHAT[2])
    manifest = (path / "manifest.yaml").read_text()
    lines = [line for line in manifest.splitlines(keepends=True) if not line.startswith("  tokenizer/")]
    (path / "manifest.yaml").write_text("".join(lines))
    return path


@pytest.fixture
def text(tmp_path):
    texts = [f"Document {i}: {TEXT}{'<|endoftext|>' if i % 10 == 0 else ''}" for i in range(40)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    return tmp_path / "in.jsonl"


def prepared(model, text, output, **options):
    options = {"validation_fraction": 0.25, "workers": 1, **options}
    prepare_data(PrepareDataConfig(input=str(text), model=model_option(model), output=str(output), **options))
    return output


def tokens_of(folder, split):
    dtype = np.dtype(read_manifest(folder)["results"]["token_dtype"])
    return np.fromfile(folder / f"{split}.bin", dtype)


def test_the_manifest_says_what_is_between_documents(model, text, tmp_path, caplog):
    caplog.set_level("INFO", "minitron_megatron")
    out = prepared(model, text, tmp_path / "out")
    said = "4 documents have a special token's string in their text, which {} (special_tokens=)"
    assert said.format("stays text") in caplog.messages and str(Encoder(load_tokenizer(model))) in caplog.messages
    results, tokenizer = read_manifest(out)["results"], load_tokenizer(model)
    assert results | Encoder(tokenizer).results() == results
    assert results["documents_with_special_tokens"] == 4
    for split in ("train", "validation"):
        tokens = tokens_of(out, split)
        assert (tokens == 0).sum() == results[split]["documents"] and not (tokens == 2).any()
    asked = {"begin_of_document": "<|im_start|>", "end_of_document": "<|im_end|>", "special_tokens": "token"}
    other = prepared(model, text, tmp_path / "other", **asked)
    assert said.format("became the token") in caplog.messages
    documents = sum(read_manifest(other)["results"][split]["documents"] for split in ("train", "validation"))
    found = np.concatenate([tokens_of(other, split) for split in ("train", "validation")])
    assert [int((found == one).sum()) for one in (0, 1, 2)] == [4, documents, documents]
    with pytest.raises(UserError, match=r"end_of_document differ\): a blend needs one"):
        open_data([str(out), str(other)], "train", open_model_folder(model).shape, 16)


def test_what_is_foreseen_is_what_is_prepared(model, text, tmp_path):
    for number, options in enumerate(({}, {"begin_of_document": "<|im_start|>"})):
        cfg = PrepareDataConfig(input=str(text), model=model_option(model), output="", **options)
        foreseen = estimate_tokens(find_files(str(text)), "text", Encoder.of(load_tokenizer(model), cfg))
        results = read_manifest(prepared(model, text, tmp_path / str(number), **options))["results"]
        assert foreseen == (sum(results[split]["tokens"] for split in ("train", "validation")), True)


@pytest.mark.parametrize(("ends", "opens"), [(2, None), (0, 1)])
def test_adopted_data_say_what_their_documents_end_in(model, tmp_path, ends, opens):
    for split in ("train", "validation"):
        with SplitWriter(tmp_path / split, np.dtype(np.uint16)) as writer:
            for i in range(9):
                writer.add(np.array([*([] if opens is None else [opens]), 50 + i, 60, ends], np.uint16))
            writer.finish()
    cfg = AdoptDataConfig(
        train=str(tmp_path / "train"),
        validation=str(tmp_path / "validation"),
        model=model_option(model),
        output=str(tmp_path / "out"),
    )
    adopt_data(cfg)
    results = read_manifest(tmp_path / "out")["results"]
    assert (results["end_of_document"], results["begin_of_document"]) == (ends, opens)
    assert results["end_of_document_token"] == CHAT[ends]
