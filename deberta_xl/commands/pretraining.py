"""A pretraining run's command line and inputs, read and checked before torch is imported."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deberta_xl.base.errors import ConfigError, counted
from deberta_xl.base.log import rank_zero
from deberta_xl.checkpoint.manifest import step_folders
from deberta_xl.commands.arguments import parse, training_parser
from deberta_xl.commands.inputs import Inputs, Layout, Words, check_model, read_layout
from deberta_xl.commands.outlook import slips
from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.token_store import TokenStore
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.model.parts import num_parameters
from deberta_xl.objectives.choice import BUILT_IN, built_in_of, check_objective, objective_type
from deberta_xl.parallel.grid import check_stages
from deberta_xl.parallel.stages import Split
from deberta_xl.planning.outlook import Outlook
from deberta_xl.planning.workload import pretraining_workload
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.mask import mask_of
from deberta_xl.settings.objectives import generator_architecture
from deberta_xl.settings.presets import complete_config, load_run_config, model_folder
from deberta_xl.settings.pretraining import ModelSection, RunConfig
from deberta_xl.settings.row_lengths import Stretch

if TYPE_CHECKING:
    from deberta_xl.objectives.objective import Objective

EXAMPLE = """\
deepspeed --quiet --num_accelerators 2 deberta_xl/pretrain.py --config debug \\
      --deepspeed_config deepspeed_configs/cpu_debug.json data.train=data/wiki run.folder=runs/first train.steps=500"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    description = "Pretrain a DeBERTa with enhanced mask decoder on DeepSpeed."
    return parse(training_parser(description, EXAMPLE, RunConfig), arguments)


@dataclass(frozen=True, kw_only=True)
class PretrainingInputs(Inputs):
    """Everything that a pretraining run is assembled from."""

    config: RunConfig
    built_in: str | None
    """The built-in objective that is trained, or from which the user's inherits."""
    split: Split
    data: PretrainingData
    valid: PretrainingData | None

    def objective(self) -> Objective:
        """The one that `train.objective` names."""
        chosen = objective_type(self.config.train.objective)
        return chosen(self.config, self.architecture, self.tokenizer, self.data, self.valid)

    @property
    def outlook(self) -> Outlook:
        """Of full rows."""
        work = pretraining_workload(self.architecture, self.config, self.built_in)
        if self.config.train.objective not in BUILT_IN:
            work = work._replace(parts=self.objective().parts)
        steps = self.total_steps
        num_saves = math.ceil(steps / self.config.checkpoint.interval)
        return Outlook(work, self.config, self.engine, self.grid, self.split, steps, num_saves, self.platform)

    def words(self) -> Words:
        """`256 sequences x 512 tokens = 131,072 tokens`; `2,560 sequences = 0.50 epochs of 5,120 rows (2 M tokens)`."""
        batch, length = self.config.train.global_batch_size, self.config.model.sequence_length
        samples, num_rows = self.total_steps * batch, self.data.num_rows
        rows, tokens = counted(num_rows, "row"), counted(self.data.tokens, "token")
        return Words(
            f"vocabulary {self.architecture.vocab_size}{self.pair()}",
            f"{counted(batch, 'sequence')} x {length} tokens = {batch * length:,} tokens",
            f"{counted(samples, 'sequence')} = {samples / num_rows:.2f} epochs of {rows} ({tokens})",
        )

    def in_words(self, stretch: Stretch) -> str:
        """`steps 1 … 80 of 4,096 x 512 tokens`."""
        batch = self.config.train.global_batch_size * stretch.pieces
        if stretch.last_step < stretch.first_step:
            return f"no step of {batch:,} x {stretch.length} tokens"
        return f"steps {stretch.first_step:,} … {stretch.last_step:,} of {batch:,} x {stretch.length} tokens"

    def pair(self) -> str:
        """`; generator 142,417,764, discriminator 184,424,449` parameters, where there are two models."""
        if self.built_in != "replaced_tokens":
            return ""
        parts = self.outlook.work.parts
        sizes = (
            f"{name} {num_parameters(part for part in parts if part.name.startswith(f'{name}.')):,}"
            for name in ("generator", "discriminator")
        )
        return f"; {', '.join(sizes)}"

    def print_more(self) -> None:
        """Rows that grow longer, the stages, and what looks like a slip."""
        if len(stretches := self.config.stretches) > 1:
            rank_zero("rows: %s", "; ".join(map(self.in_words, stretches)))
        if self.split.num_stages > 1:
            accumulation = self.config.train.gradient_accumulation_steps(self.grid.data_parallel_size)
            rank_zero("stages: %s", self.split.describe(accumulation))
        for slip in slips(self):
            rank_zero("%s", slip, level=logging.WARNING)


def read_inputs(arguments: argparse.Namespace) -> PretrainingInputs:
    """Read and check configuration, launcher, tokenizer and datasets. Raises UserError."""
    config = read_config(arguments.config, arguments.overrides)
    layout = read_layout(arguments, config)
    check_objective(config.train.objective, layout.grid.num_stages)
    built_in = built_in_of(config.train.objective)
    if config.data.train is None:
        raise ConfigError("data.train is not set: give the prefix of a dataset made by tools/preprocess.py")
    store = TokenStore(config.data.train)
    tokenizer, tokenizer_folder = store.tokenizer(), store.paths.tokenizer
    architecture = config.model.architecture(tokenizer.vocab_size)
    check_models(architecture, layout, config, built_in)
    check_stages(architecture, layout.grid.num_stages)
    if config.train.init and not step_folders(Path(config.run.folder) / "checkpoints"):
        check_init(config, built_in, architecture, tokenizer, tokenizer_folder)
    options = (tokenizer, config.data, config.model.sequence_length, config.train.seed)
    data = PretrainingData(store, *options)
    data.check_training()
    valid = PretrainingData(TokenStore(config.data.valid), *options) if config.data.valid else None
    if valid and built_in not in ("causal", "prefix"):  # which mask nothing
        valid.check_held_out(config.evaluation.max_samples)
    work = pretraining_workload(architecture, config, built_in)
    return PretrainingInputs(
        config=config,
        built_in=built_in,
        **layout._asdict(),
        mask=work.mask,
        split=work.split(layout.grid.num_stages, config.train.micro_batch_size),
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        architecture=architecture,
        total_steps=config.train.steps,
        schedule=config.schedule,
        data=data,
        valid=valid,
    )


def check_models(architecture: DebertaConfig, layout: Layout, config: RunConfig, built_in: str | None) -> None:
    """`check_model` of the model, and of its generator where it has one. Raises ConfigError."""
    check_model(architecture, layout, config, mask_of(built_in, config))
    if built_in == "replaced_tokens":
        check_model(generator_architecture(architecture, config.generator), layout, config, section="generator")


def read_config(name: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a preset or TOML file; of a model's folder, its architecture and defaults otherwise."""
    folder = model_folder(name)
    if folder is None:
        return load_run_config(name, overrides)
    from deberta_xl.weights.named_folder import peek

    _, architecture = peek(folder, "--config")
    model = {key: value for key, value in dataclasses.asdict(architecture).items() if value is not None}
    model["sequence_length"] = min(ModelSection.sequence_length, architecture.max_position_embeddings)
    return complete_config({"model": model}, str(folder), overrides, RunConfig)


def check_init(
    config: RunConfig, built_in: str | None, architecture: DebertaConfig, tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    """Refuse weights for a new run that are not for its model, or whose rows are not for its dataset's pieces."""
    from deberta_xl.weights.initial_weights import check_same_architecture, peek_tensors
    from deberta_xl.weights.named_folder import learnt_in, peek, tokenizer_folders
    from deberta_xl.weights.replaced_tokens import peek_initial_pair

    init = config.train.init
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
    if built_in == "replaced_tokens":
        partner = generator_architecture(architecture, config.generator)
        peek_initial_pair(init, architecture, partner, config.replaced_tokens.sharing)
        return
    check_same_architecture(architecture, there, folder)
    peek_tensors(init)
    tell_of_other_sight(learnt_in(folder).objective or "masked_lm", built_in, config.train.objective, folder)


SIGHT = {
    "masked_lm": "each token saw all of its document",
    "causal": "each token saw those before it",
    "prefix": "each token saw those before it and the document's prefix",
    "mixed": "each token saw all of its document, or in other micro-batches those before it",
}


def tell_of_other_sight(there: str, here: str | None, name: str, folder: Path) -> None:
    """Say where weights come from training in which tokens saw more, or less, than they are going to."""
    if here in SIGHT and there not in (here, "mixed"):
        rank_zero(
            "train.init=%s comes from training in which %s: it begins train.objective=%s with the habits of that",
            folder, SIGHT[there], name,
        )  # fmt: skip
