"""What is taken in blocks is the same for any size of a block: of 1, of 7, which nothing divides, and of 64."""

import io
import tarfile

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from minitron_megatron.checkpoints import archive, digests, hf, reading, weights
from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.config import (
    ExportHfConfig,
    ImportHfConfig,
    ModelConfig,
    PruneConfig,
    PruneOptions,
    TargetConfig,
)
from minitron_megatron.data import indexed, text
from minitron_megatron.data.indexed import Split, SplitWriter, beside
from minitron_megatron.distill.choices import Divergence
from minitron_megatron.distill.losses import top_k
from minitron_megatron.errors import UserError
from minitron_megatron.importance import statistics
from minitron_megatron.models import fp8, vocab_parallel
from minitron_megatron.models.axes import slots
from minitron_megatron.models.fp8 import Fp8Matrix
from minitron_megatron.models.head import Head, fused_loss, terms_of
from minitron_megatron.prune.prune import prune_model
from tests.test_checkpoints import tensors_of
from tests.test_distill import KINDS, VOCABULARY
from tests.test_prune import random_scores, write_scores
from tests.through_head import distance, label_loss
from tests.tiny import hf_model, save_hf

BLOCKS = (1, 7, 64)
ROWS, WIDTH = (23, 3), 320


def drawn(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logits(seed):
    """[s, b, V] of 69 different rows; padding is high."""
    found = drawn(seed, *ROWS, WIDTH) * 3
    found[..., VOCABULARY:] += 20
    return found


def labels():
    return torch.randint(0, VOCABULARY, ROWS, generator=torch.Generator().manual_seed(5))


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(
            found[name], values, rtol=1e-11, atol=1e-12, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize("rows", BLOCKS)
@pytest.mark.parametrize(
    "how", [*KINDS, Divergence(temperature=2.0)], ids=lambda how: f"{how.kind}-{how.rest}-{how.temperature}"
)
def test_losses_and_their_gradients(alone, monkeypatch, how, rows):
    """Blocks of pieces and pieces of a step: every term of every token, labels, weights and top K of its own row."""
    weights_of_tokens = torch.rand(*ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    more = {"labels": labels(), "cross_entropy": 0.25, "measure": True}

    def found(piece, targets):
        asked = {"vocab_size": VOCABULARY, "group": alone, "logits_bytes": piece * WIDTH * 8}
        return distance(logits(0), targets, how, weights_of_tokens, **asked, **more)

    given = [logits(1)]
    if how.kind == "topk_kl":
        given.append(top_k(logits(1), how.top_k, vocab_size=VOCABULARY, temperature=how.temperature, group=alone))
    for targets in given:
        wanted, gradient = found(10**4, targets)
        with monkeypatch.context() as patch:
            patch.setattr(vocab_parallel, "CPU_BLOCK_ELEMENTS", rows * WIDTH)
            for piece in (rows, 10**4):
                terms, mine = found(piece, targets)
                same(terms, wanted)
                torch.testing.assert_close(mine, gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rows", BLOCKS)
def test_what_is_measured_of_logits(alone, monkeypatch, rows):
    over = {"vocab_size": VOCABULARY, "group": alone}

    def found():
        chosen = top_k(logits(3), 9, **over)
        return {
            "nll": vocab_parallel.vocab_parallel_nll(logits(3), labels(), **over),
            "entropy": vocab_parallel.vocab_parallel_entropy(logits(3), **over),
            "most probable": vocab_parallel.vocab_parallel_argmax(logits(3), **over),
            **chosen._asdict(),
        }

    wanted = found()
    monkeypatch.setattr(vocab_parallel, "CPU_BLOCK_ELEMENTS", rows * WIDTH)
    same(found(), wanted)


@pytest.mark.parametrize("rows", BLOCKS)
@pytest.mark.parametrize("main", [None, torch.float64, torch.float32], ids=["own", "main", "other"])
def test_a_matrix_gets_the_gradients_of_all_pieces(alone, rows, main):
    """In a tensor of its own, or added to what is in its main_grad, which the total's gradient of 1 leaves as it is."""
    states, mask = drawn(0, *ROWS, 8), (torch.arange(ROWS[0] * ROWS[1]).view(ROWS) % 5 > 0).double()
    before = drawn(4, WIDTH, 8)

    def squares(found, some, weight):
        loss = found.square().sum(-1)
        if weight is not None:
            found.mul_(2 * weight[:, None])
        return {"loss": loss}

    def gradients(piece):
        matrix = drawn(1, WIDTH, 8).requires_grad_()
        mine = states.clone().requires_grad_()
        if main is not None:
            matrix.main_grad = before.to(main, copy=True)
        total, terms = fused_loss(Head(mine, matrix), squares, mask, logits_bytes=piece * WIDTH * 8)
        alone_terms = terms_of(Head(mine, matrix), squares, logits_bytes=piece * WIDTH * 8)
        assert torch.equal(terms["loss"], alone_terms["loss"])
        total.backward()
        return total.detach(), mine.grad, matrix.grad if main is None else matrix.main_grad

    plain, matrix = states.clone().requires_grad_(), drawn(1, WIDTH, 8).requires_grad_()
    wanted = ((plain @ matrix.t()).square().sum(-1) * mask).sum()
    wanted.backward()
    total, of_states, of_matrix = gradients(rows)
    exact = {"rtol": 1e-10, "atol": 1e-9} if main is not torch.float32 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(total, wanted.detach())
    torch.testing.assert_close(of_states, plain.grad)
    torch.testing.assert_close(of_matrix.double(), matrix.grad + (0 if main is None else before), **exact)


@pytest.mark.parametrize("rows", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_a_sequence(monkeypatch, rows, dtype):
    """Of activations [s, b, c], of their heads, and of the cosines of two; a zero vector's cosine is 0."""
    before, after = (drawn(seed, 130, 2, 12).to(dtype) for seed in (1, 2))
    before[3, 1] = 0
    monkeypatch.setattr(statistics, "_BLOCK", rows * 24)
    a, heads = before.double(), before.double().unflatten(-1, (3, 4)).norm(dim=-1)
    wanted = {"mean": lambda x: [x.abs().sum(0)], "l2": lambda x: [x.square().sum(0)]}
    wanted["variance"] = lambda x: [x.sum(0), x.square().sum(0)]
    for how, sums in wanted.items():
        found, of_heads = statistics.partial_sums(before, how), statistics.partial_head_sums(before, 4, how)
        torch.testing.assert_close(found.sum(1).double(), torch.stack(sums(a)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(of_heads.sum(1).double(), torch.stack(sums(heads)), rtol=1e-4, atol=1e-4)
    cosines = torch.nn.functional.cosine_similarity(a, after.double(), dim=-1).sum(0)
    torch.testing.assert_close(statistics.cosine_sums(before, after).double(), cosines, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", BLOCKS)
def test_rows_of_a_matrix_in_fp8(monkeypatch, rows):
    matrix = drawn(0, 69, 16).float() * torch.logspace(-3, 3, 69)[:, None]
    wanted = Fp8Matrix.of(matrix)
    monkeypatch.setattr(fp8, "_ROWS", rows)
    found = Fp8Matrix.of(matrix)
    assert torch.equal(found.values.float(), wanted.values.float()) and torch.equal(found.scale, wanted.scale)


TARGET = {"num_layers": 2, "hidden_size": 12, "ffn_hidden_size": 18, "num_attention_heads": 2, "num_query_groups": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Hugging Face folder."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    model = hf_model(**sizes, num_key_value_heads=2, head_dim=4)
    return save_hf(model, tmp_path_factory.mktemp("source") / "hf", torch.bfloat16)


def made(source, folder):
    """The model, what is left of it (groups averaged, heads merged, layers and channels cut), and the export of that."""
    model, small = (ModelConfig(path=str(folder / name)) for name in ("model", "small"))
    hf.import_hf(ImportHfConfig(hf=str(source), output=model.path))
    scores = write_scores(random_scores(folder / "model"), folder / "scores")
    how = {"target": TargetConfig(**TARGET), "prune": PruneOptions(groups="mean", heads="merge")}
    prune_model(PruneConfig(model=model, scores=str(scores), output=small.path, **how))
    hf.export_hf(ExportHfConfig(model=small, output=str(folder / "hf")))
    found = {f"hf {name}": tensor for name, tensor in tensors_of(folder / "hf").items()}
    for name in ("model", "small"):
        opened = open_model_folder(folder / name)
        reader, shape = WeightReader(opened.weights), opened.shape
        found |= {f"{name} {slot.row.name} {slot.layer}": reader.read_slot(slot, shape) for slot in slots(shape)}
    return found


@pytest.fixture(scope="module")
def at_once(source, tmp_path_factory):
    """All tensors, made in one block each."""
    return made(source, tmp_path_factory.mktemp("at_once"))


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), *BLOCKS[1:]])
def test_models_on_disk(source, at_once, tmp_path, monkeypatch, rows):
    """Chunks of so many rows of the widest tensor, read in spans of as many: each bit of each tensor."""
    for module in (weights, hf):
        monkeypatch.setattr(module, "BLOCK_BYTES", rows * 24 * 2)
    monkeypatch.setattr(reading, "SPAN_BYTES", rows * 24 * 2)
    found = made(source, tmp_path)
    assert found.keys() == at_once.keys()
    assert [name for name, tensor in at_once.items() if not torch.equal(found[name], tensor)] == []
    stored = WeightReader(tmp_path / "model" / "weights").metadata.state_dict_metadata[
        "embedding.word_embeddings.weight"
    ]
    assert len(stored.chunks) > 9


@pytest.mark.parametrize("rows", BLOCKS)
def test_rows_of_parquet(tmp_path, monkeypatch, rows):
    file, documents = tmp_path / "a.parquet", [f"document {i}" for i in range(130)]
    parquet.write_table(pyarrow.table({"text": documents}), file, row_group_size=50)
    monkeypatch.setattr(text, "_ROWS_AT_ONCE", rows)
    assert list(text.documents(file, "text")) == documents
    documents[99] = None
    parquet.write_table(pyarrow.table({"text": documents}), file, row_group_size=50)
    with pytest.raises(UserError, match="row 100 has no text"):
        list(text.documents(file, "text"))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("place", [0, 63, 64, 129])
def test_token_ids_are_looked_at_to_the_last(tmp_path, monkeypatch, block, place):
    """Whole, wherever the wrong one is; at a glance, in the first and in the last block of many."""
    monkeypatch.setattr(indexed, "_BLOCK", block)
    monkeypatch.setattr(indexed, "_BLOCKS", 2)
    ids = np.arange(130, dtype=np.uint16) % 100
    with SplitWriter(tmp_path / "train", ids.dtype) as writer:
        writer.add(ids)
        writer.finish()
    split = Split(tmp_path / "train", ids.dtype, 1, 1, len(ids))
    split.check_ids(100, "train", whole=True)
    split.check_ids(100, "train")
    ids[place] = 100
    beside(tmp_path / "train", ".bin").write_bytes(ids.tobytes())
    for whole in (True, False) if place in (0, 129) else (True,):
        with pytest.raises(UserError, match="token id 100 is not of the vocabulary of 100"):
            split.check_ids(100, "train", whole=whole)


def test_a_label_may_be_any_token(alone):
    """The first and the last one of the vocabulary too."""
    every = torch.arange(VOCABULARY)
    rows = drawn(9, VOCABULARY, 1, WIDTH)
    found = vocab_parallel.vocab_parallel_nll(rows, every[:, None], vocab_size=VOCABULARY, group=alone)
    wanted = -torch.log_softmax(rows[..., :VOCABULARY], -1).gather(-1, every[:, None, None])[..., 0]
    torch.testing.assert_close(found, wanted)
    weights_of_tokens = torch.ones(VOCABULARY, 1, dtype=torch.float64)
    terms, gradient = label_loss(rows, every[:, None], weights_of_tokens, vocab_size=VOCABULARY, group=alone)
    torch.testing.assert_close(terms["loss"], wanted)
    assert (gradient[every, 0, every] < 0).all() and (gradient[..., VOCABULARY:] == 0).all()


@pytest.mark.parametrize("size", BLOCKS)
def test_files_of_an_archive(tmp_path, monkeypatch, size):
    """Of a few blocks, of none, and of one that is full."""
    contents = {"a/long": bytes(range(130)), "empty": b"", "full": b"x" * size}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(archive, "_COPY_BYTES", size)
    (tmp_path / "out").mkdir()
    written = []
    archive.Archive(tmp_path / "x.tar").extract(tmp_path / "out", lambda _: True, written.append)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in contents} == contents
    assert sum(written) == 130 + size and max(written) <= size


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("segment", [1, 7, 64, 200])
def test_digests_of_files(block, segment, tmp_path, monkeypatch):
    """Every byte of a segment, whatever is read at once."""
    monkeypatch.setattr(digests, "_BLOCK_BYTES", block)
    monkeypatch.setattr(digests, "SEGMENT_BYTES", segment)
    data = bytes(range(100)) + bytes(30)
    (tmp_path / "f").write_bytes(data)
    wanted = [digests.blake3(data[at : at + segment]).hexdigest() for at in range(0, len(data), segment)]
    assert list(digests.digest_files(tmp_path, ["f"])["f"].segments) == wanted
