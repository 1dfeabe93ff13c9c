"""The one list of commands: each one's options, what checks them, and what does the work.

    options (config.py)  ──▶  check: looks at options and folders alone  ──▶  run: does the work with what the check found

Functions are named as "module:function" and imported when they are needed. A check imports nothing heavy (torch, Megatron,
transformers): a mistake is said within a second of the command line.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from minitron_megatron import config as options
from minitron_megatron.console import busy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """A command of launch/. Functions are "module:function", below minitron_megatron.

    check: called with the options; what it returns is for `run`. Raises UserError.
    run: called with the options and with what `check` returned.
    after_dashes: the option whose value is the list of words after `--`.
    bare: the option whose value may stand alone, without its name.
    """

    name: str
    config: type
    check: str
    run: str
    after_dashes: str | None = None
    bare: str | None = None

    def __call__(self, config: Any) -> None:
        """Check, say what is going to be done, run. Raises UserError."""
        checked = _load(self.check)(config)
        if isinstance(config, options.CommandConfig) and not config.dry_run:
            log.info("%s into %s: %s", self.name, config.output, (self.config.__doc__ or "").strip().rstrip("."))
        with busy(f"{self.name}: loading its libraries"):
            run = _load(self.run)
        run(config, checked)

    def only_check(self, config: Any) -> None:
        """Check, without the work. Raises UserError."""
        _load(self.check)(config)


def _load(dotted: str) -> Callable[..., Any]:
    module, _, function = dotted.partition(":")
    return getattr(import_module(f"minitron_megatron.{module}"), function)


_ALL = (
    Command("demo", options.DemoConfig, "demo:check_demo", "demo:run_demo"),
    Command("smollm2", options.Smollm2Config, "checkpoints.gguf:check_smollm2", "checkpoints.gguf:unpack_smollm2"),
    Command(
        "import_hf", options.ImportHfConfig, "checkpoints.export_checks:check_import_hf", "checkpoints.hf:import_hf"
    ),
    Command(
        "import_nemo",
        options.ImportNemoConfig,
        "checkpoints.nemo_folder:check_import_nemo",
        "checkpoints.nemo:import_nemo",
    ),
    Command(
        "random_model",
        options.RandomModelConfig,
        "checkpoints.export_checks:check_random_model",
        "checkpoints.random_model:make_random_model",
    ),
    Command("prepare_data", options.PrepareDataConfig, "data.prepare:check_prepare", "data.prepare:prepare_data"),
    Command("adopt_data", options.AdoptDataConfig, "data.adopt:check_adopt", "data.adopt:adopt_data"),
    Command(
        "importance",
        options.ImportanceConfig,
        "importance.checks:check_importance",
        "importance.measure:measure_importance",
    ),
    Command("merge_scores", options.MergeScoresConfig, "importance.merge:check_merge", "importance.merge:merge_scores"),
    Command("layers", options.LayersConfig, "importance.layer_checks:check_layers", "layer_analysis:analyse_layers"),
    Command("search", options.SearchConfig, "search.search:check_search", "search.search:search_shapes"),
    Command("prune", options.PruneConfig, "prune.checks:check_prune", "prune.prune:prune_model"),
    Command(
        "cache_teacher",
        options.CacheTeacherConfig,
        "distill.cache_checks:check_cache_teacher",
        "distill.cache_teacher:cache_teacher",
    ),
    Command(
        "correct_teacher",
        options.CorrectTeacherConfig,
        "train.correct_teacher:check_correct_teacher",
        "train.correct_teacher:correct_teacher",
    ),
    Command("distill", options.DistillConfig, "train.distill_checks:check_distill", "train.distill:distill"),
    Command("evaluate", options.EvaluateConfig, "evaluate.checks:check_evaluate", "evaluate.evaluate:evaluate"),
    Command(
        "export_hf", options.ExportHfConfig, "checkpoints.export_checks:check_export_hf", "checkpoints.hf:export_hf"
    ),
    Command(
        "export_megatron",
        options.ExportMegatronConfig,
        "checkpoints.export_checks:check_export_megatron",
        "checkpoints.megatron_lm:export_megatron",
    ),
    Command(
        "export_nemo",
        options.ExportNemoConfig,
        "checkpoints.export_checks:check_export_nemo",
        "checkpoints.nemo:export_nemo",
    ),
    Command("throughput", options.ThroughputConfig, "throughput.run:check_throughput", "throughput.run:throughput"),
    Command("compress", options.CompressConfig, "compress_plan:check_compress", "compress:compress"),
    Command(
        "distill_candidates",
        options.DistillCandidatesConfig,
        "candidates.run:check_candidates",
        "candidates.run:distill_candidates",
    ),
    Command("benchmark", options.BenchmarkConfig, "benchmark.checks:check_benchmark", "benchmark.run:benchmark"),
    Command("report", options.ReportConfig, "report.report:check_report", "report.report:report"),
    Command("status", options.StatusConfig, "status:check_status", "status:status", bare="folder"),
    Command("submit", options.SubmitConfig, "submit:check_submit", "submit:submit", after_dashes="command"),
)
COMMANDS: dict[str, Command] = {command.name: command for command in _ALL}
