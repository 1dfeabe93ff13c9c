"""What a run says of its steps: rates of the job and of each GPU, and which lines are kept."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from minitron_megatron.config import HardwareConfig, LoggerConfig
from minitron_megatron.train import metrics as metrics_of_run
from minitron_megatron.train.loop import StepResult
from minitron_megatron.train.metrics import Metrics, StepMetrics

RESULT = StepResult({"loss": 2.0}, 1.5, 1e-3, tokens=800, seconds=2.0, data_seconds=0.5, taken=True, stop=False)


def test_rates_of_a_step_are_of_the_job_and_of_each_of_its_gpus():
    made = StepMetrics(1e9, 4, torch.float32, torch.device("cpu"), HardwareConfig())
    values = made.values(7, RESULT, 3)
    assert values.pop("resident_gib") > 0 and "mfu" not in values
    assert values == {
        "step": 7,
        "loss": 2.0,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "skipped": 3,
        "tokens": 800,
        "tokens_per_second": 400.0,
        "tokens_per_second_per_gpu": 100.0,
        "tflops_per_gpu": 0.1,
        "step_seconds": 2.0,
        "data_seconds": 0.5,
    }
    made.peak = 4e11
    assert made.values(7, RESULT, 3)["mfu"] == 0.25


def test_lines_are_kept_on_the_interval_with_validations_and_at_the_end_and_cut_back_to_the_restored_step(tmp_path):
    file = tmp_path / "metrics.jsonl"

    def run(start: int, *steps: int, validated: tuple[int, ...] = ()) -> list[int]:
        metrics = Metrics(tmp_path, LoggerConfig(wandb="disabled", interval=3), {}, 8, start, "a run")
        for step in steps:
            metrics.add({"step": step, "loss": 1.0, "tokens_per_second": 2.0})
            if step in validated:
                metrics.add({"step": step, "validation_loss": 1.0})
        metrics.close()
        return [json.loads(line)["step"] for line in file.read_text().splitlines()]

    assert run(0, *range(1, 9), validated=(5,)) == [3, 5, 6, 8]
    for start, left in ((8, [3, 5, 6, 8]), (7, [3, 5, 6]), (6, [3, 5, 6]), (5, [3, 5]), (2, [])):
        file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (3, 5, 6, 8)) + '{"step": 1')
        assert run(start) == left


def test_progress_is_a_line_every_15_seconds_and_at_the_end(tmp_path, monkeypatch, caplog):
    """Without a terminal. Time that is left is at the pace since the start; a line of a validation says nothing."""
    caplog.set_level("INFO", "minitron_megatron")
    now = [100.0]
    monkeypatch.setattr(metrics_of_run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    made = Metrics(tmp_path, LoggerConfig(wandb="disabled", interval=1), {}, 6, 2, "distill")
    for step, at in ((3, 116.0), (4, 131.0), (5, 132.0), (6, 133.0)):
        now[0] = at
        made.add({"step": step, "loss": 2.0, "tokens_per_second": 1234.5})
        made.add({"step": step, "validation_loss": 1.0})
    made.close()
    assert caplog.messages == [
        "step 3 of 6: loss 2.0000, 1,234 tokens/s, 48 s left",
        "step 5 of 6: loss 2.0000, 1,234 tokens/s, 11 s left",
        "step 6 of 6: loss 2.0000, 1,234 tokens/s, 0 s left",
    ]
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [one["run_seconds"] for one in kept if "loss" in one] == [16.0, 31.0, 32.0, 33.0]
    assert not any("run_seconds" in one for one in kept if "loss" not in one) and len(kept) == 8


@pytest.mark.parametrize(("name", "shown"), [(None, "folder"), ("mine", "mine")])
def test_wandb_gets_the_run_of_the_folder(tmp_path, monkeypatch, name, shown):
    started = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: started.append(given)))
    folder = tmp_path / "folder"
    folder.mkdir()
    for _ in range(2):
        metrics_of_run._start_wandb(folder, LoggerConfig(wandb="offline", project="p", name=name), {"a": 1})
    assert metrics_of_run._start_wandb(folder, LoggerConfig(wandb="disabled"), {}) is None
    one, other = started
    assert one == other and len(one.pop("id")) == 8
    wanted = {"project": "p", "name": shown, "resume": "allow", "mode": "offline", "dir": str(folder)}
    assert one == {**wanted, "config": {"a": 1}}


@pytest.mark.parametrize(
    ("given", "name", "peak"),
    [
        (HardwareConfig(), "NVIDIA H100 80GB HBM3", True),
        (HardwareConfig(), "Tesla T4", False),
        (HardwareConfig(gpu="a100"), "Tesla T4", True),
        (HardwareConfig(bf16_tflops=5.0), "Tesla T4", True),
    ],
)
def test_utilisation_is_of_a_gpu_that_is_known(monkeypatch, given, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(metrics_of_run, "peak_memory", lambda graphs: (8 if graphs else 4) * 2**30)
    made = StepMetrics(1.0, 1, torch.bfloat16, torch.device("cuda"), given, graphs=True)
    assert (made.peak is not None) == peak and made._memory() == {"memory_gib": 3.0, "memory_peak_gib": 8.0}
    if given.bf16_tflops:
        assert made.peak == 5e12
    assert StepMetrics(1.0, 1, torch.bfloat16, torch.device("cpu"), HardwareConfig(gpu="a100")).peak is None
