"""Imported once by the server that the processes of tests are forks of: what takes long to import, and none of ours.

Nothing here starts a thread: what forks must have none.
"""

import contextlib
import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in (
    "torch", "megatron.core", "megatron.core.optimizer", "megatron.core.datasets.gpt_dataset", "transformers",
    "transformers.models.llama.modeling_llama", "hydra", "hypothesis", "safetensors.torch", "pytest", "xdist",
):  # fmt: skip
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)
