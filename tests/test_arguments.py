"""Words of a command line before anything reads them as values: interpolations, nesting, length; and Hydra's own flags."""

import subprocess
import sys

import pytest

from minitron_megatron.cli.arguments import DEEPEST, check_words
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.config import free_options, model_options, options
from minitron_megatron.errors import UserError
from minitron_megatron.plain_text import one_line
from tests.test_commands import ROOT, error_of, run


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interpolation_is_for_multirun_alone(name):
    """In whatever option, a number's too; in what is free, in presets, and in options of Hydra's own."""
    config = COMMANDS[name].config
    keys = [*(o.name for o in options(config)), *model_options(config), *(f"{o}.a.b" for o in free_options(config))]
    for key in [*keys, "hydra.run.dir", "+hydra.job.name", "optim", "target"]:
        for value in ("${seed}", "${oc.env:HOME}", "1${seed}", "[1,${seed}]", "{a: ${seed}}"):
            with pytest.raises(
                UserError, match=r"has an interpolation \(\$\{…\}\), which is only for -m: write the value"
            ):
                check_words([f"{key}={value}"], name, config)
    for flag in ("-m", "--multirun"):
        check_words([flag, f"{keys[0]}=${{seed}}"], name, config)


@pytest.mark.parametrize(
    "word",
    [
        "seed=" + "[" * 10_000,
        "output=" + "{a: " * 10_000,
        "seed=" + "choice(" * 10_000,
        "[" * 10_000,
        "seed" + ".a" * 10_000 + "=1",
    ],
    ids=["list", "mapping", "function", "no option", "name"],
)
@pytest.mark.parametrize("name", ["prune", "compress", "distill"])
def test_what_is_nested_without_end_is_one_short_line(name, word):
    with pytest.raises(UserError, match=rf"is nested more than {DEEPEST} deep: write it flat") as error:
        check_words([word], name, COMMANDS[name].config)
    assert len(str(error.value)) < 120 and one_line(str(error.value)) == str(error.value)


def test_what_is_nested_as_deep_as_may_be_is_read(tmp_path):
    """By the command itself, which then says what it thinks of the value."""
    deep = "[" * DEEPEST + "1" + "]" * DEEPEST
    for word in (
        f"rounds={deep}",
        f"seed={deep}",
        f"distill={deep}",
        f"model={'a' * 10_000}",
        f"chain={'a' * 10_000}.yaml",
    ):
        error_of(run("compress", word, "output=x", "dry_run=true", cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_hydras_multirun_leaves_no_file_behind(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    command = [sys.executable, str(ROOT / "launch" / "status.py"), "-m", "folder=[a],[b]"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and [line for line in done.stdout.splitlines() if ": no outputs in it" in line] == [
        "a: no outputs in it",
        "b: no outputs in it",
    ], done
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b"]
