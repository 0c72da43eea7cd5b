"""Fine-tune a DeBERTa on a task. Started by `deepspeed`, `torchrun`, `srun` (one Python per rank) or plain `python`.

deepspeed deberta_xl/finetune.py --config finetune_sift --deepspeed_config deepspeed_configs/zero1_bf16.json \\
    --task sst2 --data glue/SST-2 --init runs/base run.folder=runs/sst2
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run as a script, Python searches this file's folder first and would find our `data` and `config` as top-level names.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from deberta_xl.config_file import preset_names
from deberta_xl.data.task_labels import class_weights
from deberta_xl.data.tasks import task_names
from deberta_xl.entry_point import run_command
from deberta_xl.finetune_config import FinetuneConfig
from deberta_xl.finetune_inputs import SHORT_FORMS, Inputs, read_inputs
from deberta_xl.log import log_to_file, rank_zero
from deberta_xl.model.parameter_shapes import task_parameter_shapes
from deberta_xl.parallel.memory import estimate_task_memory
from deberta_xl.stop_request import StopRequest

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from deberta_xl.model.heads import TaskModel
    from deberta_xl.parallel.groups import Groups
    from deberta_xl.training.task_loop import Finetuning
    from deberta_xl.training.task_state import TaskState

EXAMPLE = """\
example:
  deepspeed --num_accelerators 2 deberta_xl/finetune.py --config finetune \\
      --deepspeed_config deepspeed_configs/cpu_debug.json --task sst2 --data glue/SST-2 --init runs/first \\
      run.folder=runs/sst2 train.epochs=3

The same command in the same run folder resumes from its newest whole checkpoint.
Every key of the presets and of deberta_xl/finetune_config.py can be overridden. docs/finetuning.md has the rest."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --task, --data and --init are other words for keys of the configuration."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a DeBERTa on DeepSpeed, with SiFT or without.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(preset_names(FinetuneConfig))
    parser.add_argument("--config", required=True, help=f"preset ({names}) or path of a TOML file")
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed JSON: ZeRO stage, precision, offload")
    parser.add_argument("--task", help=f"a TOML file, or one of: {', '.join(task_names())}")
    parser.add_argument("--data", help="folder with the task's files")
    parser.add_argument("--init", help="folder of the pretrained (or fine-tuned) model to start from")
    parser.add_argument(
        "--check", action="store_true", help="check everything that can be without an engine, then exit"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides, e.g. train.epochs=5")
    parsed = parser.parse_intermixed_args(arguments)  # overrides may stand before, between and after options
    given = {key: getattr(parsed, short) for short, key in SHORT_FORMS.items() if getattr(parsed, short) is not None}
    parsed.overrides += [f"{key}={value}" for key, value in given.items()]
    return parsed


def print_arithmetic(inputs: Inputs) -> None:
    """What the run is going to be, on rank 0."""
    train, ranks = inputs.config.train, inputs.grid.data_parallel_size
    data = inputs.train_data
    num_parameters = sum(map(math.prod, task_parameter_shapes(inputs.architecture, inputs.head.head).values()))
    rank_zero("model: %s parameters, head: %s", f"{num_parameters:,}", inputs.head.head.kind)
    zero = f"ZeRO-{inputs.engine.zero_stage} in {inputs.engine.precision}"
    sliced = ", sequence divided" if inputs.config.parallel.sequence_parallel else ""
    rank_zero("ranks: %s%s, %s", inputs.grid.describe(), sliced, zero)
    num_options = len(data.features[0].rows)
    needed = estimate_task_memory(
        inputs.architecture, inputs.head.head, inputs.config, inputs.engine, inputs.grid, num_options
    )
    rank_zero("each rank: %s estimated", needed.describe())
    rank_zero(
        "step: %d examples (micro-batch %d x %d accumulated x %d replicas)",
        train.global_batch_size, train.micro_batch_size, train.gradient_accumulation_steps(ranks), ranks,
    )  # fmt: skip
    held_out = ", ".join(f"{split} {len(of_split.examples):,}" for split, of_split in inputs.held_out.items())
    rank_zero(
        "run: %d steps = %.2f epochs of %s examples%s; held out: %s",
        inputs.total_steps, inputs.total_steps * train.global_batch_size / len(data), f"{len(data.examples):,}",
        f" in {len(data):,} windows" if len(data) != len(data.examples) else "", held_out,
    )  # fmt: skip
    if inputs.config.sift.weight:
        rank_zero("SiFT: weight %g, %s", inputs.config.sift.weight, inputs.config.sift.resolved())


def facts_of(inputs: Inputs) -> dict[str, Any]:
    """What environment.json tells of this start."""
    return {
        "command": sys.argv,
        "world_size": inputs.launch.world_size,
        "zero_stage": inputs.engine.zero_stage,
        "precision": inputs.engine.precision,
    }


def build_model(inputs: Inputs, *, is_new: bool) -> TaskModel:
    """The plain model: a fresh head on the encoder of `train.init` where the run `is_new`. Collective."""
    from deberta_xl.checkpoint.agreement import on_rank_zero
    from deberta_xl.finetuned import find_init, load_encoder
    from deberta_xl.model.heads import TaskModel

    train = inputs.config.train
    model = TaskModel(inputs.architecture, inputs.head.head, seed=train.seed)
    if is_new and not train.fresh_weights:
        source = on_rank_zero(lambda: find_init(Path(train.init)))
        load_encoder(model, source)
        rank_zero("weights from %s", source)
    if train.activation_checkpointing:
        model.checkpoint_activations()
    return model


def start_engine(inputs: Inputs, groups: Groups, newest: Path | None) -> tuple[DeepSpeedEngine, TaskState]:
    """The engine over the model, divided as `groups` says, continued from `newest` if there is one. Collective."""
    from deberta_xl.checkpoint.fragments import canonical_parameters, set_master_weights
    from deberta_xl.checkpoint.store import load_checkpoint
    from deberta_xl.parallel.plan import divide
    from deberta_xl.training.engine import build_engine
    from deberta_xl.training.task_state import TaskState

    print_arithmetic(inputs)
    model = build_model(inputs, is_new=newest is None)
    divide(model, groups, sequence_parallel=inputs.config.parallel.sequence_parallel)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()} if newest is None else {}
    settings = inputs.engine.engine_dict(inputs.grid.data_parallel_size, inputs.config)
    engine = build_engine(model, inputs.config.optimizer, settings, groups)
    if newest is None:
        set_master_weights(engine, canonical_parameters(engine), weights)
        return engine, TaskState()
    tensor_parallel = (inputs.grid.tensor_parallel_size, inputs.grid.tensor_parallel_rank)
    saved = load_checkpoint(engine, newest, tensor_parallel=tensor_parallel)
    state = TaskState(**{key: value for key, value in saved.items() if key != "fingerprints"})
    rank_zero("resumed from %s: step %d", newest, state.step)
    return engine, state


def assemble(inputs: Inputs, stop: StopRequest) -> Finetuning:
    """Process group, run folder, engine: everything the loop works with. Collective."""
    import torch

    from deberta_xl.checkpoint.native_config import native_config
    from deberta_xl.parallel.groups import build_groups
    from deberta_xl.training.engine import check_precision, start_engine_runtime
    from deberta_xl.training.heartbeat import Heartbeat
    from deberta_xl.training.run_folder import RunFolder
    from deberta_xl.training.sift import build_sift
    from deberta_xl.training.take_over import take_over
    from deberta_xl.training.task_loop import Finetuning

    config, launch, data = inputs.config, inputs.launch, inputs.train_data
    start_engine_runtime(launch, deterministic=config.train.deterministic)
    check_precision(inputs.engine.precision)
    folder = RunFolder(config.run.folder)
    newest, ownership = take_over(
        folder,
        config,
        inputs.tokenizer_folder,
        fingerprints=inputs.fingerprints,
        last_step=inputs.total_steps,
        facts=facts_of(inputs),
    )
    log_to_file(folder.log / f"rank-{launch.rank:05d}.log")
    torch.manual_seed(config.train.seed)
    groups = build_groups(inputs.grid)
    engine, state = start_engine(inputs, groups, newest)
    weights = None
    if config.train.class_weights == "balanced":
        found = class_weights(data.task, inputs.head.head.num_labels, data.examples)
        weights = torch.from_numpy(found).to(engine.device)
    return Finetuning(
        config=config,
        launch=launch,
        groups=groups,
        engine=engine,
        train_data=data,
        held_out=inputs.held_out,
        total_steps=inputs.total_steps,
        schedule=inputs.schedule,
        sift=build_sift(config.sift, inputs.head.head.kind),
        class_weights=weights,
        folder=folder,
        state=state,
        heartbeat=Heartbeat(folder.heartbeat, launch.rank, ownership),
        ownership=ownership,
        stop=stop,
        checkpoint_files={
            "config.json": json.dumps(native_config(inputs.architecture), indent=2).encode(),
            "head.json": inputs.head.to_json(),
            "tokenizer": inputs.tokenizer_folder,
        },
        fingerprints=inputs.fingerprints,
    )


def keep_best_weights(run: Finetuning) -> None:
    """Write the best weights alone, without the optimizer's state, into the run folder's `best`. Collective."""
    from deberta_xl.checkpoint.agreement import on_rank_zero
    from deberta_xl.finetuned import replace_best

    on_rank_zero(lambda: replace_best(run.folder.path, run.state.best_step))


def main() -> None:
    """The command."""
    run_command(
        parse_arguments(),
        read_inputs=read_inputs,
        print_arithmetic=print_arithmetic,
        assemble=assemble,
        conclude=keep_best_weights,
    )


if __name__ == "__main__":
    main()
