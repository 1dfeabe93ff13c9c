"""One command from a Hugging Face folder and text to a student: what is chosen, what is refused, and the whole of it."""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hydra import initialize_config_dir

from minitron_megatron import choosing, compress_given, compress_plan, compress_source, pace, status
from minitron_megatron import compress as compressing
from minitron_megatron.checkpoints import stamps
from minitron_megatron.checkpoints.folder import open_model_folder, read_manifest
from minitron_megatron.checkpoints.hf import import_hf
from minitron_megatron.choosing import Choices, Pair, Text, choose, choose_layout, choose_length
from minitron_megatron.cli.commands import COMMANDS
from minitron_megatron.compress import compress, settle_machine
from minitron_megatron.compress_given import FOLDERS
from minitron_megatron.compress_plan import check_compress, make_plan
from minitron_megatron.compress_rounds import CHOSEN, SUMMARY
from minitron_megatron.config import CompressConfig, HardwareConfig, ModelConfig
from minitron_megatron.data.encoding import Encoder
from minitron_megatron.data.estimate import estimate_tokens
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import UserError
from minitron_megatron.launcher import CONF, compose
from minitron_megatron.models.axes import count_parameters
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.pace import Pace, Work, seconds_of_stages
from tests.test_commands import error_of, run, shown
from tests.tiny import TEXT, hf_model, save_hf

# Of the model in `given`: no size of it varies.
FIXED = [
    f"search.space.{name}={size}"
    for name, size in {
        "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 8, "num_query_groups": 4
    }.items()
]  # fmt: skip
ODD = "it's a model, {tiny} [one]"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with hf/ (a Qwen3 of 64 positions) and two JSONL files."""
    folder = tmp_path_factory.mktemp("given") / ODD
    save_hf(hf_model(family="qwen3", spread=0.05, max_position_embeddings=64), folder / "hf")
    words = TEXT.split()
    for part in (1, 2):
        lines = (" ".join(words[(i * j * part) % len(words)] for j in range(1, 60 + i)) for i in range(1, 60))
        (folder / f"{part}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


@pytest.fixture
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def words(given, output, *more):
    files = f"input=['{given}/1.jsonl','{given}/2.jsonl']".replace("it's", "it\\'s")
    quick = ["distill.trainer.steps=3", "distill.logger.wandb=disabled", "importance.samples=4", "evaluate.samples=4"]
    return [f"hf={given / 'hf'}", files, f"output={output}", *quick, *more]


def shape_of(name: str, **sizes) -> ModelShape:
    import yaml

    values = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text()) | sizes
    return ModelShape.from_dict(ModelConfig(**values).sizes("model"), name)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_from_a_hugging_face_folder_to_a_student(given, tmp_path, processes):
    root = tmp_path / "its student"
    model = count_parameters(open_hf(given))
    command = ["compress", *words(given, root, f"budget.parameters={0.7 * model:.0f}", f"processes={processes}")]
    done = run(*command, timeout=900)
    assert done.returncode == 0, done.stderr
    summary = json.loads((root / SUMMARY).read_text())
    student = open_model_folder(root / "distilled")
    assert 0 < summary["rounds"][0]["parameters"] == count_parameters(student.shape) <= 0.7 * model
    assert summary["loss"] > 0 and summary["rounds"][0]["loss"] > 0
    # The source and the student beside one another, where everything is, and what is next.
    printed = done.stdout
    assert (
        " source " in printed and f"{model:,}" in printed and "Kept: " in printed and "beside the source's" in printed
    )
    assert "Judged on: 4 windows, " in printed and " tokens of the validation split" in printed
    for line in (
        f"Student: {root}/distilled/model",
        f"Hugging Face folder: {root}/hf",
        f"Report: {root}/report/report.html",
    ):
        assert line in printed
    assert printed.rstrip().splitlines()[-2] == "Next:" and "pipeline" in printed.rstrip().splitlines()[-1]
    assert printed.count("\n$ ") == 9 + 9  # the plan, and each before it runs
    assert read_manifest(root / "distilled" / "model")["processes"] == processes
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(root / "hf").config.model_type == "qwen3"
    again = run(*command)
    assert again.returncode == 0 and again.stdout.count("done before in") == 9, again.stdout
    stands = run("status", root)
    assert stands.stdout.startswith(f"{root}: done (compress)")


def open_hf(given) -> ModelShape:
    from minitron_megatron.checkpoints.hf import HfFolder

    return HfFolder(given / "hf").shape


def test_a_dry_run_shows_the_plan_and_writes_nothing(hydra, given, tmp_path, capsys):
    compress(compose("compress", words(given, tmp_path / "x", "budget.parameters=30000", "dry_run=true")))
    printed = capsys.readouterr().out
    for what in ("would be run in", "at most", "calibration", "learning rate", "time", "layout"):
        assert what in printed
    assert shown(printed) == ["import_hf", "prepare_data", *FOLDERS, "export_hf", "report"]
    assert "data.sequence_length=64" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_target_in_place_of_a_budget_needs_no_search(hydra, given, tmp_path, capsys):
    compress(compose("compress", words(given, tmp_path / "x", "target.hidden_size=16", "dry_run=true")))
    printed = capsys.readouterr().out
    assert "search" not in shown(printed) and "target.hidden_size=16" in printed


def test_what_is_given_goes_over_what_is_chosen(hydra, given, tmp_path):
    more = [
        "budget.parameters=30000",
        "distill.optim.lr=0.25",
        "importance.trainer.micro_batch_size=3",
        "data.sequence_length=32",
    ]
    cfg = compose("compress", words(given, tmp_path / "x", *more, "distill.trainer.global_batch_size=12"))
    (one,) = make_plan(*settle_machine(cfg)).rounds
    distill = one.stages["distill"].config
    assert (distill.optim.lr, distill.trainer.steps, distill.trainer.global_batch_size) == (0.25, 3, 12)
    assert distill.optim.min_lr == 0.025 and distill.data.sequence_length == 32
    assert one.stages["importance"].config.trainer.micro_batch_size == 3
    assert one.stages["importance"].config.samples == 4


@pytest.mark.parametrize(
    ("take_out", "more", "says"),
    [
        ("hf", [], "no model: give hf=FOLDER"),
        ("hf", ["hf=/no/such"], "hf=/no/such does not exist"),
        ("", ["model=x"], "hf= and model=: give one of them"),
        ("input", [], "no text: give input=FILE"),
        ("input", ["input=/no/such.jsonl"], "input=/no/such.jsonl does not exist"),
        ("", ["data.path=x"], "input= and data.path=: give one of them"),
        ("budget.parameters", [], "how small is not said: give budget.parameters=4.5e9"),
        ("budget.parameters", ["prune.samples=9"], "how small is not said: give budget.parameters=4.5e9"),
        ("", ["target.hidden_size=8"], "budget.parameters= and target.hidden_size=: give one of them"),
        ("", ["rounds=[{name: a, prune: {target.hidden_size: 16}}]"], "budget.parameters= is for one round"),
        ("budget.parameters", ["budget.parameters=100"], "search: "),
        ("budget.parameters", ["budget.parameters=1e9"], "search: "),
        ("", FIXED, "search: the model has no smaller shape in this space: none has less than its "),
        (
            "budget.parameters",
            ["budget.parameters=1e9", *FIXED],
            "search: the model has no smaller shape in this space",
        ),
        ("", ["processes=3", "distill.trainer.global_batch_size=8"], "give a multiple of 3, such as 9"),
        (
            "",
            ["distill.trainer.global_batch_size=9", "distill.trainer.micro_batch_size=2"],
            "multiple of 2, such as 10",
        ),
        ("", ["prune.target.hidden_size=8"], "prune: target.hidden_size= and budget.parameters=: give one of them"),
        ("", ["data.sequence_length=500"], "500"),
        ("", ["export=false", "export_hf.license=mit"], "export_hf.license= is of a stage that does not run"),
        (
            "",
            ["search.budget.parameters=20000"],
            "search.budget.parameters= would be a second budget: write budget.parameters=",
        ),
        ("", ["distill.optim.lr=abc"], "distill: "),
        ("", ["distill.trainer.micro_batch_size=abc"], "distill: "),
        ("", ["data.max_epochs=0"], "data.max_epochs=0.0 must be above 0"),
        ("distill.trainer.steps", ["distill.trainer.tokens=1e9"], "or allow it by data.max_epochs="),
        ("", ["parallel.tensor=3", "processes=3"], "parallel.tensor=3"),
        ("", ["distill.trainer.step=3"], "distill: unknown option 'trainer.step'"),
        ("", ["prepare_data.model=x"], "prepare_data: model is set by the chain"),
        ("", ["prepare_data.text_key=words"], "has no text under 'words'"),
        (
            "budget.parameters",
            ["prune.target.ffn_hidden_size=[48,40,48,48]"],
            "export_hf: the student has layers of different",
        ),
        ("", ["cluster=h100"], "torch finds no CUDA device here: plan with dry_run=true"),
        ("importance.samples", ["importance.samples=100000"], "importance: "),
    ],
)
def test_mistakes_are_found_before_anything_runs(hydra, given, tmp_path, take_out, more, says):
    own = [
        word for word in words(given, tmp_path / "x", "budget.parameters=30000") if word.partition("=")[0] != take_out
    ]
    with pytest.raises(UserError) as error:
        compress(compose("compress", [*own, *more]))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_of_the_command_line_is_one_line(given, tmp_path):
    assert "did you mean budget" in error_of(run("compress", *words(given, tmp_path / "x", "budgt.parameters=3")))


def test_a_model_of_8_billion_on_a_node_of_gpus(hydra, tmp_path, capsys):
    plan = ["model=llama3_1_8b", "budget.parameters=4.5e9", "cluster=h100", "dry_run=true", f"output={tmp_path / 'x'}"]
    compress(compose("compress", plan))
    printed = capsys.readouterr().out
    assert "8 processes" in printed and "GiB of a h100" in printed and "8,030,261,248" in printed
    assert "data.sequence_length=4096" in printed and "optim.lr=0.0001" in printed
    assert "--nproc-per-node 8 distill" in printed and list(tmp_path.iterdir()) == []


def test_what_a_machine_has_no_room_for_is_said(hydra, given, tmp_path, monkeypatch):
    plan = ["model=llama3_1_70b", "budget.parameters=4e10", "dry_run=true", f"output={tmp_path}", "precision=fp32"]
    with pytest.raises(
        UserError, match=r"take [\d,.]+ GiB on CPUs in micro-batches of 1 \(.*and [\d,.]+ GiB are free here"
    ):
        compress(compose("compress", plan))
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    with pytest.raises(UserError, match=r"no space left for output=.*models and checkpoints of every round"):
        compress(compose("compress", words(given, tmp_path / "x", "budget.parameters=30000")))
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_said(hydra, tmp_path):
    plan = [
        "model=llama3_1_70b",
        "budget.parameters=4e10",
        "cluster=h100",
        "processes=1",
        "dry_run=true",
        f"output={tmp_path}",
    ]
    with pytest.raises(UserError, match=r"do not fit on processes=1 of h100: [\d.]+ GiB a GPU"):
        compress(compose("compress", plan))


@pytest.mark.parametrize(("train", "validation"), [(100, 40), (5000, 300), (10**6, 10**5), (10**12, 10**10)])
@pytest.mark.parametrize("processes", [1, 3])
def test_choices_are_ones_that_the_stages_take(train, validation, processes):
    """Whatever the size of the text: samples that there are, batches that divide, text read as often as is said."""
    teacher = shape_of("smollm2_135m", max_position_embeddings=2048)
    pair = Pair(teacher, teacher.resized(hidden_size=504))
    text = Text(train, validation, exact=True)
    cfg = CompressConfig(output="x", processes=processes)
    length, _ = choose_length(cfg, teacher, text, "cpu")
    cfg = replace(cfg, data=replace(cfg.data, sequence_length=length))
    found = choose(cfg, pair, text, "cpu", {stage: {} for stage in FOLDERS})
    distill = found.options["distill"]
    batch = distill["trainer.global_batch_size"]
    assert batch % (distill["trainer.micro_batch_size"] * processes) == 0
    assert 1 <= found.options["importance"]["samples"] <= max(1, train // length)
    tokens = distill["trainer.steps"] * batch * length
    assert tokens <= distill["data.max_epochs"] * train or distill["trainer.steps"] == 1
    assert tokens <= 1.01 * 100e9 and distill["optim.warmup_steps"] <= distill["trainer.steps"]
    assert length <= 512


def test_given_tokens_take_the_place_of_chosen_steps():
    choices = Choices({"distill": {"trainer.steps": 5, "optim.lr": 1.0}})
    assert choices.of("distill", {"trainer.tokens": 9}) == {"optim.lr": 1.0, "trainer.tokens": 9}


def test_text_is_counted_or_estimated(given, tmp_path):
    tokenizer = load_tokenizer(given / "hf")
    small = [given / "1.jsonl", given / "2.jsonl"]
    counted, exact = estimate_tokens(small, "text", Encoder(tokenizer))
    by_hand = sum(
        len(tokenizer(json.loads(line)["text"])["input_ids"]) + 1
        for file in small
        for line in file.read_text().splitlines()
    )
    assert exact and counted == by_hand
    large = tmp_path / "large.jsonl"
    large.write_text("".join(file.read_text() for file in small) * 40)
    estimated, exact = estimate_tokens([large], "text", Encoder(tokenizer))
    assert not exact and estimated == pytest.approx(40 * by_hand, rel=0.03)


def test_a_run_goes_on_with_what_was_chosen(hydra, given, tmp_path, monkeypatch):
    """On another machine too: what was chosen once text was there is read again, not chosen again."""
    root = tmp_path / "x"
    cfg = compose("compress", words(given, root, "budget.parameters=30000"))
    plan = make_plan(*settle_machine(cfg))
    from minitron_megatron.compress_plan import remember_choices

    root.mkdir()
    remember_choices(root, plan)
    values = json.loads((root / CHOSEN).read_text())
    values["options"]["distill"]["optim.lr"] = 0.125
    (root / CHOSEN).write_text(json.dumps(values))
    assert make_plan(*settle_machine(cfg)).rounds[0].stages["distill"].config.optim.lr == 0.125
    free = compose("compress", words(given, root, "budget.parameters=30000", "distill.trainer.keep_last=1"))
    assert make_plan(*settle_machine(free)).rounds[0].stages["distill"].config.optim.lr == 0.125
    other = compose("compress", words(given, root, "budget.parameters=30001"))
    assert make_plan(*settle_machine(other)).rounds[0].stages["distill"].config.optim.lr != 0.125


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "generation_config.json"])
def test_a_model_that_was_replaced_is_not_taken_for_the_one_before(hydra, given, tmp_path, monkeypatch, file):
    """As large files are told, and as small ones: the same bytes copied with their times are the same, others are refused."""
    hf, output = tmp_path / "hf", tmp_path / "x"
    shutil.copytree(given / "hf", hf)
    (hf / "generation_config.json").write_text("{}")
    monkeypatch.setattr(stamps, "LARGEST_READ", 0 if file == "model.safetensors" else stamps.LARGEST_READ)
    command = compose("compress", [f"hf={hf}", *words(given, output, "budget.parameters=30000", "processes=1")[1:]])
    before = make_plan(command, "cpu").source.inputs
    importing = compose("import_hf", [f"hf={hf}", f"output={output / 'teacher'}"])
    import_hf(importing)
    shutil.copytree(hf, tmp_path / "copy")
    shutil.rmtree(hf)
    shutil.copytree(tmp_path / "copy", hf)
    import_hf(importing)
    assert make_plan(command, "cpu").source.inputs == before
    changed = (hf / file).read_bytes()
    (hf / file).write_bytes(changed + b" " if file.endswith(".json") else changed[:-1] + bytes([changed[-1] ^ 1]))
    (output / "stages.json").write_text("{}")
    for again in (lambda: import_hf(importing), lambda: make_plan(command, "cpu"), lambda: check_compress(command)):
        with pytest.raises(
            UserError, match=rf"teacher was made from other files: {file} changed since; choose another"
        ):
            again()


def test_a_run_is_there_and_alone_while_it_is_planned(hydra, given, tmp_path, monkeypatch):
    """A second command is refused at once, `status` shows the first, and a mistake that shows now leaves nothing."""
    root, seen = tmp_path / "deep" / "x", []
    cfg = compose("compress", words(given, root, "budget.parameters=30000", "processes=1"))
    checked = check_compress(cfg)

    def plan(*_):
        found = status.look_at(root)
        seen.append((found.state, dict(found.lines)["lock"]))
        with pytest.raises(
            UserError,
            match=rf"^another run is at work in {root} \(process {os.getpid()} on .* or choose another output=$",
        ):
            compress(cfg, checked)
        raise UserError("a mistake")

    monkeypatch.setattr(compressing, "make_plan", plan)
    for _ in range(2):
        with pytest.raises(UserError, match=r"^a mistake$"):
            compress(cfg, checked)
    assert [state for state, _ in seen] == ["running"] * 2 and all("which runs" in lock for _, lock in seen)
    assert list(tmp_path.iterdir()) == []
    # A folder that was there stays; one with something done keeps what is done.
    root.mkdir(parents=True)
    with pytest.raises(UserError, match=r"^a mistake$"):
        compress(cfg, checked)
    assert list(root.iterdir()) == []
    (root / "stages.json").write_text('{"import_hf": {"seconds": 1.0, "what": null}}')
    with pytest.raises(UserError, match=r"^a mistake$"):
        compress(cfg, checked)
    assert "import_hf" in (root / "stages.json").read_text()


def test_all_is_checked_once(hydra, given, tmp_path, monkeypatch):
    """The model's files, the stages as given, and the space of the search: whatever is checked is not checked again."""
    counts = dict.fromkeys(("check", "scan", "find_inputs"), 0)

    def counting(place, name):
        whole = getattr(place, name)

        def counted(*arguments, **named):
            counts[name] += 1
            return whole(*arguments, **named)

        monkeypatch.setattr(place, name, counted)

    counting(compress_source.HfFolder, "check")
    counting(compress_given, "scan")
    counting(compress_source, "find_inputs")
    COMMANDS["compress"](compose("compress", words(given, tmp_path / "x", "budget.parameters=30000", "dry_run=true")))
    assert counts == {"check": 1, "scan": 1, "find_inputs": 1}


@pytest.mark.parametrize("batch", [1, 40, 96])
def test_a_layout_divides_the_batch_that_was_given(hydra, tmp_path, batch):
    """On GPUs too, where the fastest one would not."""
    plan = ["model=llama3_1_8b", "budget.parameters=4.5e9", "cluster=h100", "dry_run=true", f"output={tmp_path / 'x'}"]
    cfg, device = settle_machine(compose("compress", [*plan, "processes=8"]))
    teacher = shape_of("llama3_1_8b", num_layers=2)
    pair = Pair(teacher, teacher.resized(ffn_hidden_size=7168))
    layout, micro, _ = choose_layout(cfg, pair, 4096, batch, device, {"trainer.global_batch_size": batch})
    assert batch % (micro * layout.data) == 0
    six = replace(cfg, processes=6)
    if batch % 3:
        with pytest.raises(
            UserError, match=rf"={batch} does not divide .* multiple of 3, such as {-(-batch // 3) * 3}$"
        ):
            choose_layout(six, pair, 4096, batch, device, {"trainer.global_batch_size": batch})


def test_a_micro_batch_fits_into_free_memory(monkeypatch):
    teacher = shape_of("smollm2_135m")
    pair, cfg = Pair(teacher, teacher.resized(hidden_size=504)), CompressConfig(output="x", processes=1)
    layout, micro, _ = choose_layout(cfg, pair, 512, 8, "cpu", {})
    need = choosing._gib_on_cpus(cfg, pair, layout, 512, 8, [4, 2, 1])
    assert micro == 4 and need == sorted(need, reverse=True)
    for free, fits in ((need[0], 4), (need[0] - 0.01, 2), (need[1] - 0.01, 1), (need[2], 1)):
        monkeypatch.setattr(choosing, "free_gib", lambda free=free: free)
        assert choose_layout(cfg, pair, 512, 8, "cpu", {})[1] == fits
    monkeypatch.setattr(choosing, "free_gib", lambda: need[2] - 0.01)
    with pytest.raises(
        UserError, match=r"take [\d.]+ GiB on CPUs in micro-batches of 1 .* GiB are free here: use a larger"
    ):
        choose_layout(cfg, pair, 512, 8, "cpu", {})
    monkeypatch.setattr(choosing, "free_gib", lambda: need[1])
    with pytest.raises(UserError, match="in micro-batches of 4"):
        choose_layout(cfg, pair, 512, 8, "cpu", {"trainer.micro_batch_size": 4})


def test_more_programs_than_memory_holds_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(compress_plan, "free_gib", lambda: 8.0)
    with pytest.raises(UserError, match=r"processes=1000000: the programs alone take .* give at most 10, or start="):
        check_compress(CompressConfig(output="x", hf="nowhere", processes=1000000))
    for elsewhere in ({"start": "srun minitron"}, {"cluster": HardwareConfig(gpu="h100")}, {"processes": 10}):
        with pytest.raises(UserError, match="no text: give input"):
            check_compress(CompressConfig(**{"output": "x", "hf": "nowhere", "processes": 1000000, **elsewhere}))


def test_small_models_are_planned_by_their_small_operations():
    """Least step times of tiny models as they were measured, with what an operation took there."""
    tiny = shape_of(
        "smollm2_135m", hidden_size=32, ffn_hidden_size=48, num_attention_heads=8, num_query_groups=4, head_dim=8
    )
    pace = Pace(flops=1e11, operation=2.79e-6, start=0.0)
    found = {
        (2, 2, 8, 1): 0.0934,
        (8, 8, 8, 1): 0.3803,
        (8, 2, 8, 1): 0.1745,
        (2, 2, 8, 4): 0.0359,
        (8, 8, 8, 4): 0.1069,
        (2, 2, 32, 1): 0.4456,
    }
    for (teacher, student, batch, micro), seconds in found.items():
        pair = Pair(
            replace(tiny, num_layers=teacher, vocab_size=300), replace(tiny, num_layers=student, vocab_size=300)
        )
        work = Work(length=32, calibration=1, windows=1, steps=100, batch=batch, micro=micro, data=1, validated=0)
        assert seconds_of_stages(pair, work, pace, 1)["distill"] / 100 == pytest.approx(seconds, rel=0.3)


@pytest.mark.parametrize(
    ("threads", "processes", "cores"), [("", 1, 8), ("", 2, 8), ("", 3, 6), ("1", 2, 2), ("9", 2, 8), ("x", 8, 8)]
)
def test_a_machines_pace_is_that_of_the_cores_that_stages_have(monkeypatch, threads, processes, cores):
    """Three products of 2 · 512 · hidden · ffn operations in a second here; OMP_NUM_THREADS is that of each process."""
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(pace, "usable_cores", lambda: 8)
    monkeypatch.setattr(pace, "_least", lambda work: work() or 0.5)
    sizes = SimpleNamespace(hidden_size=8, ffn_of_layers=(12, 16))
    assert pace._flops(sizes, "float32", processes) == 3 * 2 * 512 * 8 * 16 / 0.5 * cores
