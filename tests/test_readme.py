"""The README's commands, run as they stand there with a model and text of another kind: only sizes and paths are put in."""

import json
import re
import shlex
from pathlib import Path

import pytest

from minitron_megatron.checkpoints.folder import read_manifest
from tests.test_commands import ROOT, command_of
from tests.test_next import paste
from tests.tiny import TEXT, hf_model, save_hf

# What a reader puts in: his model and text, a budget and batches of their size. The rest stands as it is.
OWN = {
    "samples=1024": "samples=8",
    "budget.parameters=4.5e9": "budget.parameters=28000",
    "trainer.tokens=1e9": "trainer.tokens=2000",
    "trainer.global_batch_size=128": "trainer.global_batch_size=4",
    "launch/": f"{ROOT}/launch/",
}
MODEL, CORPUS = "/models/Llama-3.1-8B", "corpus.jsonl"
# On two cores no run waits for wandb, and stages of a plan are few.
QUICK = {"distill": ["logger.wandb=disabled"], "compress": ["distill.logger.wandb=disabled", "distill.trainer.steps=3"]}


def blocks(heading: str) -> list[list[str]]:
    """Commands of each block of a section, lines joined where a backslash ends them."""
    section = re.search(rf"^## {heading}\n(.*?)^## ", (ROOT / "README.md").read_text(), re.S | re.M)[1]
    found = re.findall(r"^```\n(.*?)^```$", section, re.S | re.M)
    return [block.replace("\\\n", " ").strip().splitlines() for block in found]


@pytest.fixture
def newcomer(tmp_path):
    """A folder with a Qwen3 of 64 positions and a corpus."""
    folder = tmp_path / "a new place"
    save_hf(hf_model(family="qwen3", spread=0.05, max_position_embeddings=64), folder / "model")
    words = TEXT.split()
    lines = (" ".join(words[(i * j) % len(words)] for j in range(1, 90)) for i in range(1, 200))
    (folder / CORPUS).write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def filled_in(line: str, folder: Path, processes: int) -> str:
    line = line.replace(MODEL, shlex.quote(str(folder / "model")))
    for theirs, own in OWN.items():
        line = line.replace(theirs, own)
    line = line.replace("--nproc-per-node 8", f"--nproc-per-node {processes}")
    if processes == 1:
        line = line.replace("parallel.tensor=2 parallel.sequence=true", "")
    return " ".join([line.split(" #")[0], *QUICK.get(command_of(line), [])])


def test_the_section_has_the_road():
    one, steps, chain = blocks("On your model")
    assert one[0] == "source .venv/bin/activate"
    assert [command_of(line) for line in one[1:]] == ["compress", "compress", "status"]
    road = "import_hf prepare_data importance search prune distill evaluate export_hf report".split()
    assert [command_of(line) for line in steps] == road
    assert [command_of(line) for line in chain] == ["compress"]


@pytest.mark.slow
def test_the_one_command(newcomer):
    for line in blocks("On your model")[0][1:]:
        printed = paste(filled_in(line, newcomer, 1), newcomer)
    assert printed.startswith("outputs/mine: done (compress)")
    assert (newcomer / "outputs" / "mine" / "report" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_single_steps(newcomer, processes):
    for line in blocks("On your model")[1]:
        paste(filled_in(line, newcomer, processes), newcomer)
    assert read_manifest(newcomer / "outputs" / "distilled" / "model")["processes"] == processes
    assert (newcomer / "outputs" / "hf" / "config.json").is_file()


def test_every_command_that_the_text_names_is_there():
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"launch/([a-z]\w*)\.py", text))
    assert named <= {file.stem for file in (ROOT / "launch").glob("*.py")}


def test_lines_of_the_docs_are_wrapped():
    """Rows of tables and what programs print stay as they are."""
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        prose = "".join(file.read_text(encoding="utf-8").split("```")[::2])
        lines = [line for line in prose.splitlines() if not line.startswith("|")]
        assert max(map(len, lines)) <= 300, file
