"""The DeepSpeed JSON: what is refused and in which words, what is accepted, and that DeepSpeed takes it."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from deberta_xl.base.errors import ConfigError
from deberta_xl.settings.deepspeed_config import SHIPPED_CONFIGS, load_deepspeed_config
from deberta_xl.settings.deepspeed_refused import REFUSED
from deberta_xl.settings.deepspeed_schema import (
    BFloat16,
    CommsLogger,
    EngineSettings,
    Float16,
    Offload,
    ZeroOptimization,
)
from deberta_xl.settings.presets import load_run_config
from deberta_xl.settings.pretraining import RunConfig

SHIPPED = sorted(path.stem for path in SHIPPED_CONFIGS.glob("*.json"))
MINIMAL = {"zero_optimization": {"stage": 1}}


def run_config(*overrides: str) -> RunConfig:
    """The debug preset: 32 = 16 x 2 sequences, rate 1e-3, 300 steps, 30 of warm-up."""
    return load_run_config("debug", overrides)


def write(folder: Path, content: dict | str | bytes) -> Path:
    """`content` as engine.json in `folder`."""
    path = folder / "engine.json"
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zero(**keys: object) -> dict:
    """A JSON with these keys in its zero_optimization."""
    return {"zero_optimization": {"stage": 1} | keys}


def top(**keys: object) -> dict:
    """A JSON with these keys at its top level."""
    return MINIMAL | keys


BAD_FILES = {
    # Not JSON.
    "empty": ("", ["empty", '{"zero_optimization"']),
    "trailing comma": ('{\n "zero_optimization": {"stage": 1},\n}', ["line 3, column 1", "comma"]),
    "trailing comma in a list": ('{"a": [1,]}', ["line 1, column 10", "comma"]),
    "line comment": ('{\n "zero_optimization": {"stage": 1} // plain\n}', ["line 2", "no comments"]),
    "hash comment": ('{\n# plain\n"zero_optimization": {"stage": 1}}', ["line 2, column 1", "no comments"]),
    "block comment": ('{/* plain */ "zero_optimization": {"stage": 1}}', ["line 1, column 2", "no comments"]),
    "unclosed": ('{"zero_optimization": {"stage": 1}', ["line 1, column 35", "not valid JSON"]),
    "python words": ("{'zero_optimization': True}", ["line 1, column 2", "double quotes"]),
    "a list": ("[1, 2]", ["no JSON object", "list"]),
    "not UTF-8": (b'{"zero_optimization\xff": 1}', ["UTF-8"]),
    "NaN": ('{"zero_optimization": {"stage": 1}, "gradient_clipping": NaN}', ["NaN is not a number"]),
    "infinity": (
        '{"zero_optimization": {"stage": 1}, "gradient_clipping": 1e999}',
        ["=Infinity", "finite"],
    ),
    "duplicate section": (
        '{"zero_optimization": {"stage": 1},\n\n"zero_optimization": {"stage": 2}}',
        ["'zero_optimization' is written twice", "lines 1, 3"],
    ),
    "duplicate key": ('{"zero_optimization": {"stage": 1,\n "stage": 2}}', ["'stage' is written twice", "lines 1, 2"]),
    # Unknown keys, at every level.
    "nothing": ({}, ["zero_optimization is missing", '"stage": 1']),
    "British section": ({"zero_optimisation": {"stage": 2}}, ["zero_optimisation", "mean 'zero_optimization'?"]),
    "mistyped clipping": (top(gradient_cliping=1.0), ["gradient_cliping", "mean 'gradient_clipping'?"]),
    "stage at the top": (top(stage=2), ["unknown key stage", "stage belongs to zero_optimization"]),
    "clipping in a section": (zero(gradient_clipping=1.0), ["zero_optimization.gradient_clipping", "top level"]),
    "mistyped zero key": (zero(overlap_com=True), ["zero_optimization.overlap_com", "mean 'overlap_comm'?"]),
    "unprefixed stage-3 key": (zero(prefetch_bucket_size=1), ["mean 'stage3_prefetch_bucket_size'?"]),
    "mistyped offload key": (
        zero(offload_optimizer={"device": "cpu", "pin_memmory": True}),
        ["zero_optimization.offload_optimizer.pin_memmory", "mean 'pin_memory'?"],
    ),
    "mistyped bf16 key": (top(bf16={"enable": True}), ["bf16.enable", "mean 'enabled'?"]),
    "mistyped fp16 key": (top(fp16={"enabled": True, "loss_scale_windows": 5}), ["fp16.loss_scale_windows"]),
    "mistyped data type key": (top(data_types={"grad_accum": "fp32"}), ["mean 'grad_accum_dtype'?"]),
    "mistyped comms key": (top(comms_logger={"enabeld": True}), ["comms_logger.enabeld", "mean 'enabled'?"]),
    "mistyped profiler key": (top(flops_profiler={"step": 3}), ["flops_profiler.step", "profile_step"]),
    "mistyped optimizer key": (top(optimizer={"type": "AdamW", "param": {}}), ["optimizer.param", "mean 'params'?"]),
    "mistyped rate": (
        top(optimizer={"type": "AdamW", "params": {"learning_rate": 1e-3}}),
        ["optimizer.params.learning_rate", "known: lr, betas"],
    ),
    "mistyped warm-up": (
        top(scheduler={"type": "WarmupLR", "params": {"warmup_steps": 3}}),
        ["scheduler.params.warmup_steps", "mean 'warmup_num_steps'?"],
    ),
    # Types and ranges.
    "no stage": ({"zero_optimization": {}}, ["zero_optimization.stage is missing"]),
    "text stage": (zero(stage="2"), ['zero_optimization.stage="2"', "integer"]),
    "boolean stage": (zero(stage=True), ["zero_optimization.stage=true", "integer"]),
    "fractional stage": (zero(stage=2.0), ["zero_optimization.stage=2.0", "integer"]),
    "stage seven": (zero(stage=7), ["zero_optimization.stage=7", "choose 1, 2 or 3"]),
    "boolean section": ({"zero_optimization": True}, ["zero_optimization=true must be an object"]),
    "boolean bf16": (top(bf16=True), ["bf16=true must be an object"]),
    "null bf16": (top(bf16=None), ["bf16=null must be an object"]),
    "yes": (top(bf16={"enabled": "yes"}), ['bf16.enabled="yes"', "boolean"]),
    "one": (top(bf16={"enabled": 1}), ["bf16.enabled=1", "boolean"]),
    "auto precision": (top(bf16={"enabled": "auto"}), ['bf16.enabled="auto"', "boolean"]),
    "auto bucket": (zero(reduce_bucket_size="auto"), ['reduce_bucket_size="auto"', "integer"]),
    "negative bucket": (zero(reduce_bucket_size=-5), ["reduce_bucket_size=-5", "greater than or equal to 0"]),
    "empty bucket": (zero(reduce_bucket_size=0), ["reduce_bucket_size=0", "greater than 0"]),
    "fractional bucket": (zero(reduce_bucket_size=0.5), ["reduce_bucket_size=0.5", "integer"]),
    "text batch": (top(train_batch_size="32"), ['train_batch_size="32"', "integer"]),
    "text clipping": (top(gradient_clipping="a"), ['gradient_clipping="a"', "number"]),
    "negative loss scale": (top(fp16={"enabled": True, "loss_scale": -1}), ["fp16.loss_scale=-1"]),
    "window of nothing": (top(fp16={"enabled": True, "loss_scale_window": 0}), ["fp16.loss_scale_window=0"]),
    "unknown data type": (top(data_types={"grad_accum_dtype": "float32"}), ["'fp32', 'bf16' or 'fp16'"]),
    "unknown device": (
        zero(offload_optimizer={"device": "gpu"}),
        ['offload_optimizer.device="gpu"', "'cpu' or 'none'"],
    ),
    "NVMe": (zero(offload_optimizer={"device": "nvme"}), ['offload_optimizer.device="nvme"', "'cpu' or 'none'"]),
    "unknown optimizer": (top(optimizer={"type": "Lamb"}), ['optimizer.type="Lamb"', "'AdamW' or 'Adam'"]),
    "unknown scheduler": (top(scheduler={"type": "OneCycle"}), ['scheduler.type="OneCycle"', "WarmupCosineLR"]),
    "silent optimizer": (top(zero_force_ds_cpu_optimizer=True), ["zero_force_ds_cpu_optimizer=true"]),
    "zero steps per print": (top(steps_per_print=0), ["steps_per_print=0"]),
    # Contradictions inside the file.
    "two precisions": (
        top(bf16={"enabled": True}, fp16={"enabled": True}),
        ["bf16.enabled and fp16.enabled", "choose"],
    ),
    "bf16 sums of fp32": (top(data_types={"grad_accum_dtype": "bf16"}), ["grad_accum_dtype='bf16'", "fp32"]),
    "fp16 sums of bf16": (top(bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp16"}), ["bf16 or fp32"]),
    "fp16 on the wire": (
        top(bf16={"enabled": True}, communication_data_type="fp16"),
        ["would overflow", "fp32 or bf16"],
    ),
    "stage-3 key in stage 2": (zero(stage=2, stage3_max_live_parameters=5), ["read by stage 3 only", "stage=2"]),
    "offloaded parameters in stage 2": (
        zero(stage=2, offload_param={"device": "cpu"}),
        ["offload_param", "stage 3 only"],
    ),
    # Refused with a reason.
    "stage 0": (zero(stage=0), ["stage 0 is refused", "dummy Adam step", "use stage 1"]),
    "round robin": (zero(round_robin_gradients=True), ["round_robin_gradients=true", "address map"]),
    "activation checkpointing": (top(activation_checkpointing={}), ["train.activation_checkpointing"]),
    "tensorboard": (top(tensorboard={"enabled": True}), ["tensorboard is not accepted", "metrics.jsonl"]),
    "wandb": (top(wandb={"enabled": False}), ["wandb is not accepted", "metrics.jsonl"]),
    "csv": (top(csv_monitor={}), ["csv_monitor is not accepted", "metrics.jsonl"]),
    "elasticity": (top(elasticity={"enabled": True}), ["elasticity", "removed"]),
    "pipeline": (top(pipeline={"stages": 2}), ["pipeline is not accepted"]),
    "old bf16": (top(bfloat16={"enabled": True}), ["bfloat16", '"bf16"']),
    "autocast": (top(torch_autocast={"enabled": True}), ["torch_autocast", '"bf16" or "fp16"']),
    "universal": (top(checkpoint={"load_universal": True}), ["checkpoint is not accepted", "format of its own"]),
    "old offload": (zero(cpu_offload=True), ["zero_optimization.cpu_offload", '"offload_optimizer"']),
    "NVMe path": (zero(offload_optimizer={"nvme_path": "/x"}), ["offload_optimizer.nvme_path", "NVMe"]),
    "bf16 master weights": (
        top(bf16={"bf16_master_weights_and_grads": True}),
        ["master weights and moments are float32"],
    ),
    "summed gradients": (top(gradient_allreduce_op="sum"), ["gradient_allreduce_op", "averaged"]),
    "quantised weights": (zero(stage=3, zero_quantized_weights=True), ["zero_quantized_weights", "does not use it"]),
    # Contradictions with the run configuration: both values, both places.
    "batch": (top(train_batch_size=64), ["train_batch_size=64", "train.global_batch_size=32"]),
    "micro batch": (top(train_micro_batch_size_per_gpu=4), ["per_gpu=4", "train.micro_batch_size=16"]),
    "clipping": (top(gradient_clipping=0.5), ["gradient_clipping=0.5", "train.max_grad_norm=1.0"]),
    "rate": (
        top(optimizer={"type": "AdamW", "params": {"lr": 2e-4}}),
        ["optimizer.params.lr=0.0002", "optimizer.learning_rate=0.001", '"auto"'],
    ),
    "betas": (top(optimizer={"type": "AdamW", "params": {"betas": [0.9, 0.98]}}), ["[0.9, 0.98]", "beta2=0.999"]),
    "one beta": (top(optimizer={"type": "AdamW", "params": {"betas": [0.9]}}), ["betas=[0.9]", "beta2=0.999"]),
    "epsilon": (top(optimizer={"type": "Adam", "params": {"eps": 1e-8}}), ["eps=1e-08", "optimizer.epsilon=1e-06"]),
    "decay": (top(optimizer={"type": "Adam", "params": {"weight_decay": 0}}), ["optimizer.weight_decay=0.01"]),
    "schedule": (top(scheduler={"type": "WarmupLR"}), ['type="WarmupLR"', "schedule.decay='linear' (WarmupDecayLR)"]),
    "warm-up": (
        top(scheduler={"type": "WarmupDecayLR", "params": {"warmup_num_steps": 5}}),
        ["warmup_num_steps=5", "schedule.warmup_steps=30"],
    ),
    "length": (top(scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": 5}}), ["train.steps=300"]),
    "logarithmic warm-up": (
        top(scheduler={"type": "WarmupDecayLR", "params": {"warmup_type": "log"}}),
        ['warmup_type="log"', "linear"],
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_in_words_that_help(case, tmp_path):
    content, words = BAD_FILES[case]
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        load_deepspeed_config(path, run_config())
    message = str(caught.value)
    assert str(path) in message
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message


def test_a_missing_file_is_answered_with_those_that_are_shipped(tmp_path):
    with pytest.raises(ConfigError, match=r"zero4\.json: no such file; .*cpu_debug\.json.*zero3_offload\.json"):
        load_deepspeed_config(tmp_path / "zero4.json", run_config())
    with pytest.raises(ConfigError, match="no such file"):
        load_deepspeed_config(tmp_path, run_config())


GOOD_FILES = {
    "the smallest": MINIMAL,
    "sizes in scientific notation": zero(reduce_bucket_size=5e8, allgather_bucket_size=2e8),
    "round robin said off": zero(round_robin_gradients=False),
    "precision switched off": top(bf16={"enabled": False}, fp16={"enabled": False}),
    "everything auto": top(
        train_batch_size="auto",
        train_micro_batch_size_per_gpu="auto",
        gradient_accumulation_steps="auto",
        gradient_clipping="auto",
        optimizer={"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}},
    ),
    "everything in agreement": top(
        train_batch_size=32,
        train_micro_batch_size_per_gpu=16,
        gradient_clipping=1,
        optimizer={"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.01}},
        scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": 300, "warmup_max_lr": 0.001}},
    ),
    "offload said off": zero(offload_optimizer={"device": "none"}, offload_param=None, stage=3),
    "observation": top(
        comms_logger={"enabled": True, "prof_ops": ["all_reduce"]},
        flops_profiler={"enabled": False, "profile_step": 5},
        wall_clock_breakdown=True,
        steps_per_print=10,
        log_level="warning",
    ),
}


@pytest.mark.parametrize("case", GOOD_FILES)
def test_a_good_file_is_accepted(case, tmp_path):
    config = load_deepspeed_config(write(tmp_path, GOOD_FILES[case]), run_config())
    assert config.zero_stage == GOOD_FILES[case]["zero_optimization"]["stage"]
    assert config.precision == "fp32"


def test_the_engine_gets_the_facts_of_the_run_and_no_optimizer(tmp_path):
    content = GOOD_FILES["everything auto"] | {"bf16": {"enabled": True}, "comms_logger": {"enabled": True}}
    run = run_config("train.global_batch_size=96", "train.micro_batch_size=8", "train.max_grad_norm=0.25")
    given = load_deepspeed_config(write(tmp_path, content), run).engine_dict(4, run)
    batch = (given["train_batch_size"], given["train_micro_batch_size_per_gpu"], given["gradient_accumulation_steps"])
    assert batch == (96, 8, 3)
    assert given["gradient_clipping"] == 0.25
    assert given["zero_optimization"] == {"stage": 1}
    assert given["bf16"] == {"enabled": True}
    assert given["comms_logger"] == {"enabled": True}
    assert given["zero_allow_untested_optimizer"] is True
    assert given["zero_force_ds_cpu_optimizer"] is False
    assert given["steps_per_print"] > 1_000_000_000
    assert not {"optimizer", "scheduler"} & set(given)
    assert "auto" not in json.dumps(given)


def test_a_stated_accumulation_is_checked_against_the_ranks(tmp_path):
    run = run_config()
    config = load_deepspeed_config(write(tmp_path, top(gradient_accumulation_steps=2)), run)
    assert config.engine_dict(1, run)["gradient_accumulation_steps"] == 2
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps=2 .*x 2 data-parallel ranks\) = 1"):
        config.agree(2, run)
    with pytest.raises(ConfigError, match=r"nearest: train\.global_batch_size=48"):
        config.engine_dict(3, run)


def test_a_file_that_agreed_is_checked_again_with_the_run_that_trains(tmp_path):
    config = load_deepspeed_config(write(tmp_path, top(train_batch_size=32)), run_config())
    with pytest.raises(ConfigError, match=r"train_batch_size=32 .*train\.global_batch_size=64"):
        config.engine_dict(1, run_config("train.global_batch_size=64"))


@pytest.mark.parametrize(
    ("name", "stage", "precision"),
    [
        ("zero1_bf16", 1, "bf16"),
        ("zero2_bf16", 2, "bf16"),
        ("zero3_bf16", 3, "bf16"),
        ("zero3_offload", 3, "bf16"),
        ("zero3_fp32", 3, "fp32"),
        ("fp16", 2, "fp16"),
        ("cpu_debug", 1, "fp32"),
    ],
)
def test_a_shipped_file_is_what_its_name_says(name, stage, precision):
    config = load_deepspeed_config(SHIPPED_CONFIGS / f"{name}.json", run_config())
    assert (config.zero_stage, config.precision) == (stage, precision)


def test_the_readme_of_the_shipped_files_has_a_row_for_each():
    readme = (SHIPPED_CONFIGS / "README.md").read_text()
    assert [name for name in SHIPPED if f"| `{name}.json` |" not in readme] == []


def test_neither_torch_nor_deepspeed_is_imported_for_it():
    program = (
        "import sys\n"
        "import deberta_xl.settings.deepspeed_config, deberta_xl.base.log\n"
        "print(*sorted({'torch', 'deepspeed', 'numpy', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# With DeepSpeed itself.


def test_every_key_of_deepspeeds_own_models_is_accepted_or_refused_with_a_reason():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models = {
        "zero_optimization": (DeepSpeedZeroConfig, ZeroOptimization),
        "zero_optimization.offload_optimizer": (DeepSpeedZeroOffloadOptimizerConfig, Offload),
        "zero_optimization.offload_param": (DeepSpeedZeroOffloadParamConfig, Offload),
        "bf16": (DeepSpeedBF16Config, BFloat16),
        "fp16": (DeepSpeedFP16Config, Float16),
        "comms_logger": (CommsLoggerConfig, CommsLogger),
    }
    for section, (theirs, ours) in models.items():
        fields = {field.alias or name: field for name, field in theirs.model_fields.items()}
        unmentioned = [key for key in fields if key not in ours.model_fields and f"{section}.{key}" not in REFUSED]
        assert unmentioned == [], section
        assert sorted(set(ours.model_fields) - set(fields)) == [], f"{section}: unknown to DeepSpeed"
        defaults = {key: field.default for key, field in ours.model_fields.items() if not field.is_required()}
        assert {k: v for k, v in defaults.items() if v != fields[k].default and v is not None and k != "prof_ops"} == {}


def test_no_key_is_both_accepted_and_refused():
    accepted = set(EngineSettings.model_fields)
    for section in ("zero_optimization", "bf16", "fp16", "data_types", "optimizer"):
        model = EngineSettings.model_fields[section].annotation
        accepted |= {f"{section}.{key}" for key in getattr(model, "model_fields", {})}
    assert sorted(accepted & set(REFUSED)) == []


def sums_over_ranks(paths: dict[str, str]) -> dict[str, tuple[str, float]]:
    """For each file: the type in which its engine says it sums gradients over the two ranks, and a sum that it made.

    Each element's gradient is 256 on one rank and 1 on the other, so the mean is 128.5; in bfloat16 257 is 256.
    """
    import torch
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from deberta_xl.training.engine import build_engine

    CPU_Accelerator.is_fp16_supported = lambda self: True
    run = run_config("train.global_batch_size=2", "train.micro_batch_size=1")
    found = {}
    for name, path in paths.items():
        settings = load_deepspeed_config(path, run).engine_dict(2, run)
        if "fp16" in settings:
            settings["fp16"]["initial_scale_power"] = 0  # its first step is not to be skipped
        engine = build_engine(torch.nn.Linear(4, 4, bias=False), run.optimizer, settings)
        gradient = 256.0 if torch.distributed.get_rank() == 0 else 1.0
        engine.backward(engine(torch.full((1, 4), gradient, dtype=engine.get_data_types()[0])).float().sum())
        engine.step()
        found[name] = str(engine.communication_data_type), engine.get_global_grad_norm() / 4
    return found


def test_gradients_are_summed_over_ranks_in_float32_with_every_shipped_file_and_without_the_key(tmp_path):
    from ranks import run_ranks

    paths = {name: str(SHIPPED_CONFIGS / f"{name}.json") for name in SHIPPED}
    paths["a file of one's own"] = str(write(tmp_path, top(bf16={"enabled": True})))
    found, _ = run_ranks(sums_over_ranks, 2, paths)
    sums_in_float32 = {name: kind for name, (kind, _) in found.items()}
    assert sums_in_float32 == dict.fromkeys(paths, "torch.float32")
    # The file of one's own adds up micro-batches in bfloat16, so it rounds the sum, once, afterwards.
    assert {name: mean for name, (_, mean) in found.items() if name in SHIPPED} == pytest.approx(
        dict.fromkeys(SHIPPED, 128.5), rel=1e-6
    )


def test_a_sum_over_ranks_in_less_than_float32_is_taken_with_a_warning(tmp_path, caplog):
    content = top(bf16={"enabled": True}, communication_data_type="bf16")
    config = load_deepspeed_config(write(tmp_path, content), run_config())
    assert config.engine_dict(1, run_config())["communication_data_type"] == "bf16"
    assert "communication_data_type='bf16': gradients are summed over ranks in that precision" in caplog.text


def take_steps(path: str, extensions: str) -> dict:
    """Three steps of a real engine on this rank with the file at `path`; what came of them."""
    import os

    import deepspeed
    import torch
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    CPU_Accelerator.is_fp16_supported = lambda self: True  # a CPU says no; only this test believes otherwise
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    run = run_config("train.global_batch_size=4", "train.micro_batch_size=2")
    config = load_deepspeed_config(path, run)
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config.engine_dict(1, run))
    losses, inputs = [], torch.randn(2, 6).to(next(model.parameters()).dtype)
    for _ in range(12):  # micro-batches, two to a step; fp16 skips the first steps while it finds its loss scale
        loss = (engine(inputs) - inputs).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return {
        "losses": losses,
        "steps": engine.global_steps,
        "stage": int(engine.zero_optimization_stage()),
        "dtype": str(next(model.parameters()).dtype),
        "grad_norm": float(engine.get_global_grad_norm()),
        "clip": float(engine.gradient_clipping()),
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_trains_with_a_shipped_file_and_compiles_nothing(name, tmp_path):
    from ranks import run_ranks

    extensions = tmp_path / "extensions"
    (result,) = run_ranks(take_steps, 1, str(SHIPPED_CONFIGS / f"{name}.json"), str(extensions))
    config = load_deepspeed_config(SHIPPED_CONFIGS / f"{name}.json", run_config())
    assert result["losses"][-1] < result["losses"][0]
    assert result["steps"] == 6
    assert result["stage"] == config.zero_stage
    dtypes = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}
    assert result["dtype"] == dtypes[config.precision]
    assert result["clip"] == 1.0
    assert 0 < result["grad_norm"] < float("inf")
    assert not extensions.exists() or not any(extensions.rglob("*.so"))
