"""A checkpoint for Megatron-LM, read by Megatron-LM: its parser, its builder and its load_checkpoint give the source's logits."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitron_megatron.checkpoints import megatron_lm
from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.checkpoints.megatron_lm import (
    ARGUMENTS,
    RELEASE,
    TRACKER,
    all_arguments,
    export_megatron,
    parsed,
)
from minitron_megatron.checkpoints.reading import safe_reading
from minitron_megatron.checkpoints.weights import write_weights
from minitron_megatron.config import FAMILY_NAMES, ExportMegatronConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.megatron_lm import check_expressible
from minitron_megatron.models.shape import RopeScaling
from tests.test_commands import ROOT, TORCHRUN, environment, error_of, run
from tests.test_models import relative
from tests.tiny import LLAMA3, hf_model, imported, model_option

TOKENS = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))
MEGATRON_ROPE = {
    **LLAMA3,
    "rope_theta": 500000.0,
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SIZES = {"llama": {"rope_parameters": MEGATRON_ROPE}, "qwen2": {"tie_word_embeddings": True}}
# What says nothing of the model: no GPU, no kernels of GPU packages, and a step that is never made.
HERE = shlex.split(
    "--seq-length 32 --micro-batch-size 2 --train-iters 1 --lr 1e-4 --transformer-impl local --distributed-backend gloo "
    "--use-cpu-initialization --no-persist-layer-norm --no-masked-softmax-fusion --no-bias-swiglu-fusion "
    "--no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-gradient-accumulation-fusion"
)


def export(model: Path, output: Path, **options) -> Path:
    export_megatron(ExportMegatronConfig(model=model_option(model), output=str(output), **options))
    return output


def arguments_of(folder: Path) -> list[str]:
    """The words of arguments.sh, as bash reads them."""
    script = f'source {shlex.quote(str(folder / ARGUMENTS))} && printf "%s\\n" "${{MODEL_ARGS[@]}}"'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()


def in_megatron(folder: Path, scratch: Path, *words: str, ranks: int = 1, model: list[str] | None = None) -> dict:
    """What Megatron-LM computes with that checkpoint: logits, arguments, iteration."""
    torch.save(TOKENS, scratch / "tokens.pt")
    done = subprocess.run(
        [
            *(TORCHRUN, "--standalone", "--nproc-per-node", str(ranks), "-m", "tests.megatron_lm"),
            *(str(scratch / "tokens.pt"), str(scratch / "logits.pt")),
            *(arguments_of(folder) if model is None else model),
            *("--load", str(folder), *HERE, *words),
        ],
        capture_output=True,
        text=True,
        env={**environment(), "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return torch.load(scratch / "logits.pt", weights_only=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By family: (model folder, its logits by transformers, checkpoint for Megatron-LM), made when first asked for."""
    made = {}

    def of(family: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = hf_model(family=family, **SIZES.get(family, {}))
            path = imported(model, folder)
            with torch.no_grad():
                made[family] = path, model(TOKENS).logits, export(path, folder / "checkpoint")
        return made[family]

    return of


# Llama is below; Mistral and Qwen2 differ from these in what Megatron-LM's parser is tested with.
CASES = [("nemotron", 1, []), ("qwen3", 2, ["--finetune", "--tensor-model-parallel-size", "2"])]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "ranks", "words"), CASES)
def test_megatron_lm_loads_it_and_computes_the_same(models, tmp_path, family, ranks, words):
    """With plain --load and with --finetune; the weights were NaN before, so every one of them was read."""
    _, wanted, folder = models(family)
    found = in_megatron(folder, tmp_path, *words, ranks=ranks)
    assert found["iteration"] == 0
    assert found["logits"].shape[-1] == 1024
    assert relative(found["logits"][..., :300], wanted) <= 1e-6


@pytest.mark.slow
def test_arguments_from_the_checkpoint(models, tmp_path):
    """--use-checkpoint-args brings all but what Megatron-LM does not ask the checkpoint for, which is given here."""
    _, wanted, folder = models("llama")
    left_out = ["--use-rope-scaling", "--norm-epsilon", "1e-5"]
    found = in_megatron(folder, tmp_path, "--use-checkpoint-args", model=left_out)
    assert relative(found["logits"][..., :300], wanted) <= 1e-6
    assert found["args"]["tokenizer_model"] == str(folder / "tokenizer")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_args_are_what_the_arguments_parse_to(models, family):
    """In both places where versions of Megatron-LM look; what is in them is read without executing code."""
    from megatron.core import dist_checkpointing

    path, _, folder = models(family)
    stored = torch.load(folder / RELEASE / "common.pt", weights_only=True)
    (folder / RELEASE / "common.pt").rename(folder / "elsewhere")
    try:
        with safe_reading():
            state = dist_checkpointing.load_common_state_dict(str(folder / RELEASE))
    finally:
        (folder / "elsewhere").rename(folder / RELEASE / "common.pt")
    assert vars(state["args"]) == vars(stored["args"]) and state.keys() == stored.keys()
    wanted = vars(parsed(all_arguments(open_model_folder(path), folder)))
    added = {"rank", "world_size", "data_parallel_size", "params_dtype", "no_save_optim", "no_save_rng"}
    added |= {f"{what}_samples" for what in ("consumed_train", "skipped_train", "consumed_valid")}
    assert {k: v for k, v in vars(stored["args"]).items() if k not in added} == {
        k: v for k, v in wanted.items() if k not in added
    }
    assert (state["iteration"], state["checkpoint_version"]) == (0, 3.0)
    assert (folder / TRACKER).read_text() == "release"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_script_has_the_same_arguments_wherever_it_lies(models, tmp_path, family):
    path, _, folder = models(family)
    moved = tmp_path / "a folder"
    moved.mkdir()
    (moved / ARGUMENTS).write_text((folder / ARGUMENTS).read_text())
    wanted = vars(parsed(all_arguments(open_model_folder(path), moved)))
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    assert (
        vars(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(arguments_of(moved)))
        == wanted
    )


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_weights_are_those_of_the_model_folder(gloo, models, tmp_path, ranks):
    """Bit for bit, by any number of ranks, under the same keys: plain dist_checkpointing reads both."""
    path, _, _ = models("qwen3")
    gloo(ranks, export_megatron, ExportMegatronConfig(model=model_option(path), output=str(tmp_path / "out")))
    found, wanted = (gloo(1, load_plain, str(f))[0] for f in (tmp_path / "out" / RELEASE, path / "weights"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def load_plain(folder: str) -> dict:
    """Every tensor by megatron.core's own function, which gives the common state too."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    return {key: value for key, value in load_plain_tensors(folder).items() if isinstance(value, torch.Tensor)}


def test_a_model_without_a_tokenizer(models, tmp_path):
    import shutil

    path = shutil.copytree(models("llama")[0], tmp_path / "model")
    shutil.rmtree(path / "tokenizer")
    manifest = (path / "manifest.yaml").read_text()
    lines = [line for line in manifest.splitlines() if not line.startswith("  tokenizer/")]
    (path / "manifest.yaml").write_text("\n".join(lines))
    folder = export(path, tmp_path / "out")
    assert "NullTokenizer" in arguments_of(folder) and not (folder / "tokenizer").exists()


# What is refused


def test_what_megatron_lm_cannot_say_is_refused(models):
    shape = open_model_folder(models("llama")[0]).shape
    cases = {
        "different ffn_hidden_size": {"ffn_hidden_size": (48, 32, 48, 48)},
        "rope_theta=10000.5": {"rope_theta": 10000.5},
        "rope_scaling.factor=32": {"rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192)},
        "rope_scaling.low_freq_factor=2": {"rope_scaling": RopeScaling(8.0, 2.0, 4.0, 8192)},
        "rope_scaling.high_freq_factor=3": {"rope_scaling": RopeScaling(8.0, 1.0, 3.0, 8192)},
        "rope_scaling.original_max_position_embeddings=4096": {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 4096)},
    }
    for message, sizes in cases.items():
        with pytest.raises(UserError, match=message) as error:
            check_expressible(shape.resized(**sizes), "here")
        assert "\n" not in str(error.value)
    check_expressible(shape, "here")
    check_expressible(shape.resized(rope_scaling=None), "here")


@pytest.mark.slow
def test_the_command(models, tmp_path):
    """Help is tested with all commands; here a dry run, a refusal in one line, a run by two processes, and the same again."""
    other = imported(hf_model(rope_parameters=LLAMA3), tmp_path)
    assert "rope_scaling.factor=4" in error_of(run("export_megatron", f"model={other}", f"output={tmp_path / 'x'}"))
    words = ("export_megatron", f"model={models('nemotron')[0]}", f"output={tmp_path / 'out'}")
    dry = run(*words, "dry_run=true")
    assert dry.returncode == 0 and not (tmp_path / "out").exists(), dry.stderr
    done = run(*words, processes=2)
    assert done.returncode == 0, done.stderr
    assert set(read_manifest(tmp_path / "out")["files"]) >= {
        TRACKER,
        ARGUMENTS,
        "release/.metadata",
        "tokenizer/tokenizer.json",
    }
    again = run(*words)
    assert again.returncode == 0 and "complete already" in again.stdout


def test_a_failed_export_leaves_nothing(models, tmp_path, monkeypatch):
    def write(*args):
        write_weights(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(megatron_lm, "write_weights", write)
    with pytest.raises(KeyboardInterrupt):
        export(models("llama")[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from minitron_megatron.checkpoints import megatron_lm
from minitron_megatron.config import ExportMegatronConfig, ModelConfig
megatron_lm._write_companions = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
megatron_lm.export_megatron(ExportMegatronConfig(model=ModelConfig(path=sys.argv[1]), output=sys.argv[2]))
"""


@pytest.mark.slow
def test_a_killed_export_is_not_there_and_the_next_one_sweeps(models, tmp_path):
    path = models("llama")[0]
    words = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(words, env=env, capture_output=True, cwd=ROOT, check=False).returncode == -9
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    export(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_damaged_weights_are_refused(models, tmp_path):
    import shutil

    path = shutil.copytree(models("llama")[0], tmp_path / "model")
    file = path / "weights" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    row = open_model_folder(path)
    from minitron_megatron.checkpoints.reading import WeightReader
    from minitron_megatron.models.axes import slots

    reader, slot = WeightReader(row.weights), next(slots(row.shape))
    bits = reader.read_slot(slot, row.shape, 0, 1).numpy().tobytes()
    data[data.index(bits)] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"differ from the digest in manifest\.yaml"):
        export(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
