"""What a run says of its steps: rates of the job and of each GPU, and which lines are kept."""

import json

import torch

from minitron_megatron.config import HardwareConfig, LoggerConfig
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
