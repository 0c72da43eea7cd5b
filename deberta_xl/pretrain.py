"""Pretrain a DeBERTa. Started by `deepspeed`, `torchrun`, `srun` (one Python per rank) or plain `python`.

deepspeed deberta_xl/pretrain.py --config base --deepspeed_config deepspeed_configs/zero1_bf16.json data.train=data/wiki
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# Run as a script, Python searches this file's folder first and would find our `data` and `config` as top-level names.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from deberta_xl.interruption import be_quick_while_importing

    be_quick_while_importing()

from deberta_xl.architecture import DebertaConfig
from deberta_xl.checkpoint.manifest import step_folders
from deberta_xl.config import ModelSection, RunConfig
from deberta_xl.config_file import complete_config, load_run_config, model_folder
from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.deepspeed_config import DeepSpeedConfig, load_deepspeed_config
from deberta_xl.durable import below
from deberta_xl.entry_point import build_parser, launch_of, parse, run_command
from deberta_xl.errors import ConfigError, counted
from deberta_xl.launch import Launch
from deberta_xl.log import rank_zero
from deberta_xl.model.parameter_shapes import parameter_shapes
from deberta_xl.outlook import device_gibibytes, print_outlook
from deberta_xl.parallel.grid import Grid, check_divisible, check_stages
from deberta_xl.parallel.memory import estimate_memory
from deberta_xl.parallel.stages import Split, split_model
from deberta_xl.stop_request import StopRequest

if TYPE_CHECKING:
    from deberta_xl.model.masked_lm import MaskedLanguageModel
    from deberta_xl.training.loop import Pretraining

EXAMPLE = """\
example:
  deepspeed --quiet --num_accelerators 2 deberta_xl/pretrain.py --config debug \\
      --deepspeed_config deepspeed_configs/cpu_debug.json data.train=data/wiki run.folder=runs/first train.steps=500

The same command in the same run folder resumes from its newest whole checkpoint.
Every key of the configuration can be overridden: --help SECTION shows them, and docs/settings.md."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    description = "Pretrain a DeBERTa with enhanced mask decoder on DeepSpeed."
    return parse(build_parser(description, EXAMPLE, RunConfig), arguments)


class Inputs(NamedTuple):
    """Everything that can be checked before torch is imported."""

    config: RunConfig
    engine: DeepSpeedConfig
    launch: Launch
    grid: Grid
    split: Split
    tokenizer: Tokenizer
    tokenizer_folder: Path
    architecture: DebertaConfig
    data: PretrainingData
    valid: PretrainingData | None


def read_inputs(arguments: argparse.Namespace) -> Inputs:
    """Read and check configuration, launcher, tokenizer and datasets. Raises UserError."""
    config = read_config(arguments.config, arguments.overrides)
    engine = load_deepspeed_config(arguments.deepspeed_config, config)
    launch = launch_of(arguments)
    device_gibibytes()  # refused here where it is none, not when it is told
    grid = Grid.for_run(launch.rank, launch.world_size, config.parallel)
    engine.agree(grid.data_parallel_size, config)
    if config.data.train is None:
        raise ConfigError("data.train is not set: give the prefix of a dataset made by tools/preprocess.py")
    store = TokenStore(config.data.train)
    tokenizer_folder = store.paths.tokenizer
    tokenizer = store.tokenizer()
    architecture = config.model.architecture(tokenizer.vocab_size)
    check_divisible(architecture, grid.tensor_parallel_size)
    check_stages(architecture, grid.num_stages)
    length, share = config.model.sequence_length, config.data.mask_probability
    split = split_model(architecture, grid.num_stages, config.train.micro_batch_size, length, share)
    if config.train.init and not step_folders(Path(config.run.folder) / "checkpoints"):
        check_init(config.train.init, architecture, tokenizer, tokenizer_folder)
    options = (tokenizer, config.data, length, config.train.seed)
    data = PretrainingData(store, *options)
    data.check_training()
    valid = PretrainingData(TokenStore(config.data.valid), *options) if config.data.valid else None
    if valid:
        valid.check_held_out(config.evaluation.max_samples)
    return Inputs(config, engine, launch, grid, split, tokenizer, tokenizer_folder, architecture, data, valid)


def read_config(name: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a preset or TOML file; of a model's folder, its architecture and defaults otherwise."""
    folder = model_folder(name)
    if folder is None:
        return load_run_config(name, overrides)
    from deberta_xl.checkpoint.named_folder import peek

    _, architecture = peek(folder, "--config")
    model = {key: value for key, value in dataclasses.asdict(architecture).items() if value is not None}
    model["sequence_length"] = min(ModelSection.sequence_length, architecture.max_position_embeddings)
    return complete_config({"model": model}, str(folder), overrides, RunConfig)


def check_init(init: str, architecture: DebertaConfig, tokenizer: Tokenizer, tokenizer_folder: Path) -> None:
    """Refuse weights for a new run that are not for its model, or whose rows are not for its dataset's pieces."""
    from deberta_xl.checkpoint.initial_weights import check_same_architecture, peek_tensors
    from deberta_xl.checkpoint.named_folder import peek, tokenizer_folders

    folder, there = peek(init)
    own = next(tokenizer_folders(folder), None)
    theirs = Tokenizer.load(own) if own is not None else None
    if theirs is None:
        rank_zero(
            "train.init=%s has no tokenizer: nobody can tell whether its ids stand for the pieces of %s",
            folder, tokenizer_folder, level=logging.WARNING,
        )  # fmt: skip
    elif not theirs.has_same_ids(tokenizer):
        raise ConfigError(
            f"train.init={folder}: another tokenizer: {tokenizer.difference_from(theirs)}. Use a dataset "
            f"made with {own}, or let the weights follow their pieces to the ids of this one: python tools/convert.py "
            f"--to native --tokenizer {tokenizer_folder} {init} NEW_FOLDER, then train.init=NEW_FOLDER"
        )
    check_same_architecture(architecture, there, folder)
    peek_tensors(init)


def print_arithmetic(inputs: Inputs) -> None:
    """What the run is going to be: sizes, ranks, samples and tokens, on rank 0."""
    num_parameters = sum(map(math.prod, parameter_shapes(inputs.architecture).values()))
    train, length = inputs.config.train, inputs.config.model.sequence_length
    ranks, batch = inputs.grid.data_parallel_size, train.global_batch_size
    accumulation = train.gradient_accumulation_steps(ranks)
    samples = train.steps * batch
    zero = f"ZeRO-{inputs.engine.zero_stage} in {inputs.engine.precision}"
    rank_zero("model: %s parameters, vocabulary %d", f"{num_parameters:,}", inputs.architecture.vocab_size)
    sliced = ", sequence divided" if inputs.config.parallel.sequence_parallel else ""
    rank_zero("ranks: %s%s, %s", inputs.grid.describe(), sliced, zero)
    if inputs.split.num_stages > 1:
        rank_zero("stages: %s", inputs.split.describe(accumulation))
    for stage in range(inputs.split.num_stages):
        grid = inputs.grid._replace(stage=stage)
        needed = estimate_memory(inputs.architecture, inputs.config, inputs.engine, grid, inputs.split)
        of_stage = f" of stage {stage}" if inputs.split.num_stages > 1 else ""
        rank_zero("each rank%s: %s estimated", of_stage, needed.describe())
    rank_zero(
        "step: %s x %d tokens = %s tokens (micro-batch %d x %d accumulated x %s)",
        counted(batch, "sequence"), length, f"{batch * length:,}", train.micro_batch_size, accumulation,
        counted(ranks, "replica"),
    )  # fmt: skip
    rank_zero(
        "run: %s = %s = %.2f epochs of %s (%s)",
        counted(train.steps, "step"), counted(samples, "sequence"), samples / inputs.data.num_rows,
        counted(inputs.data.num_rows, "row"), counted(inputs.data.tokens, "token"),
    )  # fmt: skip
    interval = counted(inputs.config.checkpoint.interval, "step").removeprefix("1 ")
    rank_zero("run folder: %s (checkpoint every %s)", inputs.config.run.folder, interval)
    print_outlook(inputs)


def fingerprints_of(inputs: Inputs) -> dict[str, Any]:
    """What a checkpoint must agree with to be continued."""
    from deberta_xl.checkpoint.initial_weights import computed_by

    return {
        "architecture": computed_by(inputs.architecture),
        "sequence_length": inputs.config.model.sequence_length,
        "data": inputs.data.fingerprint,
        "tokenizer": inputs.tokenizer.fingerprint,
    }


def look_ahead(inputs: Inputs) -> None:
    """Refuse what the start would refuse for its run folder's sake."""
    from deberta_xl.training.look_ahead import check_run_folder

    check_run_folder(inputs.config.run.folder, lambda: fingerprints_of(inputs), inputs.config.train.steps)


def build_model(inputs: Inputs, units: range, *, is_new: bool) -> MaskedLanguageModel:
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


def assemble(inputs: Inputs, stop: StopRequest) -> Pretraining:
    """Process group, run folder, engine: everything the loop works with. Collective."""
    from deberta_xl.checkpoint.native_config import native_config
    from deberta_xl.checkpoint.weights import TOKENIZER_NAME
    from deberta_xl.parallel.pipeline import PipelinedModel
    from deberta_xl.training.loop import Pretraining
    from deberta_xl.training.safeguard import Safeguard
    from deberta_xl.training.start import start_engine, start_run
    from deberta_xl.training.state import TrainState

    config, split, fingerprints = inputs.config, inputs.split, fingerprints_of(inputs)
    start = start_run(inputs, fingerprints, config.train.steps)
    print_arithmetic(inputs)
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
    run_command(
        parse_arguments(),
        read_config=read_config,
        read_inputs=read_inputs,
        look_ahead=look_ahead,
        print_arithmetic=print_arithmetic,
        assemble=assemble,
    )


if __name__ == "__main__":
    main()
