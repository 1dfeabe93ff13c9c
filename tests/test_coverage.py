"""Text that a tokenizer cannot write is counted and said by whatever reads it; most of a text is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from minitron_megatron.checkpoints.folder import read_manifest
from minitron_megatron.config import ModelConfig, PrepareDataConfig
from minitron_megatron.data.coverage import Coverage, Losses
from minitron_megatron.data.encoding import Encoder
from minitron_megatron.data.estimate import estimate_tokens
from minitron_megatron.data.prepare import prepare_data
from minitron_megatron.data.questions import encode_all
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.evaluate.answers import check_written
from tests.test_encoding import written
from tests.tiny import TEXT

WORDS = (TEXT + " It was 1984: 'no', she said; \"yes\"! " + TEXT.upper()) * 2
BYTES = [f"<0x{number:02X}>" for number in range(256)]
SPECIAL = ["<unk>", "</s>"]


def trained(kind: str) -> Tokenizer:
    """A tokenizer of English: by bytes, by characters with and without a token for what it does not know, by words."""
    unknown = {"unknown": {"unk_token": "<unk>"}, "refusing": {"unk_token": "<none>"}}.get(kind, {})
    model = (
        models.WordLevel(**unknown)
        if kind in ("words", "refusing")
        else models.BPE(byte_fallback=kind == "fallback", **unknown)
    )
    made = Tokenizer(model)
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind in ("words", "refusing"):
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif kind != "characters":
        made.pre_tokenizer = pre_tokenizers.Metaspace()
    if kind == "folded":
        made.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    special = [*SPECIAL, *(BYTES if kind == "fallback" else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
    of = {"special_tokens": special, "vocab_size": 600}
    trainer = (
        trainers.WordLevelTrainer(**of)
        if kind in ("words", "refusing")
        else trainers.BpeTrainer(**of, initial_alphabet=alphabet)
    )
    made.train_from_iterator([WORDS], trainer)
    return made


def loaded(kind: str, folder: Path):
    return load_tokenizer(written_with_unknown(kind, folder))


def written_with_unknown(kind: str, folder: Path) -> Path:
    written(trained(kind), folder, None, "</s>")
    if kind == "unknown":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>"}))
    return folder


# Of "fox Привет é lazy": how many characters are lost, and the first that is told.
LOST = {
    "bytes": (0, ""),
    "fallback": (0, ""),
    "byteless": (7, "П"),
    "characters": (7, "П"),
    "unknown": (7, "П"),
    # Its config does not name the token.
    "words": (7, "Привет"),
    "folded": (6, "П"),
    "refusing": (0, ""),
}


@pytest.mark.parametrize("kind", LOST)
def test_what_a_tokenizer_cannot_write_is_counted(tmp_path, monkeypatch, kind):
    tokenizer = loaded(kind, tmp_path)
    coverage, (count, example) = Coverage(tokenizer), LOST[kind]
    assert coverage.whole == (count == 0)
    if kind == "refusing":
        return
    lost, first = coverage.lost("fox Привет é lazy")
    assert (lost, first) == (count, example)
    # By the ids that are known; twice the same; nothing of a text of its own.
    ids = tokenizer("fox Привет é lazy", add_special_tokens=False)["input_ids"]
    assert coverage.lost("fox Привет é lazy", ids) == (count, example)
    assert coverage.lost("fox lazy") == (0, "") and coverage.lost("") == (0, "")
    if coverage.whole:
        monkeypatch.setattr(coverage, "_ids", lambda *_, **__: pytest.fail("time is taken where nothing is lost"))
        assert coverage.lost("Привет") == (0, "")


def test_losses_are_told_up_to_half_of_a_text_and_refused_from_there(caplog):
    losses = Losses()
    losses.say()
    losses.add(10, 0, "", "a")
    losses.add(10, 3, "П", "b")
    losses.add(10, 12, "я", "c")
    losses.say()
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(
        "50 % of the characters of the text have no token in this tokenizer (as 'П' in b): they are left"
    )
    losses.add(1, 1, "я", "c")
    with pytest.raises(UserError, match=r"52 % of the characters .* give text, or a model, whose tokenizer") as refused:
        losses.say()
    assert "\n" not in str(refused.value)


def prepared(folder: Path, texts: list[str], kind: str, **options) -> Path:
    """A data folder of documents in two files, by a tokenizer in a folder of its own."""
    (folder / "in").mkdir(exist_ok=True)
    for name, part in (("a", texts[::2]), ("b", texts[1::2])):
        (folder / "in" / f"{name}.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in part))
    model = written_with_unknown(kind, folder / kind)
    cfg = PrepareDataConfig(
        input=str(folder / "in"), output=str(folder / "out"), model=ModelConfig(path=str(model)), workers=1, **options
    )
    prepare_data(cfg)
    return folder / "out"


@pytest.mark.parametrize("kind", ["bytes", "byteless", "unknown"])
def test_prepared_data_say_what_is_lost(tmp_path, caplog, kind):
    """In one line, and in the manifest; where every text can be written there is nothing to say."""
    texts = [TEXT, f"{TEXT} Привет", TEXT, f"{TEXT} мир"] * 5
    found = read_manifest(prepared(tmp_path, texts, kind))["results"]
    warned = [
        record.getMessage()
        for record in caplog.records
        if record.levelname == "WARNING" and "no token" in record.message
    ]
    assert found["characters"] == sum(map(len, texts))
    if kind == "bytes":
        assert found["characters_lost"] == 0 and "first_lost" not in found and not warned
        return
    assert found["characters_lost"] == 5 * len("Приветмир")
    assert found["first_lost"] == {"text": "П", "file": str(tmp_path / "in" / "b.jsonl")}
    (said,) = warned
    assert f"(as 'П' in {tmp_path / 'in' / 'b.jsonl'})" in said


@pytest.mark.parametrize("kind", ["byteless", "unknown"])
def test_a_text_that_is_mostly_lost_is_refused(tmp_path, kind):
    texts = [f"Документ {i}: Съешь же ещё этих мягких французских булок, да выпей чаю." for i in range(20)]
    with pytest.raises(UserError, match="of the characters of the text have no token in this tokenizer") as refused:
        prepared(tmp_path, texts, kind)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
    tokenizer = load_tokenizer(tmp_path / kind)
    with pytest.raises(UserError, match="no token in this tokenizer"):
        estimate_tokens(sorted((tmp_path / "in").iterdir()), "text", Encoder(tokenizer))


@pytest.mark.parametrize("read", ["questions", "tasks"])
def test_questions_and_tasks_follow_the_same_rule(tmp_path, caplog, read):
    def ask(tokenizer, context: str, choice: str) -> None:
        if read == "questions":
            encode_all(tokenizer, SimpleNamespace(texts=lambda: [(context, choice, "q.jsonl:1")]), 10**6)
        else:
            check_written(tokenizer, [SimpleNamespace(args=(context, choice), task_name="t", doc_id=1)])

    tokenizer, where = (
        loaded("byteless", tmp_path / "byteless"),
        {"questions": "q.jsonl:1", "tasks": r"tasks=\[t\], document 1"},
    )
    ask(tokenizer, TEXT, " fox")
    assert not caplog.records
    ask(tokenizer, TEXT, " fox Ж")
    (said,) = caplog.records
    assert "(as 'Ж' in " in said.getMessage()
    with pytest.raises(UserError, match=rf"no token in this tokenizer \(as 'П' in {where[read]}\)"):
        ask(tokenizer, "Привет, мир и все остальные", " dog")
    ask(loaded("bytes", tmp_path / "bytes"), "Привет, мир и все остальные", " dog")
    assert len(caplog.records) == 1
