"""Keys that DeepSpeed knows and this package does not pass on, with the reason."""

from __future__ import annotations

REFUSED: dict[str, str] = {
    "activation_checkpointing": "its home is train.activation_checkpointing of the run configuration",
    "elasticity": "DeepSpeed has removed it; a run resumes on another number of ranks without it",
    "pipeline": "the number of stages is parallel.pipeline_parallel_size of the run configuration; remove it",
    "bfloat16": 'write "bf16"',
    "aio": "only NVMe offload reads it, which is not supported; offload to the cpu",
    "gradient_allreduce_op": "the loss is normalised for averaged gradients; remove it",
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "zero_optimization.compute_grad_norm": "the gradient norm is always computed and reported; remove it",
    "fp16.auto_cast": "there is nothing to cast: the inputs are token ids; remove it",
    "optimizer.params.max_grad_norm": "its home is train.max_grad_norm of the run configuration",
}
REFUSED |= dict.fromkeys(
    ("tensorboard", "wandb", "csv_monitor", "comet"),
    "the run writes its scalars itself: metrics.jsonl and tensorboard/ in the run folder; remove it",
)
REFUSED |= dict.fromkeys(
    ("torch_autocast", "amp", "data_types.param_dtype", "data_types.buffer_dtype", "data_types.keep_in_fp32_modules"),
    'the precision is chosen by "bf16" or "fp16"; remove it',
)
REFUSED |= dict.fromkeys(
    (
        "checkpoint",
        "datastates_ckpt",
        "nebula",
        "zero_optimization.elastic_checkpoint",
        "zero_optimization.load_from_fp32_weights",
        "zero_optimization.pipeline_loading_checkpoint",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "zero_optimization.stage3_gather_fp16_weights_on_model_save",
    ),
    "checkpoints are written and read by this package in a format of its own; remove it",
)
REFUSED |= dict.fromkeys(
    ("data_efficiency", "curriculum_learning", "dataloader_drop_last", "managed_gradient_accumulation"),
    "what goes into a batch is decided by the run configuration; remove it",
)
REFUSED |= dict.fromkeys(
    ("prescale_gradients", "gradient_predivide_factor"),
    "DeepSpeed does not support it together with reduce_scatter; remove it",
)
REFUSED |= dict.fromkeys(
    (
        "bf16.bf16_master_weights_and_grads",
        "bf16.bf16_optimizer_states",
        "fp16.fp16_master_weights_and_grads",
    ),
    "master weights and moments are float32, also in checkpoints; remove it",
)
REFUSED |= {
    f"zero_optimization.{section}.{key}": "it belongs to NVMe or partial offload, which is not supported; remove it"
    for section in ("offload_optimizer", "offload_param")
    for key in (
        *("nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pipeline_read", "pipeline_write", "fast_init"),
        *("ratio", "super_offload", "cpuadam_cores_perc"),
    )
}
REFUSED |= dict.fromkeys(
    (
        *("autotuning", "compile", "compression_training", "disable_python_gc", "eigenvalue"),
        *("expert_parallel", "graph_harvesting", "hybrid_engine", "progressive_layer_drop", "quantize_training"),
        *("seq_parallel_communication_data_type", "sequence_parallel_size", "sparse_attention", "sparse_gradients"),
        *("tensor_parallel", "timers", "use_data_before_expert_parallelism", "vocabulary_size"),
        *("weight_quantization", "disable_allgather", "optimizer.legacy_fusion"),
        *("zero_optimization.cpu_offload_use_pin_memory", "zero_optimization.legacy_stage1"),
        *("zero_optimization.zenflow", "zero_optimization.leaf_module", "zero_optimization.override_module_apply"),
        *("zero_optimization.parameter_alignment", "zero_optimization.save_muon_momentum_buffer_in_memory"),
        *("zero_optimization.stage3_allgather_sequential", "zero_optimization.stage3_use_all_reduce_for_fetch_params"),
        *("zero_optimization.zero_hpz_partition_size", "zero_optimization.zero_quantized_weights"),
        *("zero_optimization.zero_quantized_nontrainable_weights", "zero_optimization.zero_quantized_gradients"),
    ),
    "DeepSpeed knows it, this package does not use it; remove it",
)
