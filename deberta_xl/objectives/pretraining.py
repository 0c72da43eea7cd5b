"""Where an objective on packed rows of text begins: what it has without asking, and what it says itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from deberta_xl.base.errors import ConfigError
from deberta_xl.base.log import rank_zero
from deberta_xl.checkpoint.together import on_rank_zero
from deberta_xl.data.loader import Batch, PretrainingData
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import Part, with_heads
from deberta_xl.model.trunk import Trunk, shapes_of_model
from deberta_xl.objectives.masked_evaluation import evaluation_batches
from deberta_xl.objectives.micro_batch import MicroBatch
from deberta_xl.objectives.objective import Objective
from deberta_xl.objectives.rows import KeyedData, MaskedRows, step_batches
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.pretraining import RunConfig
from deberta_xl.weights.initial_weights import encoder_fingerprints, load_initial_weights
from deberta_xl.weights.named_folder import find_pretrained
from deberta_xl.weights.native import files_beside_weights
from deberta_xl.weights.native_config import Learnt


class Pretraining(Objective):
    """An objective on the rows of `data.train`, masked as the section `data` has it.

    Yours needs a model (`build`: usually a head on a `Trunk`) and `losses`. By default a micro-batch is `MaskedRows`,
    which count their labels; with `micro_batch` and `counts` it is what you make of the rows, such as `Rows`, without
    masks. `reports` says which figures `losses` gives besides `loss`. Evaluation gives their means over `data.valid`.
    """

    counts: tuple[str, ...] = ("labels",)
    draws: ClassVar[bool] = False
    """Whether `micro_batch` draws something for each row: it is given a `KeyedBatch` then, whose keys name them."""
    nothing_to_learn = (
        "give longer rows (model.sequence_length, or longer text), more of them (train.global_batch_size), or a larger "
        "data.mask_probability; or is nearly all of the text [UNK]?"
    )

    def __init__(
        self,
        config: RunConfig,
        architecture: DebertaConfig,
        tokenizer: Tokenizer,
        data: PretrainingData,
        valid: PretrainingData | None,
    ):
        self.config = config
        self.architecture = architecture
        """Of the model, with the vocabulary's size."""
        self.tokenizer, self.data, self.valid = tokenizer, data, valid
        self.tokens_per_sample = config.model.sequence_length

    @property
    def parts(self) -> list[Part]:
        """The anatomy of the model, which is built without weights for that; for what a run takes."""
        with torch.device("meta"):
            model = self.build()
        return model.parts if isinstance(model, Trunk) else with_heads([], shapes_of_model(model))

    @property
    def seed(self) -> int:
        """Of fresh weights."""
        return self.config.train.seed

    def micro_batch(self, batch: Batch) -> MicroBatch:
        """Tensors on the host of masked rows and their labels; called in the background.

        A function of the batch alone, in training as in evaluation: held-out rows have keys that never change.
        """
        return MaskedRows.of(batch)

    def source(self, data: PretrainingData) -> PretrainingData | KeyedData:
        """What `micro_batch` is given batches of."""
        return KeyedData(data) if self.draws else data

    def load_initial(self, model: nn.Module) -> None:
        """The weights of `train.init`. Collective."""
        init = self.config.train.init
        if init and not isinstance(model, Trunk):
            raise ConfigError(
                f"train.init has the weights of a Trunk (deberta_xl/model/trunk.py), and {type(model).__name__} is "
                "none: let it inherit from Trunk, or say in load_initial which weights go where"
            )
        if init:
            # Found once for all ranks: a run that is still written to has one newest checkpoint.
            source = on_rank_zero(lambda: find_pretrained(init))
            load_initial_weights(model, source)
            rank_zero("weights from %s", source)

    @property
    def fingerprints(self) -> Mapping[str, Any]:
        """Objective, architecture, data, tokenizer and seed."""
        return {
            "objective": self.config.train.objective,
            **encoder_fingerprints(self.architecture, self.tokens_per_sample, self.tokenizer),
            "data": self.data.fingerprint,
            "seed": self.seed,
        }

    def checkpoint_files(self, step: int) -> Mapping[str, bytes]:
        """The architecture and the tokenizer: from a checkpoint the encoder can be fine-tuned."""
        return files_beside_weights(self.architecture, self.tokenizer, learnt=self.learnt(step))

    def learnt(self, step: int) -> Learnt:
        """What the checkpoint of a step tells of its training."""
        return Learnt(sequence_length=self.config.stretch_at(step).length)

    def load_at(self, step: int, labelled: float) -> Load:
        """What a step with so many labels computes on."""
        stretch = self.config.stretch_at(step)
        return Load(self.config.train.global_batch_size * stretch.pieces, stretch.length, labelled)

    @property
    def num_samples(self) -> int:
        """Rows of an epoch."""
        return self.data.num_rows

    def batches(self, first_step: int, first_sample: int, *, rank: int, size: int) -> Iterator[list[MicroBatch]]:
        """The rows from `first_sample` on: a sample is a row of `model.sequence_length`, or the shorter ones in its
        place. Each length goes on where it would stand if all steps before had been its own."""
        train = self.config.train
        for stretch in self.config.stretches:
            steps_left = max(0, stretch.last_step + 1 - first_step)
            data = self.source(self.data.in_rows_of(stretch.length))
            sizes = {name: getattr(train, name) * stretch.pieces for name in ("global_batch_size", "micro_batch_size")}
            own, first_row = replace(train, **sizes), first_sample * stretch.pieces
            steps = step_batches(data, own, first_row, self.micro_batch, rank=rank, size=size)
            yield from itertools.islice(steps, None if stretch.pieces == 1 else steps_left)
            first_step += steps_left
            first_sample += steps_left * train.global_batch_size

    @property
    def has_held_out(self) -> bool:
        """Whether there is `data.valid`."""
        return self.valid is not None

    def is_evaluation_due(self, step: int) -> bool:
        """Every `evaluation.interval` steps."""
        return step % self.config.evaluation.interval == 0

    def held_out(self, *, rank: int, size: int) -> Iterator[MicroBatch]:
        """The rows of `data.valid`, always masked alike, under the same draws."""
        sizes = {
            "max_samples": self.config.evaluation.max_samples,
            "micro_batch_size": self.config.train.micro_batch_size,
        }
        return evaluation_batches(self.source(self.valid), self.micro_batch, **sizes, rank=rank, size=size)
