"""Which tests compute with bfloat16 models on a processor: noticed where models are built, so that one without its mark fails.

`pytest -m bf16` runs them alone, as .ci/run does where oneDNN is held to AVX2, to be a processor without bfloat16. Models on a
GPU need no mark.
"""

import os
from pathlib import Path
from typing import Any

# Names the file that says so; processes of a test's pool inherit it.
VARIABLE = "MODELS_IN_BF16"


def watch() -> None:
    """From here on a bfloat16 model that this process builds on a CPU leaves the file."""
    import torch

    from minitron_megatron.models import build

    plain = build.build_gpt

    def noticed(shape: Any, layout: Any, dtype: torch.dtype, *rest: Any, **more: Any) -> Any:
        model = plain(shape, layout, dtype, *rest, **more)
        # A dry run's models are on the meta device and compute nothing.
        on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
        if on_cpu and dtype is torch.bfloat16 and VARIABLE in os.environ:
            Path(os.environ[VARIABLE]).touch()
        return model

    build.build_gpt = noticed


def seen() -> bool:
    """Whether one was built since this was last asked."""
    file = Path(os.environ[VARIABLE])
    there = file.exists()
    file.unlink(missing_ok=True)
    return there
