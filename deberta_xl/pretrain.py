"""Pretrain a DeBERTa. Started by `deepspeed`, `torchrun`, `srun` (one Python per rank) or plain `python`.

deepspeed deberta_xl/pretrain.py --config base --deepspeed_config deepspeed_configs/zero1_bf16.json data.train=data/wiki
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

from deberta_xl.commands.inputs import print_description
from deberta_xl.commands.pretraining import PretrainingInputs, parse_arguments, read_config, read_inputs
from deberta_xl.commands.training_command import run_command
from deberta_xl.durable import below
from deberta_xl.log import rank_zero
from deberta_xl.stop_request import StopRequest

if TYPE_CHECKING:
    from deberta_xl.model.masked_lm import MaskedLanguageModel
    from deberta_xl.training.loop import Pretraining


def build_model(inputs: PretrainingInputs, units: range, *, is_new: bool) -> MaskedLanguageModel:
    """The plain model, as much of it as `units` needs: fresh weights, or those of `train.init` where the run `is_new`.

    Collective.
    """
    from deberta_xl.checkpoint.agreement import on_rank_zero
    from deberta_xl.checkpoint.initial_weights import load_initial_weights
    from deberta_xl.checkpoint.named_folder import find_pretrained
    from deberta_xl.parallel.pipeline import build_stage

    train = inputs.config.train
    model = build_stage(inputs.architecture, units, train.seed)
    if train.init and is_new:
        # Found once for all ranks: a run that is still written to has one newest checkpoint.
        source = on_rank_zero(lambda: find_pretrained(train.init))
        load_initial_weights(model, source)
        rank_zero("weights from %s", source)
    return model


def assemble(inputs: PretrainingInputs, stop: StopRequest) -> Pretraining:
    """Process group, run folder, engine: everything the loop works with. Collective."""
    from deberta_xl.checkpoint.native_config import native_config
    from deberta_xl.checkpoint.weights import TOKENIZER_NAME
    from deberta_xl.parallel.pipeline import PipelinedModel
    from deberta_xl.training.loop import Pretraining
    from deberta_xl.training.safeguard import Safeguard
    from deberta_xl.training.start import start_engine, start_run
    from deberta_xl.training.state import TrainState

    config, split, fingerprints = inputs.config, inputs.split, inputs.fingerprints()
    start = start_run(inputs, fingerprints, config.train.steps)
    print_description(inputs)
    stage = (lambda divided: PipelinedModel(divided, split, start.groups)) if split.num_stages > 1 else None
    with start.undone_when_refused():
        model = build_model(inputs, split.units(inputs.grid.stage), is_new=start.newest is None)
        engine, state = start_engine(inputs, start, model, TrainState, stage)
    return Pretraining(
        config=config,
        architecture=inputs.architecture,
        launch=inputs.launch,
        groups=start.groups,
        engine=engine,
        data=inputs.data,
        valid=inputs.valid,
        tokenizer=inputs.tokenizer,
        folder=start.folder,
        state=state,
        heartbeat=start.heartbeat,
        ownership=start.ownership,
        safeguard=Safeguard(state, start.newest, start.folder.checkpoints, config.checkpoint.keep),
        stop=stop,
        checkpoint_files={
            "config.json": json.dumps(native_config(inputs.architecture), indent=2).encode(),
            **below(TOKENIZER_NAME, inputs.tokenizer.files()),
        },
        fingerprints=fingerprints,
    )


def main() -> None:
    """The command."""
    run_command(parse_arguments(), read_config=read_config, read_inputs=read_inputs, assemble=assemble)


if __name__ == "__main__":
    main()
