"""A shape in NeMo's words, and back: its configs are read as data, by a list of fields, and nothing in them is ever called.

NeMo 2 keeps a model's config twice in context/: io.json, a graph of callables and their arguments that its loader executes, and
model.yaml, the same with every default filled in. Here io.json is written and model.yaml read. NeMo 1 has model_config.yaml.
Names and defaults are those of nemo-toolkit 2.7.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron_megatron.errors import UserError
from minitron_megatron.models.axes import TRAITS, Traits
from minitron_megatron.models.config_keys import number, shown, truth, whole_number
from minitron_megatron.models.megatron_lm import ROPE_SCALING
from minitron_megatron.models.nemo_keys import NEMO1, NEMO2, NEMO2_MODEL
from minitron_megatron.models.shape import DTYPES, SIZES, ModelShape, RopeScaling

_MODELS = "nemo.collections.llm.gpt.model"


@dataclass(frozen=True)
class NemoClass:
    """NeMo's module and names for a family; `scaled` is the config class that has Llama 3's scaling of rotary frequencies."""

    module: str
    model: str
    config: str
    scaled: str | None = None
    # Arguments whose default in that class is not what a model of this family has.
    fixed: Mapping[str, Any] = field(default_factory=dict)
    # What stands for a seq_length of none, which NeMo's importer writes for Mistral without a sliding window.
    seq_length: int | None = None


CLASSES = {
    "llama": NemoClass("llama", "LlamaModel", "LlamaConfig", "Llama31Config"),
    "mistral": NemoClass(
        "mistral",
        "MistralModel",
        "MistralConfig7B",
        fixed={"window_size": None, "cp_comm_type": None},
        seq_length=32768,
    ),
    "qwen2": NemoClass("qwen2", "Qwen2Model", "Qwen2Config"),
    "qwen3": NemoClass("qwen3", "Qwen3Model", "Qwen3Config"),
    "nemotron": NemoClass("nemotron", "NemotronModel", "NemotronConfig"),
}
_ACTIVATIONS = {
    "silu": "torch.nn.functional.silu",
    "squared_relu": "nemo.collections.llm.fn.activation.squared_relu",
}
_ROPE_SCALING = {
    "factor": "scale_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "old_context_len",
}


def check_nemo_class(shape: ModelShape, where: str) -> NemoClass:
    """NeMo's class for a shape. Raises UserError for what none of them can say."""
    found = CLASSES[shape.family]
    if not shape.uniform:
        raise UserError(
            f"{where} has layers of different ffn_hidden_size, and NeMo's {found.config} has one for all: prune to one "
            "ffn_hidden_size to export"
        )
    if shape.rope_scaling and not found.scaled:
        raise UserError(f"{where} has rope_scaling, and NeMo's {found.config} has none: export it with export_hf")
    return found


def config_fields(shape: ModelShape) -> dict[str, Any]:
    """Arguments of NeMo's config class for a shape: plain values only, whatever the class's defaults are."""
    traits = TRAITS[shape.family]
    scaling = (
        {_ROPE_SCALING[name]: value for name, value in vars(shape.rope_scaling).items()} if shape.rope_scaling else {}
    )
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "seq_length": shape.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": shape.rope_theta,
        "rotary_percent": shape.rotary_percent,
        **scaling,
        "normalization": traits.normalization,
        "layernorm_zero_centered_gamma": traits.zero_centered_gain,
        "layernorm_epsilon": shape.norm_eps,
        "gated_linear_unit": traits.gated,
        "add_bias_linear": False,
        "add_qkv_bias": traits.qkv_bias,
        "qk_layernorm": traits.qk_norm,
        "share_embeddings_and_output_weights": shape.tied_embeddings,
        "fp16": False,
        "bf16": shape.dtype == "bfloat16",
        **CLASSES[shape.family].fixed,
    }


@dataclass(frozen=True)
class Symbol:
    """A callable or constant by its place in Python."""

    module: str
    name: str

    def pyref(self) -> dict[str, str]:
        """Fiddle's form."""
        return {"type": "pyref", "module": self.module, "name": self.name}


@dataclass(frozen=True)
class Call:
    """A callable with its arguments, as fiddle's Config has it."""

    target: Symbol
    arguments: Mapping[str, Any]


def _model(shape: ModelShape, where: str, tokenizer: str | None) -> Call:
    """The model of a context: the class with its config and tokenizer, a path relative to the context."""
    found = check_nemo_class(shape, where)
    module = f"{_MODELS}.{found.module}"
    config = Call(
        Symbol(module, found.scaled if shape.rope_scaling else found.config),
        {
            **config_fields(shape),
            "params_dtype": Symbol("torch", shape.dtype),
            "activation_func": Symbol(*_ACTIVATIONS[TRAITS[shape.family].activation].rsplit(".", 1)),
        },
    )
    arguments: dict[str, Any] = {"config": config}
    if tokenizer:
        kind = Symbol("nemo.collections.common.tokenizers.huggingface.auto_tokenizer", "AutoTokenizer")
        arguments["tokenizer"] = Call(kind, {"pretrained_model_name": tokenizer})
    return Call(Symbol(module, found.model), arguments)


def io_json(shape: ModelShape, where: str, tokenizer: str | None) -> dict[str, Any]:
    """context/io.json: the trainer's context that `nemo.lightning.io.load_context` builds, as NeMo's own importers write it."""
    strategy = Call(
        Symbol("nemo.lightning.pytorch.strategies.megatron_strategy", "MegatronStrategy"),
        {"ckpt_save_optimizer": False},
    )
    trainer = Call(
        Symbol("nemo.lightning.pytorch.trainer", "Trainer"),
        {"accelerator": "cpu", "strategy": strategy, "devices": 1},
    )
    context = Call(
        Symbol("nemo.lightning.io.pl", "TrainerContext"),
        {"model": _model(shape, where, tokenizer), "trainer": trainer},
    )
    objects: dict[str, Any] = {}
    root = _Fiddle(objects).add(context, "<root>")
    return {"root": root, "objects": objects, "refcounts": dict.fromkeys(objects, 1), "version": "0.0.1"}


class _Fiddle:
    """Writes a Call as fiddle 0.3 serializes its Config: objects by name that refer to one another."""

    def __init__(self, objects: dict[str, Any]) -> None:
        self.objects = objects

    def add(self, value: Any, path: str) -> Any:
        """What stands for a value; calls become objects."""
        if isinstance(value, Symbol):
            return {**value.pyref(), "paths": [path]}
        if not isinstance(value, Call):
            return {"type": "leaf", "value": value, "paths": [path]}
        items = [[f"Attr(name={n!r})", self.add(v, f"{path}.{n}")] for n, v in value.arguments.items()]
        names = [[f"Index(index={i})", name] for i, name in enumerate(value.arguments)]
        of_dict = {"type": Symbol("builtins", "tuple").pyref(), "items": [], "metadata": None}
        metadata = Symbol("fiddle._src.config", "BuildableTraverserMetadata").pyref()
        about = {
            "fn_or_cls": value.target.pyref(),
            "argument_names": self._ref(
                "tuple", {"type": Symbol("builtins", "tuple").pyref(), "items": names, "metadata": None}
            ),
            **{
                name: self._ref("dict", {"type": Symbol("builtins", "dict").pyref(), "items": [], "metadata": of_dict})
                for name in ("argument_tags", "argument_history")
            },
        }
        described = self._ref(
            "metadata",
            {"type": metadata, "items": [[f"Attr(name={n!r})", v] for n, v in about.items()], "metadata": metadata},
        )
        kind = Symbol("fiddle._src.config", "Config").pyref()
        return self._ref("config", {"type": kind, "items": items, "metadata": described, "paths": [path]})

    def _ref(self, kind: str, value: dict[str, Any]) -> dict[str, str]:
        key = f"{kind}_{len(self.objects) + 1}"
        self.objects[key] = value
        return {"type": "ref", "key": key}


def model_yaml(shape: ModelShape, where: str, tokenizer: str | None) -> dict[str, Any]:
    """context/model.yaml: the model as plain values; callables by their `_target_`."""
    return _plain(_model(shape, where, tokenizer))


def _plain(value: Any) -> Any:
    if isinstance(value, Symbol):
        return {"_call_": False, "_target_": f"{value.module}.{value.name}"}
    if isinstance(value, Call):
        target = f"{value.target.module}.{value.target.name}"
        return {"_target_": target, **{name: _plain(argument) for name, argument in value.arguments.items()}}
    return value


# Reading


@dataclass(frozen=True)
class Fields:
    """A config's fields with NeMo 2's names, and where they stand, for errors; `family` where the config names its class."""

    values: Mapping[str, Any]
    where: str
    family: str | None = None

    def number(self, name: str) -> Any:
        """A number that must be there. Raises UserError."""
        value = self.values.get(name)
        if value is None:
            raise UserError(f"{self.where}: {name} is missing")
        if type(value) not in (int, float):
            raise UserError(f"{self.where}: {name}={shown(value)} is not a number")
        return value

    def size(self, name: str, ours: str = "") -> int:
        """A size that must be there, called `ours` here. Raises UserError."""
        self.number(name)
        return whole_number(self.values, name, self.where, SIZES[ours or name])


def fields_of_nemo2(config: Mapping[str, Any], where: str, ignored: Collection[str] = ()) -> Fields:
    """The fields of a context/model.yaml; `ignored` are keys that the user says change nothing. Raises UserError."""
    name = _target(config).rpartition(".")[2]
    family = next((family for family, known in CLASSES.items() if known.model == name), None)
    if family is None:
        known = ", ".join(known.model for known in CLASSES.values())
        raise UserError(f"{where}: NeMo's class {name or '(none)'} is not supported: use one of {known}")
    if config.get("model_transform") is not None:
        raise UserError(f"{where}: it is an adapter (model_transform): merge it into its model with NeMo first")
    values = config.get("config")
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: config is missing")
    NEMO2_MODEL.check(config, where, name)
    NEMO2.check(values, where, name, ignored)
    length, window, spec = (values.get(key) for key in ("seq_length", "window_size", "transformer_layer_spec"))
    length = CLASSES[family].seq_length if length is None else length
    whole = (
        isinstance(window, list) and window and type(window[0]) is int and type(length) is int and window[0] >= length
    )
    if window is not None and not whole:
        raise UserError(f"{where}: window_size={shown(window)} is not supported: only attention to all tokens is")
    if spec is not None and _target(spec).rpartition(".")[2] not in _LAYER_SPECS:
        raise UserError(
            f"{where}: transformer_layer_spec={shown(_target(spec))} is not supported: its layers may be others"
        )
    values = {
        **values,
        **_attention_sizes(values),
        "seq_length": length,
        "activation_func": _target(values.get("activation_func")).rpartition(".")[2],
    }
    return Fields(values, where, family)


def _attention_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that follow from others where a config has none."""
    heads, hidden = (values.get(name) for name in ("num_attention_heads", "hidden_size"))
    follows = hidden // heads if type(heads) is int and type(hidden) is int and heads > 0 else None
    absent = {"num_query_groups": heads, "kv_channels": follows}
    return {name: size for name, size in absent.items() if values.get(name) is None}


# Names of the functions that make NeMo's own layers.
_LAYER_SPECS = (
    "default_layer_spec",
    "transformer_engine_layer_spec",
    "transformer_engine_full_layer_spec",
    "local_layer_spec",
)


def _target(value: Any) -> str:
    target = value.get("_target_") if isinstance(value, Mapping) else None
    return target if isinstance(target, str) else ""


_NEMO1_NORMS = {"rmsnorm": ("RMSNorm", False), "layernorm": ("LayerNorm", False), "layernorm1p": ("LayerNorm", True)}
_NEMO1_ACTIVATIONS = {"fast-swiglu": ("silu", True), "swiglu": ("silu", True), "squared-relu": ("squared_relu", False)}


def fields_of_nemo1(config: Mapping[str, Any], where: str, ignored: Collection[str] = ()) -> Fields:
    """The fields of a .nemo archive's model_config.yaml, with NeMo 1's defaults. Raises UserError.

    `ignored` are keys that the user says change nothing.
    """

    def one_of(name: str, known: Mapping[str, Any], default: str) -> Any:
        value = config.get(name, default)
        if not isinstance(value, str) or value not in known:
            raise UserError(f"{where}: {name}={shown(value)} is not supported: only {', '.join(known)} are")
        return known[value]

    if not truth(config, "mcore_gpt", where):
        raise UserError(
            f"{where}: mcore_gpt is not true: its layers are older than Megatron-core's; convert it with NeMo 1"
        )
    NEMO1.check({"position_embedding_type": "learned_absolute", **config}, where, "a model of NeMo 1", ignored)
    scaled = truth(config, "scale_positional_embedding", where)
    normalization, zero_centered = one_of("normalization", _NEMO1_NORMS, "layernorm")
    activation, gated = one_of("activation", _NEMO1_ACTIVATIONS, "gelu")
    scaling = {_ROPE_SCALING[name]: value for name, value in vars(ROPE_SCALING).items()}
    values = {
        **config,
        **_attention_sizes(config),
        "seq_length": _first(config, "max_position_embeddings", "encoder_seq_length"),
        "rotary_base": config.get("rotary_base", 10000),
        "rotary_percent": config.get("rotary_percentage", 1.0),
        "layernorm_epsilon": config.get("layernorm_epsilon", 1e-5),
        "normalization": normalization,
        "layernorm_zero_centered_gamma": zero_centered,
        "activation_func": activation,
        "gated_linear_unit": gated,
        "add_bias_linear": config.get("bias", True),
        "add_qkv_bias": _first(config, "qkv_bias", "add_qkv_bias"),
        "share_embeddings_and_output_weights": config.get("share_embeddings_and_output_weights", True),
        **(scaling if scaled else {}),
    }
    if truth(values, "add_bias_linear", where):
        raise UserError(f"{where}: bias={shown(config.get('bias'))} is not supported: only layers without are")
    return Fields(values, where)


def _first(config: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of the names that has one."""
    return next((config[name] for name in names if config.get(name) is not None), None)


def shape_from_nemo(fields: Fields, rows: int, dtype: str, vocab_size: int | None) -> ModelShape:
    """The shape of a model by its fields, the rows of its embedding and the dtype of its weights.

    Raises:
        UserError: for what the axis table does not describe. `vocab_size` is the user's, where rows from there on are padding.
    """
    where = fields.where
    if vocab_size is not None and vocab_size > rows:
        raise UserError(f"vocab_size={vocab_size}: the embedding of {where} has {rows} rows: give at most that")
    if dtype not in DTYPES:
        raise UserError(f"{where}: weights of {dtype} are not supported: store them in one of {', '.join(DTYPES)}")
    scaling = None
    if fields.values.get(_ROPE_SCALING["factor"]) is not None:
        scaling = RopeScaling(**{name: fields.number(theirs) for name, theirs in _ROPE_SCALING.items()})
    try:
        return ModelShape(
            family=_family(fields),
            num_layers=fields.size("num_layers"),
            hidden_size=fields.size("hidden_size"),
            ffn_hidden_size=fields.size("ffn_hidden_size"),
            num_attention_heads=fields.size("num_attention_heads"),
            num_query_groups=fields.size("num_query_groups"),
            head_dim=fields.size("kv_channels", "head_dim"),
            vocab_size=rows if vocab_size is None else vocab_size,
            max_position_embeddings=fields.size("seq_length", "max_position_embeddings"),
            rope_theta=number(fields.values, "rotary_base", where),
            norm_eps=fields.number("layernorm_epsilon"),
            tied_embeddings=_tied(fields),
            dtype=dtype,
            rope_scaling=scaling,
            rotary_percent=fields.number("rotary_percent"),
        )
    except UserError as error:
        raise UserError(f"{where}: {error}" if where not in str(error) else str(error)) from None


def _tied(fields: Fields) -> bool:
    """Whether embedding and output are one matrix, which a config must say. Raises UserError."""
    name = "share_embeddings_and_output_weights"
    if fields.values.get(name) is None:
        raise UserError(f"{fields.where}: {name} is missing")
    return truth(fields.values, name, fields.where)


def _family(fields: Fields) -> str:
    """The family that has a config's traits: that of its class, if it is one of them. Raises UserError."""
    values = fields.values
    words = {name: values.get(name) for name in ("activation_func", "normalization")}
    traits = Traits(
        activation=words["activation_func"] if isinstance(words["activation_func"], str) else "",
        gated=truth(values, "gated_linear_unit", fields.where),
        normalization=words["normalization"] if isinstance(words["normalization"], str) else "",
        zero_centered_gain=truth(values, "layernorm_zero_centered_gamma", fields.where),
        qkv_bias=truth(values, "add_qkv_bias", fields.where),
        qk_norm=truth(values, "qk_layernorm", fields.where),
    )
    families = [family for family, known in TRAITS.items() if known == traits]
    if not families:
        raise UserError(f"{fields.where}: no family that is supported has its layers ({traits}): see README.md, Models")
    return fields.family if fields.family in families else families[0]
