"""TensorRT-LLM by its own `trtllm-bench`: the file of requests, the command (in NVIDIA's image unless it is here), its report.

    requests.jsonl, a line a request: {"task_id": 0, "input_ids": [17, 4, …], "output_tokens": 128}
    trtllm-bench --model NAME --model_path FOLDER throughput --dataset requests.jsonl … --report_json report.json

A batch size is so many requests at once (`--concurrency`), each repeat as many more requests. The end of a text is ignored,
which is trtllm-bench's default.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from minitron_megatron.errors import UserError
from minitron_megatron.plain_files import read_json
from minitron_megatron.throughput.work import Work

PROGRAM = "trtllm-bench"
# As NVIDIA's instructions start its images.
_DOCKER = ("docker", "run", "--rm", "--gpus", "all", "--ipc", "host", "--ulimit", "memlock=-1")
_DOCKER += ("--ulimit", "stack=67108864")
# What a step of prompts may hold at once; trtllm-bench's own choice can be below one prompt.
_TOKENS_AT_ONCE = 8192


def missing(image: str) -> str | None:
    """Why it cannot run here, None where it can."""
    if shutil.which(PROGRAM) or shutil.which("docker"):
        return None
    return (
        f"engine=tensorrt_llm needs {PROGRAM} or docker, and neither is on the PATH: run this on a machine with "
        f"{image}, or see the commands with dry_run=true"
    )


def write_requests(work: Work, batch: int, file: Path) -> None:
    """The file of requests of a batch size."""
    with open(file, "w", encoding="utf-8") as lines:
        for number, prompt in enumerate(work.prompts(batch) * work.repeats):
            line = {"task_id": number, "input_ids": prompt, "output_tokens": work.output_length}
            lines.write(json.dumps(line) + "\n")


def command(work: Work, name: str, batch: int, files: Path, image: str) -> list[str]:
    """The words that measure a batch size; `files` has the requests and gets the report, by absolute paths in either world."""
    files, folder = files.absolute(), Path(work.folder).absolute()
    options = {
        "backend": "pytorch",
        "dataset": files / requests_file(name, batch),
        "num_requests": batch * work.repeats,
        "concurrency": batch,
        "max_batch_size": batch,
        "max_num_tokens": max(_TOKENS_AT_ONCE, work.input_length),
        "warmup": batch * work.warmup,
        "tp": work.parallel["tensor"],
        "pp": work.parallel["pipeline"],
        "report_json": files / report_file(name, batch),
    }
    words = [PROGRAM, "--model", name, "--model_path", str(folder), "throughput"]
    for option, value in options.items():
        words += [f"--{option}", str(value)]
    if shutil.which(PROGRAM):
        return words
    mounts = [word for path in (folder, files) for word in ("--volume", f"{path}:{path}")]
    return [*_DOCKER, *mounts, image, *words]


def requests_file(name: str, batch: int) -> str:
    """Name of the file of requests."""
    return f"{name}_batch{batch}_requests.jsonl"


def report_file(name: str, batch: int) -> str:
    """Name of the report."""
    return f"{name}_batch{batch}_report.json"


def read_report(file: Path, work: Work, batch: int) -> dict[str, Any]:
    """The row of a report. Raises UserError where it is not of these requests."""
    try:
        report = read_json(file)
        requests, found = report["request_info"], report["performance"]
        made, length = requests["num_requests"], requests["avg_output_length"]
        rate, milliseconds = found["system_output_throughput_tok_s"], found["total_latency_ms"]
        version = report["engine"]["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a report of {PROGRAM} as 1.2 writes it ({error!r}): see the log") from None
    if made != batch * work.repeats or abs(length - work.output_length) > 1e-6:
        raise UserError(
            f"{file}: {made} requests of {length:g} tokens, not {batch * work.repeats} of {work.output_length}"
        )
    seconds = milliseconds / 1e3 / work.repeats
    return {
        "batch": batch,
        "tokens_per_second": rate,
        "seconds": seconds,
        "memory_gib": None,
        "version": version,
    }


def environment() -> dict[str, str]:
    """Its own, without what torchrun or this software's Python path would tell it."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
