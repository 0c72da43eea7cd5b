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
from typing import TYPE_CHECKING

# Run as a script, Python searches this file's folder first and would find our `data` and `config` as top-level names.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from deberta_xl.interruption import be_quick_while_importing

    be_quick_while_importing()

from deberta_xl.data.tasks import task_names
from deberta_xl.durable import below
from deberta_xl.entry_point import build_parser, parse, run_command
from deberta_xl.errors import counted
from deberta_xl.finetune_config import FinetuneConfig, SiftSection
from deberta_xl.finetune_inputs import SHORT_FORMS, Inputs, read_config, read_inputs
from deberta_xl.log import rank_zero
from deberta_xl.model.parameter_shapes import task_parameter_shapes
from deberta_xl.parallel.memory import estimate_task_memory
from deberta_xl.stop_request import StopRequest

if TYPE_CHECKING:
    from deberta_xl.model.heads import TaskModel
    from deberta_xl.training.task_loop import Finetuning

EXAMPLE = """\
example:
  deepspeed --quiet --num_accelerators 2 deberta_xl/finetune.py --config finetune \\
      --deepspeed_config deepspeed_configs/cpu_debug.json --task sst2 --data glue/SST-2 --init runs/first \\
      run.folder=runs/sst2 train.epochs=3

The same command in the same run folder resumes from its newest whole checkpoint.
Every key of the configuration can be overridden: --help SECTION shows them, and docs/settings.md. docs/finetuning.md
has the rest."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --task, --data and --init are other words for keys of the configuration."""
    description = "Fine-tune a DeBERTa on DeepSpeed, with SiFT or without."
    parser = build_parser(description, EXAMPLE, FinetuneConfig)
    parser.add_argument("--task", help=f"a TOML file, or one of: {', '.join(task_names())}")
    parser.add_argument("--data", help="folder with the task's files")
    parser.add_argument("--init", help="folder of the pretrained (or fine-tuned) model to start from")
    parsed = parse(parser, arguments)
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
        "step: %s (micro-batch %d x %d accumulated x %s)",
        counted(train.global_batch_size, "example"), train.micro_batch_size, train.gradient_accumulation_steps(ranks),
        counted(ranks, "replica"),
    )  # fmt: skip
    held_out = ", ".join(f"{split} {len(of_split.examples):,}" for split, of_split in inputs.held_out.items())
    windows = f" in {counted(len(data), 'window')}" if len(data) != len(data.examples) else ""
    rank_zero(
        "run: %s = %.2f epochs of %s%s; held out: %s",
        counted(inputs.total_steps, "step"), inputs.total_steps * train.global_batch_size / len(data),
        counted(len(data.examples), "example"), windows, held_out,
    )  # fmt: skip
    if inputs.config.sift.weight:
        rank_zero("SiFT: %s", describe_sift(inputs.config.sift))


def describe_sift(sift: SiftSection) -> str:
    """What SiFT does in this run, in words."""
    return f"weight {sift.weight:g}, {sift.variant} variant, {counted(sift.steps, 'step')}, noise {sift.noise:g}"


def look_ahead(inputs: Inputs) -> None:
    """Refuse what the start would refuse for its run folder's sake."""
    from deberta_xl.training.look_ahead import check_run_folder

    check_run_folder(inputs.config.run.folder, lambda: inputs.fingerprints, inputs.total_steps)


def build_model(inputs: Inputs, *, is_new: bool) -> TaskModel:
    """The plain model: a fresh head on the encoder of `train.init` where the run `is_new`. Collective."""
    from deberta_xl.checkpoint.agreement import on_rank_zero
    from deberta_xl.checkpoint.initial_encoder import find_init, load_encoder
    from deberta_xl.model.heads import TaskModel

    train = inputs.config.train
    model = TaskModel(inputs.architecture, inputs.head.head, seed=train.seed)
    if is_new and not train.fresh_weights:
        source = on_rank_zero(lambda: find_init(Path(train.init)))
        load_encoder(model, source, inputs.head.labels)
        rank_zero("weights from %s", source)
    return model


def assemble(inputs: Inputs, stop: StopRequest) -> Finetuning:
    """Process group, run folder, engine: everything the loop works with. Collective."""
    import torch

    from deberta_xl.checkpoint.native_config import native_config
    from deberta_xl.checkpoint.weights import TOKENIZER_NAME
    from deberta_xl.objectives.sift import build_sift
    from deberta_xl.training.safeguard import Safeguard
    from deberta_xl.training.start import start_engine, start_run
    from deberta_xl.training.task_loop import Finetuning
    from deberta_xl.training.task_state import TaskState

    config = inputs.config
    start = start_run(inputs, inputs.fingerprints, inputs.total_steps)
    print_arithmetic(inputs)
    with start.undone_when_refused():
        model = build_model(inputs, is_new=start.newest is None)
        engine, state = start_engine(inputs, start, model, TaskState)
    weights = None if inputs.class_weights is None else torch.from_numpy(inputs.class_weights).to(engine.device)
    return Finetuning(
        config=config,
        launch=inputs.launch,
        groups=start.groups,
        engine=engine,
        train_data=inputs.train_data,
        held_out=inputs.held_out,
        total_steps=inputs.total_steps,
        schedule=inputs.schedule,
        sift=build_sift(config.sift, inputs.head.head.kind),
        class_weights=weights,
        folder=start.folder,
        state=state,
        heartbeat=start.heartbeat,
        ownership=start.ownership,
        safeguard=Safeguard(state, start.newest, start.folder.checkpoints, config.checkpoint.keep),
        stop=stop,
        checkpoint_files={
            "config.json": json.dumps(native_config(inputs.architecture), indent=2).encode(),
            "head.json": inputs.head.to_json(),
            **below(TOKENIZER_NAME, inputs.tokenizer.files()),
        },
        fingerprints=inputs.fingerprints,
    )


def keep_best_weights(run: Finetuning) -> None:
    """Write the best weights alone, without the optimizer's state, into the run folder's `best`. Collective."""
    from deberta_xl.checkpoint.agreement import on_rank_zero
    from deberta_xl.checkpoint.finetuned_folder import replace_best
    from deberta_xl.training.heartbeat import Heartbeat

    # Reading and writing a model takes a while, which the run's own heartbeat has not lived to see.
    heartbeat = Heartbeat(run.folder.heartbeat, run.launch.rank, run.ownership)
    heartbeat.mark(run.state.step, "best weights")
    on_rank_zero(lambda: replace_best(run.folder.path, run.state.best_step))
    heartbeat.mark(run.state.step, "done")
    heartbeat.close()


def main() -> None:
    """The command."""
    run_command(
        parse_arguments(),
        read_config=read_config,
        read_inputs=read_inputs,
        look_ahead=look_ahead,
        print_arithmetic=print_arithmetic,
        assemble=assemble,
        conclude=keep_best_weights,
    )


if __name__ == "__main__":
    main()
