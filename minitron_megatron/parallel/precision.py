"""What `precision=auto` computes in, decided by the machine, once for all ranks of a job.

On GPUs it is the model folder's dtype. On CPUs a bfloat16 folder is computed in bfloat16 only where products in it are faster
than in float32, and in float32 elsewhere: without instructions for bfloat16 its products are ten to a hundred times slower.
What torch says of a processor does not tell (it says AVX512 with ONEDNN_MAX_CPU_ISA=AVX2 too), so products are timed:

    x·wᵀ, g·w, gᵀ·x in both dtypes, in turns, by one thread (of several each waits for the slowest: beside other work the times
    say nothing) ──▶ least times ──▶ a file in the user's cache folder, one for each kind of machine
    rank 0 reads or measures, the others are told (`settled`) ──▶ every model of the job (models/build.py, `model_dtype`)

What continues keeps the dtype it began with, whatever this machine would choose (`keep`). Weights on disk stay as they are.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from minitron_megatron.automatic import Choice
from minitron_megatron.errors import UserError, in_one_line
from minitron_megatron.parallel.deciding import ask_rank_zero
from minitron_megatron.plain_files import read_json, write_whole

log = logging.getLogger(__name__)
# In a folder that can be continued: what it is computed in.
FILE = "precision.json"
DTYPES = ("float32", "bfloat16")
PRODUCTS = ("forward", "gradient of inputs", "gradient of weights")
# Tokens, inputs and outputs of the products. Where the small ones say no clear word, large ones are asked.
SMALL, LARGE = (128, 256, 512), (512, 576, 1536)
# How many times as fast bfloat16 must be. Measured: 1.8 to 2.6 with instructions for it, 0.04 to 0.6 without.
CLEARLY_FASTER = 1.2
_UNCLEAR = (0.7, 1.6)
# Each product is timed so often, or less where that takes longer than this; twice at least.
_TIMES, _SECONDS = 6, 0.35
# What sets how torch multiplies, apart from the processor.
_VARIABLES = ("ONEDNN_", "DNNL_", "ATEN_CPU_", "MKL_", "TORCH_CPU", "OPENBLAS_", "BLIS_")


@dataclass(frozen=True)
class Products:
    """What products reach on this machine, GFLOP/s by dtype and then by product (PRODUCTS), and on which machine that is."""

    gflops: Mapping[str, Mapping[str, float]]
    machine: str

    @property
    def gain(self) -> float:
        """How many times as fast the three products are in bfloat16 as in float32."""
        seconds = {dtype: sum(1 / rate for rate in rates.values()) for dtype, rates in self.gflops.items()}
        return seconds["float32"] / seconds["bfloat16"]

    @property
    def dtype(self) -> str:
        """The dtype to compute a bfloat16 model in."""
        return "bfloat16" if self.gain >= CLEARLY_FASTER else "float32"

    def __str__(self) -> str:
        return f"products in bfloat16 are {self.gain:.2g} times as fast as in float32 on this machine ({self.machine})"


def _choice(dtype: str, why: str) -> Choice:
    """What `auto` computes a bfloat16 folder in, and why."""
    return Choice("precision", dtype, why)


class _Job:
    """What was settled for the job that this process is in; None outside of jobs, and where `auto` is the folder's dtype."""

    choice: Choice | None = None
    # What a model of this job, or of the last one, was computed in by it.
    used: Choice | None = None
    # Within `recalled`: the job that follows says it.
    ahead = False


def auto_dtype(stored: str) -> str:
    """What `precision=auto` computes in, for a folder of this dtype: the folder's own, unless this job settled otherwise."""
    if stored != "bfloat16" or _Job.choice is None:
        return stored
    if _Job.used != _Job.choice:
        if not _Job.ahead:
            say(_Job.choice)
        _Job.used = _Job.choice
    return _Job.choice.value


def asks_machine(precision: str, *stored: str) -> bool:
    """Whether `precision=` leaves something to decide on CPUs, for folders of these dtypes."""
    return precision == "auto" and "bfloat16" in stored


def say(choice: Choice, verb: str = "computing") -> None:
    """One line for people."""
    log.info("precision=auto: %s in %s, %s", verb, choice.value, choice.reason)


def record() -> dict[str, str]:
    """For a manifest: what `auto` was in the last job and why; nothing where it decided nothing."""
    return {"computed_in": _Job.used.value, "why": _Job.used.reason} if _Job.used else {}


@contextlib.contextmanager
def settled(device_type: str) -> Iterator[None]:
    """Within it `auto` is what this machine is faster in. Every rank of the job enters; rank 0 decides."""
    before = _Job.choice
    _Job.choice = _Job.used = None
    if device_type == "cpu":
        import torch

        # As `measure` leaves it: whether a rank has measured must not show in its sums.
        torch.set_num_threads(torch.get_num_threads())
        _Job.choice = ask_rank_zero(of_this_machine)
    try:
        yield
    finally:
        _Job.choice = before


def of_bfloat16() -> str:
    """The dtype that `auto` computes a bfloat16 folder in, in this job."""
    return _Job.choice.value if _Job.choice else "bfloat16"


def _nobody() -> None:
    """What there is to continue does not say what it was computed in."""


def keep(file: Path, *, begun: Callable[[], bool], told: Callable[[], str | None] = _nobody) -> None:
    """Have `auto` mean what it meant when a run or an output began; every rank calls it, in a job.

    Args:
        file: where that is written, and is written now where there is nothing to continue.
        begun: tells rank 0 whether there is something to continue. Without the file it is from before machines decided, and was
            computed in the folder's dtype.
        told: tells rank 0 what it was computed in, where what is continued says so itself; then the file does not count.

    Raises:
        UserError: the file is damaged.
    """

    def find() -> Choice | None:
        if (dtype := told()) is None and file.exists():
            dtype = _read_kept(file)
        if dtype is None:
            own = None if begun() else _Job.choice
            dtype = "bfloat16" if own is None else own.value
            values = {"computed_in": dtype, **({} if own is None else {"why": own.reason})}
            write_whole(file, json.dumps(values) + "\n")
        if dtype == of_bfloat16():
            return _Job.choice
        why = f"; {_Job.choice.reason}" if _Job.choice else ""
        slow = ", so another output= with precision=fp32 would be faster" if _Job.choice and dtype == "bfloat16" else ""
        return _choice(dtype, f"in which {file.parent} was begun{why}{slow}")

    _Job.choice = ask_rank_zero(find)


@contextlib.contextmanager
def recalled(file: Path, told: str | None = None) -> Iterator[None]:
    """Before a job that continues: within it `auto` is what is `told`, or `keep` has written, if any. Raises UserError."""
    before = _Job.choice
    if told is not None or file.exists():
        _Job.choice = _choice(told or _read_kept(file), f"in which {file.parent} was begun")
    _Job.ahead = True
    try:
        yield
    finally:
        _Job.choice, _Job.ahead = before, False


def _read_kept(file: Path) -> str:
    try:
        dtype = read_json(file)["computed_in"]
        if dtype not in DTYPES:
            raise ValueError(f"computed_in={dtype!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read ({in_one_line(error)}), which says what this was computed in: write "
            '{"computed_in": "bfloat16"} or "float32" into it, or choose another output='
        ) from None
    return dtype


@cache
def of_this_machine() -> Choice:
    """What this machine's CPUs are faster in, measured once for each machine and environment."""
    found = products()
    return _choice(found.dtype, f"since {found}")


def products() -> Products:
    """What products reach here: from the user's cache folder, else measured and left there."""
    machine, key = _machine()
    file = (
        _cache_folder() / f"products-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json" if _cache_folder() else None
    )
    known = _read(file, key)
    if known is not None:
        return known
    found = Products(measure(SMALL), machine)
    if _UNCLEAR[0] < found.gain < _UNCLEAR[1]:
        found = Products(measure(LARGE), machine)
    if file is not None:
        # A read-only home, a full disk: it is measured again next time.
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps({"of": key, **asdict(found)}, indent=1) + "\n")
    return found


def _machine() -> tuple[str, str]:
    """This machine in words for people, and everything that changes how fast it multiplies."""
    import torch

    model, flags = processor()
    variables = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(_VARIABLES))
    set_here = "".join(f", {pair}" for pair in variables)
    of = [model, flags, torch.__version__, torch.backends.cpu.get_cpu_capability(), variables]
    return f"{model}{set_here}", json.dumps(of)


def processor() -> tuple[str, str]:
    """The processor's name, and a digest of what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    can = values.get("flags", values.get("Features", ""))
    name = values.get("model name") or platform.processor() or platform.machine()
    kind = [values.get(field, "") for field in ("vendor_id", "cpu family", "model", "stepping")]
    return name, hashlib.sha256(" ".join([*kind, can]).encode()).hexdigest()[:16]


def _cache_folder() -> Path | None:
    """Where the user keeps what can be made again; None where there is no home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    with contextlib.suppress(RuntimeError):
        return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "minitron_megatron"
    return None


def _read(file: Path | None, key: str) -> Products | None:
    """What was measured before; None where there is nothing, nothing readable, or that of another machine."""
    if file is None:
        return None
    try:
        values = read_json(file)
        rates = {dtype: {name: float(values["gflops"][dtype][name]) for name in PRODUCTS} for dtype in DTYPES}
        sound = values["of"] == key and all(0 < rate < 1e9 for of in rates.values() for rate in of.values())
        return Products(rates, str(values["machine"])) if sound else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure(sizes: tuple[int, int, int]) -> dict[str, dict[str, float]]:
    """GFLOP/s by dtype and product, of `sizes` = (tokens, inputs, outputs): the best of several, dtypes in turns.

    What else runs on the machine only lengthens some of the times, so the least ones count.
    """
    import torch

    tokens, inputs, outputs = sizes
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        least = _least_seconds(sizes)
    finally:
        torch.set_num_threads(before)
    work = 2 * tokens * inputs * outputs / 1e9
    return {dtype: {name: work / seconds for name, seconds in times.items()} for dtype, times in least.items()}


def _least_seconds(sizes: tuple[int, int, int]) -> dict[str, dict[str, float]]:
    timed = {dtype: dict(zip(PRODUCTS, _products(sizes, dtype), strict=True)) for dtype in DTYPES}
    least = {dtype: dict.fromkeys(PRODUCTS, float("inf")) for dtype in DTYPES}
    began = time.perf_counter()
    for turn in range(_TIMES):
        for name in PRODUCTS:
            for dtype in DTYPES:
                least[dtype][name] = min(least[dtype][name], _seconds(timed[dtype][name]))
        if turn > 0 and time.perf_counter() - began > _SECONDS:
            break
    return least


def _products(sizes: tuple[int, int, int], dtype: str) -> list[Callable[[], Any]]:
    """x·wᵀ, g·w and gᵀ·x of a linear layer. Nothing is drawn from the generators of the run."""
    import torch

    tokens, inputs, outputs = sizes
    draw = torch.Generator().manual_seed(0)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, device="cpu").normal_(generator=draw).to(getattr(torch, dtype))

    x, w, g = drawn(tokens, inputs), drawn(outputs, inputs), drawn(tokens, outputs)
    return [lambda: x @ w.t(), lambda: g @ w, lambda: g.t() @ x]


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-9)
