"""Which tests own which files: the room of a file, and the test files that are to notice a bug in it, the nearest first.

Of several beginnings that fit a file's path the longest counts. tests/test_mutants.py holds that every file of the product has
tests, and that every test file is somebody's.
"""

import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "minitron_megatron/"

# Room: beginnings of paths (below the package where they have no slash in front), and their test files without test_ and .py.
ROOMS = {
    "commands": {
        "": "mistakes light",
        "cli/": "command_line mistakes next light commands",
        "cli/arguments.py": "command_line arguments preset_files mistakes submit",
        "cli/flags.py": "command_line",
        "cli/next_command.py": "next",
        "cli/spelling.py": "spelling next status",
        "config.py": "config automatic lengths mistakes preset_files train distill",
        "asked.py": "paths continuing",
        "changing.py": "continuing checkpoints",
        "effects.py": "idle continuing",
        "idle.py": "idle",
        "console.py": "tables bars environments evaluate next",
        "errors.py": "plain_files mistakes ending",
        "launcher.py": "command_line preset_files lengths mistakes next submit arguments",
        "lengths.py": "lengths plain_files",
        "measuring.py": "frame importance layers evaluate precision",
        "outputs.py": "frame checkpoints search prune",
        "over_data.py": "importance layers cache",
        "plain_files.py": "plain_files",
        "plain_text.py": "plain_text",
        "preset_files.py": "preset_files",
        "starts.py": "status status_lines train report",
        "status.py": "status_lines status",
        "words.py": "next preset_files",
        "automatic.py": "automatic graphs",
        "machine.py": "machine demo",
        "/requirements/": "environments",
        "/launch/": "command_line commands readme",
        "/conf/": "preset_files commands submit search compress readme",
        "/conf/lm_eval/": "evaluate",
        "/docker/": "environments",
    },
    "ending": {
        "ending.py": "claims ending",
        "claims.py": "claims ending plain_files",
        "first_moments.py": "ending",
        "readers.py": "ending",
        "unheard.py": "unheard ending",
        "witness.py": "witness ending",
        "parallel/torchrun.py": "launcher ending submit",
    },
    "parallel": {
        "parallel/": "job_parts parallel precision graphs",
        "parallel/deciding.py": "job_parts deciding parallel",
        "parallel/fake.py": "job_parts foresee",
        "parallel/hardware.py": "job_parts foresee",
        "parallel/precision.py": "precision_parts precision",
    },
    "models": {
        "models/": "build models axes distill families",
        "models/axes.py": "axes models families search merging",
        "models/config_keys.py": "shapes hf_configs",
        "models/families.py": "shapes families models hf_configs hf_sources",
        "models/hf_keys.py": "shapes hf_configs families",
        "models/hf_rope.py": "shapes hf_configs families",
        "models/forward.py": "passes models distill families",
        "models/fp8.py": "build fp8 blocks",
        "models/generation.py": "passes generation throughput",
        "models/graphs.py": "graph_parts graphs",
        "models/guessing.py": "guessing",
        "models/head.py": "passes blocks distill cache measures",
        "models/kernels.py": "kernels",
        "models/limits.py": "shapes models levers search prune light fp8",
        "models/loss.py": "passes correction distill",
        "models/megatron_lm.py": "nemo_fields export_megatron",
        "models/nemo.py": "nemo_fields nemo hf_configs",
        "models/nemo_keys.py": "hf_configs nemo",
        "models/objective.py": "passes correction distill train intermediate kernels",
        "models/shape.py": "shapes models families axes hf_configs",
        "models/vocab_parallel.py": "blocks measures distill kernels",
    },
    "checkpoints": {
        "checkpoints/": "checkpoints families durable plain_files",
        "checkpoints/finite.py": "finite",
        "checkpoints/hf.py": "hf_folder checkpoints families hf_sources against_transformers",
        "checkpoints/hf_folder.py": "hf_folder hf_sources checkpoints families damage",
        "checkpoints/safetensors_stream.py": "hf_folder checkpoints finite durable",
        "checkpoints/random_model.py": "weights checkpoints families",
        "checkpoints/weights.py": "weights checkpoints families durable finite light",
        "checkpoints/card.py": "card_parts card",
        "checkpoints/model_card.md.jinja": "card_parts card",
        "checkpoints/lineage.py": "ancestors card report",
        "checkpoints/folder.py": "outputs durable checkpoints plain_files report manifests trust",
        "checkpoints/index.py": "index checkpoints light nemo",
        "checkpoints/reading.py": "weights checkpoints index blocks",
        "checkpoints/unpickling.py": "index",
        "checkpoints/stamps.py": "copies trust inputs bounds checkpoints",
        "checkpoints/task_stamps.py": "copies inputs",
        "checkpoints/tokenizer.py": "tokenizer_parts tokenizers hf_sources",
        "checkpoints/megatron_lm.py": "nemo_folder export_megatron",
        "checkpoints/nemo.py": "nemo_folder nemo",
        "checkpoints/nemo_folder.py": "nemo_folder nemo",
        "checkpoints/archive.py": "archive nemo blocks",
        "checkpoints/damage.py": "damage saved",
        "checkpoints/digests.py": "copies blocks saved trust",
        "checkpoints/copies.py": "copies trust",
        "checkpoints/locks.py": "outputs saved",
        "checkpoints/places.py": "outputs",
        "checkpoints/unfinished.py": "outputs checkpoints status",
        "checkpoints/zarr_arrays.py": "nemo_folder nemo",
        "checkpoints/gguf.py": "export_checks families",
        "checkpoints/export_checks.py": "export_checks export_megatron nemo families",
        "checkpoints/exporting.py": "export_checks export_megatron nemo checkpoints",
    },
    "data": {
        "data/": "prepare data encoding",
        "data/coverage.py": "coverage",
        "data/datasets.py": "samples data encoding",
        "data/prepare.py": "prepare tokenise data encoding",
        "data/windows.py": "samples data",
        "data/encoding.py": "encoding coverage",
        "data/estimate.py": "prepare one_command",
        "data/folder.py": "samples blend data encoding",
        "data/questions.py": "questions layers evaluate",
        "data/same_tokenizer.py": "questions inputs tokenizers",
        "data/sample_index.py": "samples trust data",
        "data/token_ids.py": "token_ids",
        "data/vocabulary.py": "token_ids merging tokenizers",
    },
    "importance": {
        "importance/": "calibration importance layers layer_figures",
        "importance/blocks.py": "layers prune",
        "importance/layer_checks.py": "layers evaluate",
        "importance/layer_passes.py": "layer_figures layers",
        "importance/layers.py": "layer_figures layers prune",
        "importance/kernels.py": "kernels",
        "importance/scores.py": "prune search importance",
        "importance/statistics.py": "blocks importance",
        "importance/variants.py": "layers",
        "layer_analysis.py": "layer_figures layers prune",
    },
    "prune": {
        "prune/": "prune_checks prune merging",
        "prune/cut.py": "blocks prune merging",
        "prune/live.py": "live",
        "prune/foresee.py": "prune_checks live merging",
        "prune/compare.py": "prune_checks merging",
        "prune/plan.py": "plans prune merging",
        "prune/select.py": "selecting prune merging",
        "prune/named.py": "search",
    },
    "distill": {
        "distill/": "distill teachers",
        "distill/cache.py": "contents cache trust routing",
        "distill/cache_checks.py": "contents cache",
        "distill/cache_teacher.py": "contents cache candidates",
        "distill/choices.py": "intermediate distill",
        "distill/contents.py": "contents cache",
        "distill/intermediate.py": "routing intermediate",
        "distill/losses.py": "blocks distill objective cache",
        "distill/objective.py": "objective distill cache intermediate",
        "distill/offload.py": "teachers",
        "distill/routed.py": "teachers",
        "distill/routing.py": "routing teachers",
        "distill/teacher.py": "teachers distill",
    },
    "train": {
        "train/": "train schedule",
        "train/begin.py": "beginning continuing",
        "train/census.py": "planned_memory foresee fp8 teachers",
        "train/checkpoint.py": "saver loop restarts durable saved train intermediate",
        "train/checks.py": "run_checks inputs train continuing",
        "train/correct_teacher.py": "teacher_checks correction",
        "train/distill.py": "teacher_checks contents train teachers",
        "train/distill_checks.py": "teacher_checks run_checks tokenizers intermediate inputs train",
        "train/foresee.py": "plan_tables foresee automatic",
        "train/identity.py": "identity continuing",
        "train/guard.py": "schedule",
        "train/loop.py": "loop train schedule",
        "train/memory.py": "planned_memory foresee fp8 teachers",
        "train/metrics.py": "metrics train durable bars",
        "train/optimizer.py": "loop schedule distill train",
        "train/overlap.py": "loop graphs automatic",
        "train/rounds.py": "loop teachers distill",
        "train/run.py": "beginning loop restarts train continuing levers saved",
        "train/saved.py": "loop saved restarts inputs train plain_files",
        "train/schedule.py": "schedule",
        "train/speed.py": "speed foresee",
    },
    "evaluate": {
        "evaluate/": "harness evaluate layers",
        "evaluate/adapter.py": "requests evaluate",
        "evaluate/checks.py": "tokenizers harness evaluate layers",
        "evaluate/run_tasks.py": "requests harness evaluate",
        "evaluate/scoring.py": "requests evaluate",
    },
    "report": {
        "report/": "opening report figures sections",
        "report/cutting.py": "figures report",
        "report/folders.py": "lineage report sections",
        "report/layers.py": "figures layers report",
        "report/lineage.py": "lineage report",
        "report/models.py": "sections opening figures report",
        "report/opening.py": "opening report",
        "report/page.py": "figures report hostile",
        "report/page.html": "report",
        "report/plots.py": "plots report",
        "report/training.py": "sections opening report",
        "report/trials.py": "lineage trials report",
    },
    "search": {"search/": "budget search_numbers found search"},
    "candidates": {"candidates/": "trials candidates", "candidates/halving.py": "candidates trials"},
    "throughput": {"throughput/": "rates throughput"},
    "chains": {
        "stages.py": "stages compress inputs trust plain_files demo",
        "composing.py": "stages compress one_command candidates",
        "compress.py": "chain compress one_command",
        "compress_": "rounds one_command compress",
        "compress_plan.py": "choosing rounds chain one_command compress",
        "pace.py": "choosing one_command",
        "choosing.py": "choosing one_command",
        "chosen.py": "choosing one_command",
        "demo.py": "demo",
        "demo_plan.py": "demo_plan demo",
        "demo_speed.py": "demo_plan demo",
    },
    "benchmark": {"benchmark/": "bench_figures benchmark foresee memory"},
    "slurm": {
        "submit.py": "job submit hostile",
        "job.sh.jinja": "hostile job submit",
        "/slurm/": "restarts submit compress slurm",
        "/slurm/common.sh": "restarts submit slurm",
    },
}  # fmt: skip
# Beside those, for every file of Python: quick ones that go through the rooms.
OF_ALL = ("bounds", "always")
# Of the whole: a wheel, and this.
OF_NONE = ("wheel", "mutants", "used")


class Owner(NamedTuple):
    """A room, and its test files for a file, the nearest first."""

    room: str
    tests: tuple[str, ...]


def owner(file: str) -> Owner | None:
    """Who owns a file, named as it lies in the repository."""
    found = [
        (len(beginning), room, tests)
        for room, files in ROOMS.items()
        for start, tests in files.items()
        if file.startswith(beginning := start.removeprefix("/") if start.startswith("/") else PACKAGE + start)
    ]
    if not found:
        return None
    _, room, tests = max(found)
    names = [*tests.split(), *(OF_ALL if file.endswith(".py") and file.startswith(PACKAGE) else ())]
    return Owner(room, tuple(f"tests/test_{name}.py" for name in dict.fromkeys(names)))


def product() -> list[str]:
    """Every file of the product that can have a bug: programs and templates; links of the package to the repository are one."""
    kinds = (".py", ".sh", ".jinja", ".html")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    return [f for f in listed.stdout.split("\n") if f.endswith(kinds) and not f.startswith(("tests/", ".ci/", "docs/"))]
