"""Checkpoints step by step, without a model: what is written beside the tensors, and what a load puts where."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_megatron.checkpoints.digests import FileDigest, digest_files
from minitron_megatron.config import TrainerConfig
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.train import checkpoint, saved
from minitron_megatron.train.saved import OfRun, Written

OF_RUN = OfRun("me", {"seed": 1}, {"data": "d"}, "float32")


def saver(folder: Path, **options) -> checkpoint.Saver:
    found = object.__new__(checkpoint.Saver)
    vars(found).update(folder=folder, layout=Layout(), options=TrainerConfig(**options), of_run=OF_RUN)
    return found


def test_a_checkpoint_is_begun_in_a_folder_of_a_name_of_its_own(tmp_path):
    """What killed runs have left is gone; what is whole, or has another name, stays."""
    folder = tmp_path / "run" / "checkpoints"
    one = saver(folder)._begin("step_00000003")
    assert one.is_dir() and one.parent == folder and one.name.startswith(".step_00000003.") and one.suffix == ".partial"
    (one / "__0_0.distcp").touch()
    for name in ("step_00000002", ".other.partial", "damaged_step_00000001"):
        (folder / name).mkdir()
    other = saver(folder)._begin("step_00000003")
    assert other != one and not one.exists()
    assert {path.name for path in folder.iterdir()} == {
        "step_00000002", ".other.partial", "damaged_step_00000001", other.name
    }  # fmt: skip


def test_a_rank_notes_digests_of_what_it_has_written(tmp_path):
    """And none where its writer has not written everything."""
    for count, noted in ((2, True), (1, False), (0, False)):
        folder = tmp_path / str(count)
        folder.mkdir()
        buckets = [(str(folder / f"__1_{n}.distcp"), "a key", n) for n in range(2)]

        def write(rank, given, results, count=count, buckets=buckets):
            assert (rank, given, results) == (1, buckets, "results")
            for path, *_ in given[:count]:
                Path(path).write_bytes(path.encode())

        checkpoint._write_and_digest(write, 2, 1, buckets, "results")
        note = folder / ".digests_1.json"
        assert note.is_file() is noted
        if noted:
            found = {name: FileDigest.from_json(one) for name, one in json.loads(note.read_text()).items()}
            assert found == digest_files(folder, [Path(path).name for path, *_ in buckets])


@pytest.mark.parametrize(("fp8", "scales"), [("delayed", True), ("none", False)])
def test_a_checkpoint_says_what_is_in_it(tmp_path, fp8, scales):
    """Files of the ranks by their digests, and those of rank 0 beside them; figures that are numbers; what the run is."""
    for name in ("__0_0.distcp", ".metadata", "metadata.json", ".digests_1.json", "common"):
        (tmp_path / name).write_text(name)
    (own,) = digest_files(tmp_path, ["__0_0.distcp"]).values()
    one = saver(tmp_path, checkpoint_format="dp_reshardable", keep_best=True, fp8=fp8)
    figures = {"loss": 2.0, "validation_loss": math.nan, "other": math.inf}
    one._describe(tmp_path, 7, {"__0_0.distcp": own.to_json()}, figures)
    found = Written.read(tmp_path)
    assert list(found.files) == [".metadata", "__0_0.distcp", "common", "metadata.json"]
    assert found.files == digest_files(tmp_path, found.files)
    assert (found.optimizer, found.scales, found.step, found.keep_best) == ("dp_reshardable", scales, 7, True)
    assert found.figures == {"loss": 2.0} and found.places == saved.places(Layout())
    assert (found.run, found.options, found.inputs, found.computed_in) == ("me", {"seed": 1}, {"data": "d"}, "float32")


def test_a_folder_gets_its_name_once_all_ranks_have_written(tmp_path, monkeypatch, caplog):
    """In the place of one of the same step; then old ones are dropped."""
    caplog.set_level("INFO", "minitron_megatron")
    did, one = [], saver(tmp_path)
    monkeypatch.setattr(one, "_describe", lambda *given: did.append(given[1:]), raising=False)
    monkeypatch.setattr(checkpoint, "_drop_old", lambda folder, options: did.append("drop"))
    (tmp_path / "step_00000007").mkdir()
    (tmp_path / "step_00000007" / "old").touch()
    partial = tmp_path / ".step_00000007.ab.partial"
    partial.mkdir()
    (partial / ".digests_0.json").write_text('{"a": 1}')
    one._complete(partial, "step_00000007", 7, {"loss": 1.0}, True)
    assert did == [(7, {"a": 1}, {"loss": 1.0}), "drop"]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"] and not list(
        (tmp_path / "step_00000007").iterdir()
    )
    assert caplog.messages == [f"step 7: saved {tmp_path / 'step_00000007'}"]


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(
    ("fp8", "written", "scales"), [("delayed", True, True), ("delayed", False, False), ("none", True, False)]
)
def test_what_is_loaded_goes_to_its_chunk_and_rates_stay_those_of_the_run(monkeypatch, chunks, fp8, written, scales):
    """Scales of FP8 where this run has some and the checkpoint, too."""
    from megatron.core import dist_checkpointing

    asked, loaded = [], []
    groups = [{"max_lr": 9.0, "min_lr": 8.0, "wd_mult": 0.0}, {"max_lr": 9.0, "wd_mult": 1.0}]
    state = {
        "model": "whole", "model0": "first", "model1": "second", "step": 3.0, "guard": {"g": 1}, "objective": {"o": 2},
        "optimizer": {"optimizer": {"param_groups": groups}}, "fp8_scales": ["s0", "s1"],
    }  # fmt: skip
    kept = Written("dp_reshardable", written, {}, 3, {}, {})
    monkeypatch.setattr(saved, "whole", lambda path: saved.Checkpoint(3, path, kept))
    monkeypatch.setattr(checkpoint, "wait_until_seen", lambda *_: None)
    monkeypatch.setattr(checkpoint, "_state", lambda *given, **more: asked.append((given[2:], more)) or "wanted")
    monkeypatch.setattr(checkpoint, "_strategy", lambda kind, shared: (kind, shared))
    monkeypatch.setattr(dist_checkpointing, "load", lambda *given: asked.append(given) or state)
    monkeypatch.setattr(checkpoint, "set_delayed_scales", lambda module, of: loaded.append((module.name, of)))

    def chunk(n):
        module = SimpleNamespace(name=f"chunk {n}")
        module.load_state_dict = lambda values, strict: loaded.append((module.name, values, strict))
        return SimpleNamespace(module=module)

    optimizer = SimpleNamespace(
        param_groups=[{"max_lr": 1.0, "min_lr": 0.5, "lr": 7.0}, {"max_lr": 5.0}],
        load_state_dict=lambda values: loaded.append(values),
    )
    options = TrainerConfig(fp8=fp8, parallel_load=True)
    found = checkpoint.load(Path("a"), [chunk(n) for n in range(chunks)], optimizer, options)
    assert found == (3, {"g": 1}, {"o": 2})
    assert asked == [(("dp_reshardable", {}), {"loading": True, "scales": scales}), ("wanted", "a", ("load", True))]
    values = ["whole"] if chunks == 1 else ["first", "second"]
    wanted = []
    for n, value in enumerate(values):
        wanted += [(f"chunk {n}", value, False), *([(f"chunk {n}", f"s{n}")] if scales else [])]
    assert loaded == [*wanted, state["optimizer"]]
    assert groups == [{"max_lr": 1.0, "min_lr": 0.5, "wd_mult": 0.0}, {"max_lr": 1.0, "min_lr": 0.5, "wd_mult": 1.0}]


def test_bytes_of_an_earlier_versions_checkpoint_are_not_compared_and_that_is_said(tmp_path, caplog):
    found = saved.Checkpoint(3, tmp_path, Written("x", False, {}))
    assert checkpoint.other_bytes(found) is None
    assert [one.levelname for one in caplog.records] == ["WARNING"] and "without digests" in caplog.text
