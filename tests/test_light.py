"""What is said about options and folders is said before torch and Megatron are there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from minitron_megatron.checkpoints.index import _DTYPES, stored_tensors
from minitron_megatron.checkpoints.reading import WeightReader
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import CONF
from minitron_megatron.models.limits import stages_of_notation
from minitron_megatron.models.shape import SIZES, ModelShape

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "megatron", "transformers", "tokenizers", "pyarrow", "matplotlib", "lm_eval", "wandb", "datasets")
# Modules that checks are made of.
SHARED = """checkpoints.folder checkpoints.index data.folder models.limits importance.scores importance.layers outputs
parallel.collectives parallel.layout parallel.tools prune.plan prune.select""".split()


def python(code: str, *words: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shared_modules_import_nothing_heavy():
    code = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    loaded = {
        name.partition(".")[0] for name in python(code, *(f"minitron_megatron.{name}" for name in SHARED)).split()
    }
    assert not loaded & set(HEAVY)


@given(st.text("Etm|L(),*0123", max_size=12))
def test_pipeline_layouts_read_as_megatron_reads_them(notation):
    assume(not re.search(r"\d{7}", notation))  # Megatron writes them out
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    try:
        parsed = PipelineParallelLayerLayout.parse_str_to_list(notation)
    except AssertionError:
        parsed = None
    found = stages_of_notation(notation)
    assert found == (None if parsed is None else [[layer.name for layer in stage] for stage in parsed])


@pytest.mark.parametrize(
    "notation", ["Et*1000000000L", "E(t*100000)*100000L", "E((t*99999)*99999)*99999L", "t*" + "9" * 5000]
)
def test_a_pipeline_layout_without_end_is_no_layout(notation):
    assert stages_of_notation(notation) is None


@pytest.mark.parametrize("name", SIZES)
def test_every_size_of_a_model_has_a_bound_that_is_said(name):
    shape = ModelShape.from_dict(yaml.safe_load((CONF / "model" / "smollm2_135m.yaml").read_text()), "preset")
    for size in (SIZES[name] + 1, 10**12, 10**400):
        with pytest.raises(UserError, match=rf"{name}=.* must be at most {SIZES[name]}"):
            shape.resized(**{name: size})


def test_the_light_index_is_torchs(tiny_model):
    reader = WeightReader(tiny_model / "weights")
    light = stored_tensors(tiny_model / "weights")
    exact = {key: (size, str(dtype).removeprefix("torch.")) for key, (size, dtype) in reader.tensors.items()}
    assert {key: found for key, found in light.items() if found is not None} == exact
    assert set(light) == set(reader.metadata.state_dict_metadata)


def test_names_of_dtypes_in_the_light_index_are_torchs():
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in _DTYPES)
    assert {"float32", "bfloat16", "float16", "int64", "uint8", "float8_e4m3fn"} <= _DTYPES


def test_the_note_of_the_format_is_megatrons(tiny_model, tmp_path):
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    save_config(CheckpointingConfig("torch_dist"), str(tmp_path))
    written = json.loads((tiny_model / "weights" / "metadata.json").read_text())
    assert written == json.loads((tmp_path / "metadata.json").read_text())


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    from tests.tiny import hf_model, imported

    return Path(imported(hf_model(), tmp_path_factory.mktemp("light")))


def test_megatron_is_imported_without_torchs_compiler_where_there_is_no_gpu():
    """And what was left out meanwhile is there again."""
    code = """
import sys
import torch
import yaml
whole = torch.compile
from minitron_megatron.parallel.cpu import import_megatron
import_megatron("models.gpt.gpt_model")
print(torch.compile is whole, "torch._inductor" in sys.modules, "wandb" in sys.modules)
import wandb
print(wandb.__version__)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=True,
    )
    assert done.stdout.splitlines()[0] == "True False False" and len(done.stdout.splitlines()) == 2
