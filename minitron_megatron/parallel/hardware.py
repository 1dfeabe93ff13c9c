"""What a GPU and its node can do, by data sheet: the figures of conf/cluster, for plans and for utilisation."""

import logging
from dataclasses import fields

import torch

from minitron_megatron.config import HardwareConfig
from minitron_megatron.launcher import CONF
from minitron_megatron.plain_files import read_yaml

log = logging.getLogger(__name__)
DEFAULT_GPU = "h100"
# GB200 before the rest: the first name that is part of the device's counts.
GPUS = ("gb200", "h100", "h200", "a100")


def gpu_of(device_name: str) -> str | None:
    """The preset of conf/cluster for torch's name of a device, such as "NVIDIA H100 80GB HBM3"; None where there is none."""
    return next((gpu for gpu in GPUS if gpu in device_name.lower()), None)


def hardware(given: HardwareConfig) -> HardwareConfig:
    """The hardware with every figure that was not given taken from its GPU's preset: the named one, this machine's, or h100."""
    preset = read_yaml(CONF / "cluster" / f"{given.gpu or _gpu_here() or DEFAULT_GPU}.yaml")
    names = [f.name for f in fields(HardwareConfig)]
    own = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    return HardwareConfig(**{**{name: preset[name] for name in names}, **own})


def _gpu_here() -> str | None:
    """The preset of this machine's GPUs; None where there are none, or none that is known."""
    return gpu_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def say_assumed(given: HardwareConfig) -> None:
    """Say in a line which GPU a plan is for, where neither the options nor this machine name one."""
    if given.gpu is None and _gpu_here() is None:
        there = "an unknown GPU" if torch.cuda.is_available() else "no GPU"
        others = ", ".join(f"cluster={gpu}" for gpu in GPUS if gpu != DEFAULT_GPU)
        log.info("%s here: the plan is for cluster=%s; %s plans for another", there, DEFAULT_GPU, f"{others} or a file")


def peak_flops(gpu: HardwareConfig, dtype: torch.dtype) -> float:
    """Operations a second at the most in a dtype: bfloat16 on tensor cores, float32 without them."""
    return 1e12 * (gpu.bf16_tflops if dtype is torch.bfloat16 else gpu.fp32_tflops)
