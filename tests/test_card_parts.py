"""The parts of a model card, each worked out by hand, and a whole one from its first line to its last."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from minitron_megatron.checkpoints import card
from minitron_megatron.checkpoints.card import Measured, as_reached, counts, model_card, read_results
from minitron_megatron.checkpoints.folder import ModelFolder, output_folder
from minitron_megatron.checkpoints.hf_folder import write_shape
from minitron_megatron.checkpoints.lineage import Step
from minitron_megatron.config import ExportHfConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import count_parameters
from tests.test_bounds import SMALL_SHAPE


def made(path: Path | str, digest: str | None = "d", config: dict | None = None, **manifest) -> Step:
    return Step(Path(path), digest, {"config": config or {}, **manifest})


IMPORTANCE = {"importance": {"sequence": "mean", "batch": "l2"}, "data": {"path": "text", "sequence_length": 32}}


@pytest.mark.parametrize(
    ("scores", "there", "asked"),
    [(None, True, "o/pruned_scores"), ("o/scores", True, "o/scores"), ("o/scores", False, "o/scores")],
)
def test_a_choice_is_by_layers_and_by_the_scores_that_were_read(monkeypatch, scores, there, asked):
    """Those that a pruning measured itself lie beside it; of scores that were replaced since their digest alone is known."""
    looked = []
    found = Step(Path("s"), "S")
    if there:
        found = made("s", "S", IMPORTANCE | {"samples": 9}, inputs={"model": "m"}, results={"samples": 8})
    monkeypatch.setattr(card, "find_step", lambda path, digest: looked.append((str(path), digest)) or found)
    config = {"output": "o/pruned/", "scores": scores, "drop_layers": [2], "layers": "L", "prune": {"judge": "bi"}}
    of_scores = [
        ["importance over tokens, over samples", "mean l2"],
        ["calibration", "8 samples of 32 tokens"],
        ["calibration data", "text"],
        ["digest of the scores", "S"],
    ]
    of_scores = of_scores if there else of_scores[-1:]
    of_layers = [["layers dropped by number", [2]], ["layers chosen by", "L, bi"]]
    assert card._calibration(made("p", config=config, inputs={"model": "m", "scores": "S"})) == [*of_layers, *of_scores]
    assert looked == [(asked, "S")]
    without = made("p", config={**config, "drop_layers": [], "layers": None}, inputs={"model": "m", "scores": "S"})
    assert card._calibration(without) == [["layers dropped by number", None], *of_scores]
    assert card._calibration(made("p", config=config, inputs={"model": "m"})) == of_layers and len(looked) == 2
    assert card._calibration(made("p", config={**config, "plan": "plan.yaml"})) == [["chosen by", "a plan (plan.yaml)"]]


def test_a_pruning_shows_what_was_kept_and_what_it_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "_calibration", lambda step: [["by", "hand"]])
    plan = {"layers": "0-1 3", "hidden": "all", "ffn": [[1], [2]], "kv_groups": "0-3", "merged_heads": [[1]]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    results = {"parameters_source": 12, "loss_around_the_cut": {"before": 2.0, "after": 2.5}, "kept_digest": "k"}
    assert card._pruning(made(tmp_path, results=results)) == [
        ["parameters of the source", 12],
        ["kept of layers", "0-1 3"],
        ["kept of hidden", "all"],
        ["kept of vocab", None],
        ["kept neurons", "chosen in each layer"],
        ["kept key-value groups", "0-3"],
        ["merged heads", "yes"],
        ["by", "hand"],
        ["loss, before", 2.0],
        ["loss, after", 2.5],
        ["digest of what was kept", "k"],
    ]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"merged_heads": "0-3", "q_heads": "0"}))
    rows = dict(card._pruning(made(tmp_path)))
    assert (rows["merged heads"], rows["kept query heads"]) == ("0-3", "0") and "kept neurons" not in rows
    (tmp_path / "plan.yaml").unlink()
    assert dict(card._pruning(made(tmp_path)))["kept of layers"] is None


RUN = {
    "optim": {"lr": 1e-3, "min_lr": 1e-4, "schedule": "linear", "warmup_steps": 4},
    "trainer": {"global_batch_size": 2},
    "data": {"sequence_length": 4, "path": "text"},
}


@pytest.mark.parametrize(
    ("steps", "changed", "found"),
    [
        (10, {}, {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 4}),
        (None, {}, {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 4}),
        (
            2,
            {},
            {"lr": "0.0005 (asked: 0.001)", "min_lr": "0.0005 (asked: 0.0001)", "warmup_steps": "2 (asked: 4)"},
        ),
        (10, {"warmup_tokens": 24}, {"lr": 1e-3, "warmup_steps": 3, "warmup_tokens": 24}),
        (10, {"warmup_steps": None, "warmup_tokens": 24}, {"warmup_steps": 3}),
        (10, {"schedule": None}, {"lr": 1e-3, "warmup_steps": 4}),
        (10, {"lr": 1.0005e-3}, {"lr": 1.0005e-3}),
    ],
)
def test_rates_that_a_run_did_not_reach_stand_beside_what_was_asked(steps, changed, found):
    step = made("r", config={**RUN, "optim": {**RUN["optim"], **changed}})
    assert {name: as_reached(f"optim.{name}", step.of, steps) for name in found} == found
    assert as_reached("data.path", step.of, steps) == "text"


@pytest.mark.parametrize(
    ("tokens", "value", "shown"), [(None, None, True), (None, 3, True), (8, None, False), (8, 3, True)]
)
def test_a_warm_up_is_shown_unless_it_is_in_tokens(tokens, value, shown):
    assert counts("optim.warmup_steps", {"optim.warmup_tokens": tokens, "optim.warmup_steps": value}.get) is shown


def test_a_training_shows_its_teacher_its_options_and_what_it_found():
    config = {**RUN, "teacher": {"path": "t"}, "seed": 5, "trainer": {"global_batch_size": 2, "fp8": "none"}}
    began = {"takes": "weights", "checkpoint": "c", "stamp": "s", "options": {}}
    step = made(
        "r", config=config, inputs={"teacher": "T", "data": "D"}, results={"steps": 10, "loss": 2.0}, started_from=began
    )
    assert card._training(step) == [
        ["teacher", "t (T)"],
        ["begun with", "weights of c (s)"],
        ["data", "text"],
        ["sequence length, tokens", 4],
        ["samples of a step", 2],
        ["peak learning rate", 1e-3],
        ["learning rate at the end", 1e-4],
        ["schedule", "linear"],
        ["warm-up steps", 4],
        ["seed", 5],
        ["digest of the data", "D"],
        ["steps", 10],
        ["tokens", None],
        ["skipped steps", None],
        ["step that is published", None],
        ["loss of its last step", 2.0],
        ["validation loss", None],
    ]
    alone = card._training(made("r", config={"seed": 5}))
    assert alone[:2] == [["warm-up steps", None], ["seed", 5]]
    distilled = {**config, "student": {"path": "s"}, "distill": {}}
    for kind, title in (
        (distilled, "Distillation"),
        ({**config, "model": {}}, "Correction on the data"),
        ({"model": {}, "target": {}, "drop_layers": []}, "Pruning"),
    ):
        (section,) = card._recipe(made("r", config=kind))
        assert section["title"] == title and section["table"].startswith("|  | value |")
    assert card._recipe(made("r", config={"hf": "h"})) == []


def test_results_are_a_row_a_figure():
    """Of the model, of its teacher beside it, and of tasks with their errors; what is no number is none."""
    tasks = {
        "arc": {"acc": 0.5, "acc_stderr": 0.01, "f1": 2, "fewshot": 25, "alias": "arc", "ok": True, "nan": math.nan}
    }
    one = Measured(Path("e"), "d", {"data": {"path": "text"}, "split": "test"}, {"loss": 2.0, "agreement": 0.25})
    other = Measured(Path("f"), "d", {}, {"loss": 12345.0, "perplexity": True, "tasks": tasks})
    assert card._results([]) == "" and card._results([replace(one, values={})]) == ""
    assert card._results([one, other]).splitlines() == [
        "|  | value | shots | measured on |",
        "|---|---|---|---|",
        "| loss | 2 |  | text, test |",
        "| agreement | 0.25 |  | text, test |",
        "| loss | 1.234e+04 |  | f |",
        "| arc, acc | 0.5 ± 0.01 | 25 | lm-evaluation-harness |",
        "| arc, f1 | 2 | 25 | lm-evaluation-harness |",
    ]
    beside = replace(one, values={**one.values, "teacher_loss": 1.0})
    assert card._results([beside]).splitlines()[2:] == [
        "| loss | 2 | 1 |  | text, test |",
        "| agreement | 0.25 |  |  | text, test |",
    ]


def test_evaluations_are_read_with_what_they_were_asked(tmp_path):
    (tmp_path / "m").mkdir()
    folder = ModelFolder(tmp_path / "m", SMALL_SHAPE, "blake3:a")
    for name, inputs in (("mine", {"model": "blake3:a"}), ("no", {}), ("other", {"model": "blake3:b"})):
        with output_folder(tmp_path / name, command="", config={"split": name}, inputs=inputs, resume=True) as out:
            (out.path / "results.json").write_text('{"loss": 2.0}')
    (found,) = read_results([str(tmp_path / "mine")], folder)
    assert (found.path, found.config["split"], found.values) == (tmp_path / "mine", "mine", {"loss": 2.0})
    for name, says in (("no", "is not an evaluation"), ("other", r"is of another model \(blake3:b\)")):
        with pytest.raises(UserError, match=says):
            read_results([str(tmp_path / name)], folder)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/c/models--org--Name-1.5B/snapshots/0a", "org/Name-1.5B"),
        ("/c/models--org--a--b/snapshots/0a/sub", "org/a--b"),
        ("/c/models--org--Name/blobs/0a", None),
        ("/c/mymodels--org--Name/snapshots/0a", None),
    ],
)
def test_a_download_cache_says_which_repository_it_is_of(path, name):
    assert card._hub_name([made("x"), made(path)]) == name


WHOLE = """---
library_name: transformers
pipeline_tag: text-generation
license: mit
base_model: org/Näme
tags:
- llama
- minitron
- megatron
- pruned
- distilled
---

# small

A smaller org/Näme: {parameters} parameters, bfloat16, LlamaForCausalLM.
Made by [minitron_megatron](https://arxiv.org/abs/2408.11796) (pruned, then distilled, then distilled).
This card was written from the manifests of the model and its ancestors. What they do not say, such as intended use and the
contents of the data, is not here.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("small", dtype="auto")
```

## Shape

{shape}

## Pruning

|  | value |
|---|---|
| parameters of the source | 12 |

## Distillation

|  | value |
|---|---|
| steps | 3 |

## Distillation

|  | value |
|---|---|
| steps | 4 |

## Results

|  | value | shots | measured on |
|---|---|---|---|
| loss | 2 |  | e |

## Lineage

|  | folder | digest | made | versions |
|---|---|---|---|---|
| distilled | d2 | 4 | today | torch 2, x 1 |
| distilled | d1 | 3 |  |  |
| pruned | p | 2 |  |  |
| imported | i | not known |  |  |
| teacher: source | t | 9 |  |  |

The commands, first to last:

~~~~
c1
c3
c4
~~~~
"""


def test_a_card_is_this(tmp_path, monkeypatch):
    """From the first line to the last."""
    distilled = {"teacher": {"path": "t"}, "student": {"path": "s"}, "distill": {}}
    source = SMALL_SHAPE.resized(num_layers=9)
    (tmp_path / "i").mkdir()
    write_shape(tmp_path / "i", source)
    monkeypatch.chdir(tmp_path)
    steps = [
        made("d2", "4", distilled, results={"n": 4}, made="today", versions={"torch": "2", "x": "1"}, command="c4"),
        made("d1", "3", distilled, results={"n": 3}, command="c3"),
        made("p", "2", {"model": {}, "target": {}, "drop_layers": []}, results={"n": 12}),
        made("i", None, {"hf": "h"}, command="c1"),
    ]
    monkeypatch.setattr(card, "lineage", lambda folder: steps)
    monkeypatch.setattr(card, "teachers", lambda given: [Step(Path("t"), "9")] if given is steps else [])
    monkeypatch.setattr(card, "_pruning", lambda step: [["parameters of the source", step.results["n"]]])
    monkeypatch.setattr(card, "_training", lambda step: [["steps", step.results["n"]], ["tokens", None]])
    folder = ModelFolder(tmp_path / "m", SMALL_SHAPE, "4")
    results = [Measured(Path("e"), "d", {}, {"loss": 2.0})]
    cfg = ExportHfConfig(output="o/small", base_model="org/Näme", license="mit")
    counted = [f"{count_parameters(one):,}" for one in (SMALL_SHAPE, source)]
    found = model_card(cfg, folder, results)
    (shape,) = re.findall(r"## Shape\n\n(.*?)\n\n## Pruning", found, re.DOTALL)
    assert found == WHOLE.format(parameters=counted[0], shape=shape)
    lines = shape.splitlines()
    assert lines[:3] == ["|  | this model | source |", "|---|---|---|", "| num_layers | 4 | 9 |"]
    assert lines[-3:-1] == ["| rope_theta | 500,000 | 500,000 |", "| tied_embeddings | False | False |"]
    assert lines[-1] == f"| parameters | {counted[0]} | {counted[1]} |"
    write_shape(tmp_path / "i", SMALL_SHAPE)
    assert "| num_layers | 4 |\n" in (plain := model_card(cfg, folder, [])) and "## Results" not in plain
    assert "|  | this model |\n" in plain and "source |" not in plain.split("## Pruning")[0]
