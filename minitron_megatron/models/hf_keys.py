"""What is known of the keys of Hugging Face configs, an architecture a table, which import and export share.

By the sources of transformers 4 and 5 (5.24): what its model classes, masks and rotary embeddings take from a config. Keys of
generation are harmless to the model; their token ids follow a cut of the vocabulary (data/token_ids.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from minitron_megatron.models.config_keys import KeyTable

# Sizes and kinds that every architecture has, read into the shape or checked by rules of their own.
_READ = frozenset(
    """architectures model_type dtype torch_dtype hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim vocab_size max_position_embeddings tie_word_embeddings layer_types rope_theta rope_scaling
    rope_parameters kv_channels partial_rotary_factor rope_percent rope_percentage rotary_percent rotary_pct
    original_max_position_embeddings""".split()
)
# Not a model's: files, programs and versions; what a call gives back; labels of classifiers; dropout, which neither
# measuring nor distilling here has; how fresh weights are drawn; the epsilon under the other kind of norm's name.
_HARMLESS = frozenset(
    """_name_or_path name_or_path transformers_version _commit_hash _attn_implementation _attn_implementation_autoset
    _model_name_or_path
    attn_implementation _attn_implementation_internal _experts_implementation_internal _flash_attn_2_enabled
    use_flash_attention_2 torchscript use_bfloat16 tf_legacy_loss return_dict return_dict_in_generate output_hidden_states
    output_attentions output_scores use_cache chunk_size_feed_forward is_decoder cross_attention_hidden_size
    tie_encoder_decoder finetuning_task id2label label2id num_labels problem_type tokenizer_class prefix task_specific_params
    remove_invalid_values initializer_range pretraining_tp embd_pdrop resid_pdrop gradient_checkpointing use_recompute
    use_sdpa use_flash_attention max_window_layers is_llama_config transformers.js_config model_max_length
    max_sequence_length max_seq_len seq_length tokenizer_model_max_length tokenizer_padding_side vocab_file
    neftune_noise_alpha tie_last_hidden_states norm_eps rms_norm_eps""".split()
)
_HARMLESS_SUFFIXES = ("_token_id", "_token_ids", "_dropout", "_dropout_prob")
_HARMLESS_PREFIXES = ("unsloth_",)
# Options of generation that configs of transformers 4 carry.
_GENERATION = frozenset(
    """max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids force_words_ids num_return_sequences
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens forced_decoder_ids sequence_bias
    renormalize_logits stop_strings guidance_scale""".split()
)
_NOT_A_DECODER_OF_TEXT = "it is no plain decoder of text"
_REASONS = {
    "auto_map": "its layers are code of its own; remove the key where transformers' own class computes the same",
    "transformers_weights": "it names a file of weights of its own; make that model.safetensors, and remove the key",
    "configuration_files": "it names other configs; give the folder with the one config.json that is meant",
    "per_layer_config": "its layers differ from one another",
    "vision_config": _NOT_A_DECODER_OF_TEXT,
    "text_config": _NOT_A_DECODER_OF_TEXT,
}
# What an architecture that is described here cannot have, whatever its config calls itself.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "is_causal": (True,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
    "alibi": (False,),
}


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture.

    `fixed` are keys of it with the values that are computed here, the first of them written to exports; `only` those that
    its transformers class does not read, and others might. `defaults` are what transformers takes for keys that a config
    leaves out, and `no_null` those that no transformers takes as null; `harmless` are keys of it alone. `norm_eps` is the
    key of the norms' epsilon, and `partial_rotary` says whether rotary embeddings may turn a part of each head only. Where
    `whole_heads`, transformers 5 takes no hidden size that is not a multiple of the heads, for no need of the layers.
    """

    architecture: str
    model_type: str
    fixed: Mapping[str, tuple[Any, ...]]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    no_null: frozenset[str] = frozenset()
    norm_eps: str = "rms_norm_eps"
    partial_rotary: bool = False
    whole_heads: bool = False

    @cached_property
    def keys(self) -> KeyTable:
        """Everything that is known of its keys."""
        return KeyTable(
            read=_READ | {self.norm_eps},
            only={**_ONLY, **self.only, **self.fixed},
            harmless=_HARMLESS | _GENERATION | self.harmless,
            suffixes=_HARMLESS_SUFFIXES,
            prefixes=_HARMLESS_PREFIXES,
            reasons=_REASONS,
        )


_SILU, _NO_BIAS = {"hidden_act": ("silu", "swish")}, {"attention_bias": (False,), "mlp_bias": (False,)}
_WHOLE_WINDOW = {"use_sliding_window": (False,)}
# The window of Qwen models is read where use_sliding_window says so.
_ANY_WINDOW = frozenset({"sliding_window"})
_EPS = {"rms_norm_eps": 1e-6}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        "llama",
        {**_SILU, **_NO_BIAS},
        only={"sliding_window": (None,)},
        defaults=_EPS,
        whole_heads=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "mistral",
        {**_SILU, **_NO_BIAS, "sliding_window": (None,)},
        defaults={**_EPS, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "qwen2",
        {**_SILU, **_WHOLE_WINDOW},
        # Its projections of query, key and value have biases, its others none; no key says so.
        only={"attention_bias": (True, None), "qkv_bias": (True, None), "mlp_bias": (False,)},
        defaults={**_EPS, "num_key_value_heads": 32},
        harmless=_ANY_WINDOW,
        no_null=frozenset({"head_dim"}),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen3",
        {**_SILU, **_WHOLE_WINDOW, "attention_bias": (False,)},
        only={"mlp_bias": (False,)},
        defaults={**_EPS, "num_key_value_heads": 32, "head_dim": 128},
        harmless=_ANY_WINDOW,
        no_null=frozenset({"head_dim"}),
    ),
    "nemotron": Family(
        "NemotronForCausalLM",
        "nemotron",
        {"hidden_act": ("relu2",), **_NO_BIAS},
        only={"sliding_window": (None,)},
        defaults={"norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        no_null=frozenset({"num_key_value_heads"}),
        norm_eps="norm_eps",
        partial_rotary=True,
    ),
}
