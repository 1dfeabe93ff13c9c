"""What launch/benchmark.py checks by its options and output alone: before torch is there."""

from minitron_megatron.checkpoints.folder import open_model_folder
from minitron_megatron.checkpoints.index import check_weights
from minitron_megatron.config import BenchmarkConfig
from minitron_megatron.errors import UserError
from minitron_megatron.models.limits import check_layout, check_sequence
from minitron_megatron.models.shape import ModelShape
from minitron_megatron.outputs import check_command_output
from minitron_megatron.parallel.layout import Layout, world_size_from_env
from minitron_megatron.prune.select import target_shape

# Measures of a model in a layout, of a folder or of a preset; and of presets with their targets. (The others: ceilings has no
# model, scaling has layouts of its own, prune a folder that is cut in no layout.)
_OF_A_MODEL = frozenset({"importance", "layers", "memory", "cut"})
_OF_A_PAIR = frozenset({"loss", "step", "throughput"})


def check_benchmark(cfg: BenchmarkConfig) -> Layout:
    """Layout, models and output. Raises UserError."""
    layout = Layout.from_config(cfg.parallel)
    check_command_output(cfg, {})
    if cfg.measure in _OF_A_MODEL:
        shape = _shape(cfg)
        check_layout(shape, layout)
        check_sequence(cfg.sequence_length, layout)
        if cfg.measure == "cut":
            check_layout(target_shape(shape, vars(cfg.target), []), layout, "the target")
    elif cfg.measure in _OF_A_PAIR:
        source, target = source_and_target(cfg)
        check_layout(source, layout)
        check_layout(target, layout, "the target")
    elif cfg.measure == "prune":
        check_weights(open_model_folder(cfg.model.folder("model")))
    if cfg.measure == "mistakes" and world_size_from_env() > 1:
        raise UserError("start measure=mistakes in one process: it starts every command itself")
    if cfg.measure == "memory" and layout.pipeline > 1:
        raise UserError(f"parallel.pipeline={layout.pipeline}: measure=memory takes one stage, use parallel.tensor")
    return layout


def _shape(cfg: BenchmarkConfig) -> ModelShape:
    if cfg.model.path is not None:
        return open_model_folder(cfg.model.path).shape
    return ModelShape.from_dict(cfg.model.sizes("model"), "model")


def source_and_target(cfg: BenchmarkConfig) -> tuple[ModelShape, ModelShape]:
    """The preset `model=` and its `target=`."""
    source = ModelShape.from_dict(cfg.model.sizes("model"), "model")
    return source, target_shape(source, vars(cfg.target), [])
