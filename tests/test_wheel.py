"""The package as pip installs it: a wheel of the repository, in an environment where the repository cannot be imported."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.tiny import data_folder, hf_model, imported

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of what is in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    subprocess.run(["tar", "--null", "-cf", folder / "source.tar", "-T", "-"], input=files.stdout, cwd=ROOT, check=True)
    subprocess.run(["tar", "-xf", folder / "source.tar", "-C", source], check=True)
    build = [sys.executable, "-m", "uv", "build", "--quiet", "--wheel", "--out-dir", folder, source]
    subprocess.run(build, check=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """bin/ of a fresh environment with the wheel; what it depends on comes from this one's folder, the repository does not."""
    environment = tmp_path_factory.mktemp("environment") / "it's an environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=120)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--python", python, wheel]
    subprocess.run(install, check=True, timeout=300)
    (packages,) = environment.glob("lib/python*/site-packages")
    # A path alone: the .pth files in there, which would bring the repository, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def run(installed: Path, *words: object, cwd: Path, timeout: int = 600) -> subprocess.CompletedProcess:
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": f"{installed}:{os.environ['PATH']}"}
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, words)), env=clean | own, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_a_wheel_has_every_preset_and_script(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("conf", "slurm"):
        files = {f"minitron_megatron/{file.relative_to(ROOT)}" for file in (ROOT / folder).rglob("*") if file.is_file()}
        assert {name for name in names if name.startswith(f"minitron_megatron/{folder}/")} == {
            name for name in files if "__pycache__" not in name
        }


def test_a_mistake_names_the_command_as_it_was_typed(installed, tmp_path):
    done = run(installed, "minitron", "prune", "model=/nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: minitron prune needs scores=… ")
    assert done.stderr.endswith("; output=… (folder to write; appears whole or not at all)\n")
    near = run(installed, "python", "-m", "minitron_megatron", "prun", cwd=tmp_path)
    assert near.returncode == 2 and "there is no command 'prun': did you mean prune?" in near.stderr
    listed = run(installed, "minitron", "--help", cwd=tmp_path).stdout
    assert all(name in listed for name in ("import_hf", "prune", "distill", "compress"))


def test_a_chain_runs_without_the_repository(installed, tmp_path):
    """Its stages are commands of the package, one of them in two processes."""
    where = run(installed, "python", "-c", "import minitron_megatron as m; print(m.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(installed.parent)
    model = imported(hf_model(), tmp_path)
    data = data_folder(tmp_path, model)
    done = run(
        installed, "minitron", "compress", f"model={model}", f"data.path={data}", f"output={tmp_path / 'chain'}",
        "rounds=[{name:one,prune:{target.hidden_size:16}}]", "data.sequence_length=32", "importance.samples=4",
        "processes=1", "prune.processes=2", "distill.trainer.steps=2", "distill.trainer.validation_samples=0",
        "distill.trainer.global_batch_size=4", "distill.logger.wandb=disabled", "perplexity=false", "export=false",
        cwd=tmp_path, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "minitron importance" in done.stdout and "minitron --nproc-per-node 2 prune" in done.stdout
    manifest = yaml.safe_load((tmp_path / "chain" / "one" / "pruned" / "manifest.yaml").read_text())
    assert manifest["command"].startswith("minitron prune ") and manifest["processes"] == 2


def test_a_job_script_finds_the_package(installed, tmp_path):
    words = ["cluster=h100", "submit=false", f"output={tmp_path / 'job'}", "--", "random_model", "model=smollm2_135m"]
    done = run(installed, "minitron", "submit", *words, f"output={tmp_path / 'model'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    script = (tmp_path / "job" / "job.sh").read_text()
    sourced = run(
        installed,
        "bash",
        "-c",
        script.partition("# shellcheck")[0] + 'printf "%s\\n" "$ROOT" "$ACTIVATE"',
        cwd=tmp_path,
    )
    assert "minitron_megatron/slurm'/common.sh" in script or "minitron_megatron/slurm/common.sh" in script
    root, activate = sourced.stdout.splitlines()
    assert Path(activate) == installed / "activate" and Path(root).is_relative_to(installed.parent)
