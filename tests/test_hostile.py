"""Whatever users name things, it is text: in a job script's shell, in pages, cards and tables, and in the names of manifests."""
# ruff: noqa: F811 (fixtures of other files)

import os
import re
import subprocess
from pathlib import Path

import html5lib
import pytest
import yaml
from hydra import initialize_config_dir

from minitron_megatron.checkpoints.card import _front_matter, table
from minitron_megatron.checkpoints.folder import ModelFolder, open_model_folder, read_manifest
from minitron_megatron.config import ExportHfConfig
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import CONF, compose
from minitron_megatron.plain_text import escaped
from minitron_megatron.report.page import Figure, Section, Table, write_card, write_page
from minitron_megatron.submit import check_job, render
from tests.hostile import NAME, TEXT, tmp_path  # noqa: F401 (a fixture)
from tests.slurm_cluster import programs_by_name
from tests.test_axes import shape

ROOT = Path(__file__).resolve().parent.parent
WORDS = [f"teacher={NAME}", "student=s", f"data.path={NAME}/data", f'logger.name="{NAME}"', f"output=out/{NAME}"]


@pytest.fixture
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def quoted(text):
    """As Hydra reads a text with anything in it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


@pytest.fixture
def script(hydra, tmp_path, monkeypatch):
    """A job script whose every name is hostile, and the options that it was made of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "activate").write_text("touch sourced\n")
    words = [
        f"teacher={quoted(NAME)}",
        "student=s",
        f"data.path={quoted(NAME + '/data')}",
        f"output={quoted('out/' + NAME)}",
    ]
    (tmp_path / NAME / "data").mkdir(parents=True)
    cfg = compose(
        "submit",
        [
            f"output={quoted('jobs/' + NAME)}", f"name={quoted(NAME)}", "command=x", "nodes=2",
            f"cluster.partition={quoted(NAME)}", f"cluster.account={quoted(NAME)}",
            f"cluster.activate={quoted(str(tmp_path / 'activate'))}",
            f"cluster.sbatch=[{quoted('--comment=' + NAME)}]", f"cluster.setup={quoted_list(['export ODD=1'])}",
        ],
    )  # fmt: skip
    return cfg, render(cfg, "distill", WORDS, compose("distill", words))


def quoted_list(texts):
    return "[" + ",".join(map(quoted, texts)) + "]"


def test_a_job_script_hands_on_every_name_as_it_is(script, tmp_path):
    """To the shell, to srun and to Slurm; nothing in a name is run."""
    _, text = script
    (tmp_path / "job.sh").write_text(text)
    said = tmp_path / "said"
    programs = programs_by_name(
        tmp_path.parent / "programs",
        srun='printf "%s\\0" "$@" "$ODD" "$PWD" > "$SAID"; exit 2',
        scontrol="echo node1; echo node2",
        squeue="echo RUNNING",
        scancel="true",
    )
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SAID": str(said)}
    done = subprocess.run(
        ["bash", str(tmp_path / "job.sh")],
        env={**os.environ, **job, "PATH": f"{programs}:{os.environ['PATH']}"},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    *words, odd, directory = said.read_text().split("\0")[:-1]
    assert words[-len(WORDS) :] == WORDS and (odd, directory) == ("1", str(tmp_path))
    assert str(tmp_path / "activate") in words
    assert any(word.startswith(f"--output={tmp_path / 'jobs' / NAME}_logs/") for word in words)
    assert not list(tmp_path.rglob("PWNED")) and not list(tmp_path.parent.glob("PWNED"))
    assert (tmp_path / "out").is_dir()


def test_slurm_gets_every_option_of_a_job_script_as_it_is(script):
    import shlex

    _, text = script
    options = [
        shlex.split(line.removeprefix("#SBATCH "))[0] for line in text.splitlines() if line.startswith("#SBATCH ")
    ]
    for name in ("job-name", "partition", "account", "comment"):
        assert f"--{name}={NAME}" in options
    assert "--nodes=2" in options and "--requeue" in options and "--signal=B:USR1@300" in options


@pytest.mark.parametrize("option", ["name", "output", "cluster.partition", "cluster.account"])
def test_a_line_break_in_an_option_of_slurm_is_refused(script, option):
    """#SBATCH is a comment to the shell: what follows a line break would be run."""
    cfg, _ = script
    part, _, name = option.rpartition(".")
    setattr(cfg.cluster if part else cfg, name, "a\ntouch PWNED")
    with pytest.raises(UserError, match=f"{option}="):
        check_job(cfg)


def page_of(tmp_path, **options):
    """The tree of a page of one section, and all its text."""
    write_page(tmp_path / "page.html", TEXT, TEXT, [Section(**{"title": TEXT, **options})])
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    tree = parser.parse((tmp_path / "page.html").read_text())
    return tree, "".join(tree.itertext())


def test_a_page_has_every_text_as_text(tmp_path):
    """Title, subtitle, headings, paragraphs, cells, captions and commands."""
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"><g></g></svg>'
    tree, text = page_of(
        tmp_path,
        text=f"text {TEXT}",
        tables=[Table([f"column {TEXT}", "n"], [[f"cell {TEXT}", "1"]], f"caption {TEXT}")],
        figures=[Figure(f"figure {TEXT}", svg)],
        commands=[f"command {TEXT}"],
    )
    for part in ("", "text ", "column ", "cell ", "caption ", "figure ", "command "):
        assert part + escaped(TEXT) in text, part
    found = {element.tag for element in tree.iter() if isinstance(element.tag, str)}
    assert not found & {"b", "script"}
    labels = [element.get("aria-label") for element in tree.iter() if element.get("aria-label")]
    assert f"caption {escaped(TEXT)}" in labels


def test_cells_of_a_card_stay_in_their_row(tmp_path):
    write_card(tmp_path / "card.md", "t", "s", [Section("a", tables=[Table(["x", "y"], [[TEXT, "a|b"]])], card=True)])
    rows = [line for line in (tmp_path / "card.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 3 and len(re.findall(r"(?<!\\)\|", rows[2])) == 3
    assert rows[2].endswith(" | a\\|b |")


def test_cells_of_a_model_card_stay_in_their_row():
    lines = table(["", "value"], [[TEXT, "a|b"], ["n", None]]).splitlines()
    assert len(lines) == 3 and lines[2].endswith("a\\|b |")


def test_the_front_matter_of_a_card_says_what_it_was_given():
    license, base = 'a: b\n- "c" #', f"x: {NAME}"
    cfg = ExportHfConfig(output="o", license=license)
    folder = ModelFolder(Path("m"), shape(), "d")
    values = yaml.safe_load(_front_matter(cfg, base, folder, ["pruned", "distilled", "pruned"]))
    assert (values["license"], values["base_model"]) == (license, base)
    assert values["tags"] == ["llama", "minitron", "megatron", "pruned", "distilled"]


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", ".."])
def test_a_manifest_names_files_of_its_folder_alone(tmp_path, name):
    (tmp_path / "outside").write_text("x")
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    size = Path(folder / name).stat().st_size
    (folder / "manifest.yaml").write_text(yaml.safe_dump({"digest": "d", "files": {name: size}}))
    with pytest.raises(UserError, match=r"manifest\.yaml is damaged"):
        read_manifest(folder)
    with pytest.raises(UserError, match=r"manifest\.yaml is damaged"):
        open_model_folder(folder)


def test_a_job_script_stops_at_its_first_failure(script, tmp_path):
    """Nothing is started from a folder that is not there."""
    _, text = script
    (tmp_path / "job.sh").write_text(text.replace("cd ", "cd /nowhere", 1))
    done = subprocess.run(["bash", str(tmp_path / "job.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "nowhere" in done.stderr and "common.sh" not in done.stderr
    assert "set -euo pipefail" in text.splitlines()
