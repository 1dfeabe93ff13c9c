"""Words of a command line before anything reads them as values: interpolations, nesting, length; and Hydra's own flags."""

import re
import shlex
import subprocess
import sys

import pytest
from hydra import initialize_config_dir

from minitron_megatron.cli import main
from minitron_megatron.cli.arguments import CONF, DEEPEST, as_override, check_words, with_preset_files
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.config import free_options, model_options, options
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import compose
from minitron_megatron.plain_text import one_line
from tests.test_commands import ROOT, error_of, run
from tests.tiny import hf_model, imported

# What is named where nothing is given. The last words of what is told of each are its documentation.
NEEDED = {
    "smollm2": "output",
    "import_hf": "hf output",
    "import_nemo": "nemo output",
    "random_model": "model output",
    "prepare_data": "input model output",
    "adopt_data": "train validation model output",
    "importance": "model data.path output",
    "layers": "model data.path output",
    "merge_scores": "scores output",
    "search": "model scores budget.parameters output",
    "prune": "model scores data.path target output",
    "cache_teacher": "teacher data.path trainer.steps trainer.tokens output",
    "correct_teacher": "model data.path trainer.steps trainer.tokens output",
    "distill": "teacher student data.path trainer.steps trainer.tokens output",
    "evaluate": "model hf data.path tasks output",
    "export_hf": "model output",
    "export_megatron": "model output",
    "export_nemo": "model output",
    "throughput": "models output",
    "compress": "hf model input data.path budget.parameters target chain output",
    "distill_candidates": "found data.path output",
    "report": "folders output",
    "status": "folder",
    "submit": "command output",
    "benchmark": "output",
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_command_without_options_names_all_that_it_needs(name, monkeypatch):
    assert set(NEEDED) == set(COMMANDS) - {"demo"}, "what a new command needs"
    monkeypatch.setattr(sys, "argv", [f"minitron {name}"])
    with pytest.raises(UserError, match=r"^\S.* needs ") as raised:
        main.run(name)
    assert set(re.findall(r"([\w.]+)=(?:\S*…|{)", str(raised.value))) - {"target.hidden_size"} == set(
        NEEDED[name].split()
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("prune output=x", "needs model=… (model folder); scores=… "),
        ("evaluate output=x model=m", "needs data.path=… (for perplexity) or tasks=…, or both"),
        ("search output=x model=m scores=s", "needs budget.parameters=… (or another limit)"),
        ("compress output=x hf=m input=t", "needs budget.parameters=… (search finds the shape) or target=… or chain=…"),
        ("distill output=x data.path=d student=s distill.cache=c", "needs trainer.steps=… or trainer.tokens=…"),
        ("distill output=x data.path=d student=s trainer.steps=0", "trainer.steps=0 must be above 0"),
    ],
)
def test_what_is_given_is_not_named(words, says, monkeypatch):
    name, *rest = words.split()
    monkeypatch.setattr(sys, "argv", [f"minitron {name}", *rest])
    with pytest.raises(UserError) as raised:
        main.run(name)
    assert says in str(raised.value) and "output=" not in str(raised.value)


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


def test_a_path_with_what_a_shell_completes_is_the_same_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    config_class = COMMANDS["importance"].config
    for typed in ("a/", "./a", "a//", "b/../a", "a"):
        assert as_override(f"data.path={typed}", config_class) == "data.path=a"
    # What is not there is as it was typed: the message has it so.
    assert as_override("data.path=nowhere/", config_class) == "data.path=nowhere/"
    # The parent of a link's target is not the folder that the link lies in.
    (tmp_path / "b" / "c").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "b" / "c")
    (tmp_path / "b" / "x").mkdir()
    (tmp_path / "x").mkdir()
    assert as_override("data.path=link/../x", config_class) == "data.path=link/../x"


@pytest.mark.parametrize(
    ("name", "word", "is_read_as"),
    [
        ("export_hf", "results=outputs/judged", "results=[outputs/judged]"),
        ("export_hf", "results=a b/$(x)", "results=['a b/$(x)']"),
        ("export_hf", "results=[a,b]", "results=[a,b]"),
        ("export_hf", "results='a'", "results=['a']"),
        ("prune", "drop_layers=3", "drop_layers=[3]"),
        ("prune", "drop_layers=null", "drop_layers=null"),
    ],
)
def test_one_value_stands_for_a_list_of_it(name, word, is_read_as):
    assert as_override(word, COMMANDS[name].config) == is_read_as


@pytest.mark.parametrize(
    ("name", "word", "is_read_as"),
    [
        ("importance", "samples=1e2", "samples=100"),
        ("importance", "samples=2.5e9", "samples=2500000000"),
        ("importance", "samples=64.0", "samples=64"),
        ("importance", "samples=1E+2", "samples=100"),
        ("distill", "trainer.steps=.5e1", "trainer.steps=5"),
        ("distill", "seed=1e0,2e0", "seed=1,2"),
        ("distill", "distill.intermediate_layers=[[1e0,2],[-3.0,-3]]", "distill.intermediate_layers=[[1,2],[-3,-3]]"),
        ("prune", "drop_layers=3e0", "drop_layers=[3]"),
        ("prune", "target.ffn_hidden_size=[1e3,9216]", "target.ffn_hidden_size=[1000,9216]"),
        ("search", "space.hidden_size=[1e3,2e3]", "space.hidden_size=[1000,2000]"),
        # None of them whole, or no number.
        *(
            ("importance", f"samples={value}", f"samples={value}")
            for value in ("1.5", "1e-2", "1e400", "'1e2'", "1e2x")
        ),
        # Of other kinds.
        ("distill", "optim.lr=1e-4", "optim.lr=1e-4"),
        ("distill", "trainer.tokens=1e9", "trainer.tokens=1e9"),
        ("importance", "data.path=1.0", "data.path=1.0"),
        ("random_model", "model.rope_scaling=[8.0,1.0,4.0,8192]", "model.rope_scaling=[8.0,1.0,4.0,8192]"),
    ],
)
def test_a_whole_number_may_be_typed_with_an_exponent_or_a_point(name, word, is_read_as):
    assert as_override(word, COMMANDS[name].config) == is_read_as


def test_so_may_every_option_that_takes_one(tmp_path):
    """On the command line and in a file of one's own."""
    for name, entry in COMMANDS.items():
        for one in options(entry.config):
            if one.type.startswith("int"):
                assert as_override(f"{one.name}=1e3", entry.config) == f"{one.name}=1000", name
    (tmp_path / "mine.yaml").write_text("warmup_steps: 1e2\n")
    config = COMMANDS["distill"].config
    words, _ = with_preset_files([f"optim={tmp_path / 'mine.yaml'}"], "distill", config)
    assert [as_override(word, config) for word in words] == ["optim.warmup_steps=100"]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("importance", "data.path='a"),
        ("importance", "data.path=\"it's"),
        ("importance", "data.path=[a b(,c]"),
        ("importance", "data.path=[1,'a b',c d$!]"),
        ("importance", "output={x"),
        ("importance", "output=[x"),
        ("prepare_data", "input=[a(b,'c, d']"),
        ("compress", "distill.trainer.steps=3 (x"),
        ("compress", "rounds=[{name: a b(, prune: {target.hidden_size: 8}}]"),
        ("compress", "export_hf.license=ü y"),
    ],
)
def test_a_word_that_cannot_be_read_is_shown_as_it_is_to_be_typed(name, word):
    """In quotes for the shell and for Hydra, which reads it then."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        with pytest.raises(UserError) as raised:
            compose(name, [word])
        said, _, example = str(raised.value).partition(": odd characters need quotes, as in ")
        assert said == f"{word} cannot be read"
        (typed,) = shlex.split(example)
        assert typed.partition("=")[0] == word.partition("=")[0] and typed != word
        with pytest.raises(UserError) as raised:
            compose(name, [typed])
        assert "cannot be read" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "word", "says"),
    [
        ("importance", "samples=1(2", "samples=1(2 must be a whole number"),
        ("importance", "dry_run=yes!", "dry_run=yes! must be true or false"),
        ("distill", "optim.lr=1e-4,", "optim.lr=1e-4, must be a number"),
        ("prune", "drop_layers=[1,2", "drop_layers=[1,2 cannot be read: close its brackets"),
        ("compress", "distill={trainer.steps: 3", "distill={trainer.steps: 3 cannot be read: close its brackets"),
    ],
)
def test_a_word_that_no_quotes_mend_says_what_is_wrong(name, word, says):
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(UserError, match=f"^{re.escape(says)}"):
        compose(name, [word])


def test_a_rehearsal_by_sizes_alone_is_told_what_to_cut(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["minitron prune", "model=llama3_1_8b", "dry_run=true", "output=x"])
    with pytest.raises(UserError, match=r"^nothing to prune: give a size, such as target\.num_layers="):
        main.run("prune", only_check=True)
    sys.argv.append("target.num_layers=1.6e1")
    main.run("prune", only_check=True)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("samples=1.5", "samples=1.5 must be a whole number"),
        ("seed=x", "seed=x must be a whole number"),
        ("dry_run=7x", "dry_run=7x must be true or false"),
        ("data.sequence_length=[1]", "data.sequence_length"),
    ],
)
def test_a_value_of_another_kind_is_said_by_name(word, says, tmp_path):
    said = error_of(run("importance", "model=x", "data.path=y", "output=z", word, cwd=tmp_path))
    assert says in said and "converted" not in said


@pytest.mark.parametrize(
    ("command", "words", "says"),
    [
        ("importance", "model=hf data.path=y", "hf has no manifest.yaml; it is a Hugging Face folder: import_hf hf="),
        ("importance", "model=ours data.path=text.txt", "text.txt is a file: give the output folder of the command"),
        ("importance", "model=ours data.path=text.txt", "prepare_data input="),
        ("import_hf", "hf=ours", "ours is a model folder of this software, imported already: give it as model="),
        (
            "prune",
            "model=ours target=found",
            "it is a folder: give a preset's file, such as found/targets/rank_01.yaml",
        ),
    ],
)
def test_a_folder_of_another_kind_is_named(command, words, says, tmp_path):
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "found" / "targets").mkdir(parents=True)
    (tmp_path / "found" / "targets" / "rank_01.yaml").write_text("{}")
    imported(hf_model(1), tmp_path).rename(tmp_path / "ours")
    assert says in error_of(run(command, *words.split(), "output=out", cwd=tmp_path))


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
