"""What is known of the keys of NeMo's configs: one table for NeMo 2's model.yaml, one for NeMo 1's model_config.yaml.

NeMo 2's config is megatron.core's TransformerConfig with every default filled in, and a few fields of GPTModel: by the sources of
nemo-toolkit 2.7 and megatron.core 0.15 to 0.19. NeMo 1's holds the training's options beside the model's.
"""

from collections.abc import Mapping
from typing import Any

from minitron_megatron.models.config_keys import KeyTable

_OFF = (False,)
# What a model must not have: it would compute something else than the axis table describes. None, False and 0 say the same.
ABSENT: Mapping[str, tuple[Any, ...]] = dict.fromkeys(
    """num_moe_experts multi_latent_attention seq_len_interpolation_factor rotary_interleaved mtp_num_layers
    heterogeneous_block_specs apply_residual_connection_post_layernorm apply_query_key_layer_scaling softmax_scale no_rope_freq
    window_attn_skip_freq qk_l2_norm is_hybrid_model glu_linear_offset nope_layer_interval activation_func_clamp_value
    attention_chunk_size experimental_attention_variant linear_attention_freq attention_output_gate use_mup mrope_section
    quant_recipe use_kitchen use_kitchen_attention""".split(),
    _OFF,
)
_ROPE_SCALING = "scale_factor low_freq_factor high_freq_factor old_context_len".split()
_SIZES = "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels".split()
# How a model is built, split over processes, computed faster or trained: the same function.
_HARMLESS = frozenset(
    """fp16_lm_cross_entropy parallel_output make_vocab_size_divisible_by attention_softmax_in_fp32 masked_softmax_fusion
    cross_entropy_loss_fusion cross_entropy_fusion_impl gradient_accumulation_fusion deallocate_pipeline_outputs
    scatter_embedding_sequence_parallel tp_only_amax_red persist_layer_norm memory_efficient_layer_norm bias_activation_fusion
    bias_dropout_fusion bias_dropout_add_fusion apply_rope_fusion fused_single_qkv_rope fused_residual_rmsnorm
    use_fused_weighted_squared_relu use_te_activation_func use_te_rng_tracker use_transformer_engine_op_fuser
    fp32_residual_connection test_mode calculate_per_token_loss disable_bf16_reduced_precision_matmul batch_invariant_mode
    init_method output_layer_init_method init_method_std embedding_init_method embedding_init_method_std use_scaled_init_method
    init_model_with_meta_device perform_initialization use_cpu_initialization params_dtype pipeline_dtype fp16 bf16
    attention_backend flash_attention_version flash_decode cp_comm_type sequence_parallel hybrid_context_parallel
    variable_seq_lengths overlap_p2p_comm batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p overlap_p2p_comm_warmup_flush
    defer_embedding_wgrad_compute wgrad_deferral_limit delay_wgrad_compute microbatch_group_size_per_vp_stage
    num_microbatches_with_partial_activation_checkpoints account_for_embedding_in_pipeline_split
    account_for_loss_in_pipeline_split num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    pipeline_model_parallel_layout pipeline_model_parallel_comm_backend first_last_layers_bf16 num_layers_at_start_in_bf16
    num_layers_at_end_in_bf16 activation_func_fp8_input_store distribute_saved_activations enable_autocast autocast_dtype
    deterministic_mode timers finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func param_sync_func
    barrier_with_L1_time clone_scatter_output_in_embedding disable_parameter_transpose_cache config_logger_dir
    enable_cuda_graph external_cuda_graph symmetric_ar_type nccl_all_reduce_for_prefill use_inference_optimized_layers
    hetereogenous_dist_checkpoint transformer_impl log_max_attention_logit kitchen_attention_backend
    high_priority_a2a_comm_stream max_seqlen_per_dp_cp_rank overlap_moe_expert_parallel_comm offload_modules
    min_offloaded_tensor_size tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards
    ep_overlap_early_attn_memory_release overlap_dispatch_backward_with_experts_wgrad use_mamba_mem_eff_path
    use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert""".split()
)
_SUFFIXES = ("_dropout", "_parallel_size", "_parallel_sizes", "_weight_remat_size")
# Experts, hybrids and the like, without which they say nothing: that there are none is held above.
_PREFIXES = """moe_ fp8 fp4 cuda_graph_ recompute_ cpu_offloading _cpu_offloading tp_comm_ inference_ mamba_ mtp_ mup_ dsa_
    linear_ qk_clip experimental_attention_variant_ mlp_chunks_for_ fine_grained_ delay_offload delta_offload
    activation_offload""".split()

NEMO2 = KeyTable(
    read=frozenset(
        """vocab_size seq_length rotary_base rotary_percent normalization layernorm_zero_centered_gamma layernorm_epsilon
        gated_linear_unit activation_func add_qkv_bias qk_layernorm share_embeddings_and_output_weights window_size
        transformer_layer_spec""".split()
    ).union(_SIZES, _ROPE_SCALING),
    only={**ABSENT, "add_bias_linear": _OFF, "position_embedding_type": ("rope",), "softmax_type": ("vanilla",)},
    harmless=_HARMLESS
    | frozenset(
        """_target_ forward_step_fn data_step_fn generation_config use_transformer_engine_full_layer_spec vocab_file
        gradient_reduce_div_fusion""".split()
    ),
    suffixes=_SUFFIXES,
    prefixes=tuple(_PREFIXES),
)

# Beside the config in a model.yaml.
NEMO2_MODEL = KeyTable(
    read=frozenset(("_target_", "config", "tokenizer", "model_transform")),
    only={},
    harmless=frozenset(("optim", "model_context_managers")),
)

NEMO1 = KeyTable(
    read=frozenset(
        """encoder_seq_length max_position_embeddings rotary_base rotary_percentage layernorm_epsilon normalization activation
        bias qkv_bias add_qkv_bias qk_layernorm share_embeddings_and_output_weights scale_positional_embedding mcore_gpt
        tokenizer""".split()
    ).union(_SIZES),
    only={
        **ABSENT,
        "window_size": (None,),
        "position_embedding_type": ("rope",),
        "headscale": _OFF,
        "openai_gelu": _OFF,
        "transformer_block_type": ("pre_ln",),
        "normalize_attention_scores": (True, None),
        "attention_type": ("multihead", None),
        "megatron_legacy": _OFF,
        "mcore_customization_config": ({},),
        "hyena": ({},),
        "name": ("", "te_gpt", "megatron_gpt_full_te_layer_autocast", "modelopt"),
    },
    harmless=_HARMLESS
    | frozenset(
        """target nemo_version precision seed data optim exp_manager nsys_profile memory_profile peft inference reward_model
        restore_from_path resume_from_checkpoint pre_process post_process micro_batch_size global_batch_size rampup_batch_size
        do_layer_norm_weight_decay native_amp_init_scale native_amp_growth_interval hysteresis megatron_amp_O2
        grad_allreduce_chunk_size_mb grad_div_ar_fusion gradient_as_bucket_view async_grad_allreduce apex_transformer_log_level
        sync_batch_comm use_flash_attention use_emha transformer_engine reduce_amax sharp gc_interval
        nccl_communicator_config_path enable_megatron_timers megatron_timer_kwargs dist_ckpt_format save_sharded_optimizer
        gradient_checkpointing onnx_safe num_micro_batches_with_partial_activation_checkpoints answer_only_loss sync_fsdp_state
        save_nemo_on_validation_end""".split()
    ),
    suffixes=_SUFFIXES,
    prefixes=(*_PREFIXES, "activations_checkpoint_", "dist_ckpt_", "ub_", "fsdp", "context_parallel", "overlap_"),
)
