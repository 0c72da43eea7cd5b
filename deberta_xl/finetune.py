"""Fine-tune a DeBERTa on a task. Started by `deepspeed`, `torchrun`, `srun` (one Python per rank) or plain `python`.

deepspeed deberta_xl/finetune.py --config finetune_sift --deepspeed_config deepspeed_configs/zero1_bf16.json \\
    --task sst2 --data glue/SST-2 --init runs/base run.folder=runs/sst2
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Run as a script, Python searches this file's folder first and would find our `data` and `config` as top-level names.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from deberta_xl.interruption import be_quick_while_importing

    be_quick_while_importing()

from deberta_xl.commands.finetuning import FinetuningInputs, parse_arguments, read_config, read_inputs
from deberta_xl.commands.inputs import print_description
from deberta_xl.commands.training_command import run_command
from deberta_xl.durable import below
from deberta_xl.log import rank_zero
from deberta_xl.stop_request import StopRequest

if TYPE_CHECKING:
    from deberta_xl.model.task_model import TaskModel
    from deberta_xl.training.task_loop import Finetuning


def build_model(inputs: FinetuningInputs, *, is_new: bool) -> TaskModel:
    """The plain model: a fresh head on the encoder of `train.init` where the run `is_new`. Collective."""
    from deberta_xl.checkpoint.agreement import on_rank_zero
    from deberta_xl.checkpoint.initial_encoder import find_init, load_encoder
    from deberta_xl.model.task_model import TaskModel

    train = inputs.config.train
    model = TaskModel(inputs.architecture, inputs.head.head, seed=train.seed)
    if is_new and not train.fresh_weights:
        source = on_rank_zero(lambda: find_init(Path(train.init)))
        load_encoder(model, source, inputs.head.labels)
        rank_zero("weights from %s", source)
    return model


def assemble(inputs: FinetuningInputs, stop: StopRequest) -> Finetuning:
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
    start = start_run(inputs, inputs.fingerprints(), inputs.total_steps)
    print_description(inputs)
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
        fingerprints=inputs.fingerprints(),
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
        assemble=assemble,
        conclude=keep_best_weights,
    )


if __name__ == "__main__":
    main()
