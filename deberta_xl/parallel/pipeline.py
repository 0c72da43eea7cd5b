"""The plain model as stages of a pipeline: each rank has some of the layers, and states travel from one to the next.

What travels is one float tensor: hidden states with the relative table below them. Everything else that a stage needs
(token ids, masks, labels, the dropout key) is a function of the step and the data-parallel rank, so each stage has it
from its own data loader: nothing of it has to be sent, its shapes are free, and no device waits for it. The loss is
computed inside the last stage, where the enhanced mask decoder and the head are.

Shape suffixes of this file:
    B batch   S sequence   D hidden   R relative rows (2k)   P rows that travel (B·S + R)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

from deberta_xl.base import signs
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.masked_lm import LabelledPositions, MaskedLanguageModel
from deberta_xl.model.parts import parts_by_parameter, shapes_of
from deberta_xl.parallel.groups import Groups
from deberta_xl.parallel.pipeline_grid import PipelineGrid
from deberta_xl.parallel.stages import Split
from deberta_xl.settings.architecture import DebertaConfig

WORD_TABLE = "word"
"""Key of the one weight that two stages share."""


class StageInput(NamedTuple):
    """What a stage needs of a micro-batch besides the states it receives."""

    input_ids_BS: Tensor
    segments_BS: Tensor
    labelled: LabelledPositions
    label_count: float
    """Divisor of the loss."""
    key: DropoutKey | None = None
    token_type_ids_BS: Tensor | None = None
    open_BS: Tensor | None = None
    """As in `Trunk.scene`."""


class Activations(NamedTuple):
    """What travels between stages."""

    hidden_BSD: Tensor
    relative_RD: Tensor | None
    """As in `Scene`."""

    def pack(self) -> Tensor:
        """Both as one tensor, [P, D]: one message, one gradient."""
        rows_PD = self.hidden_BSD.flatten(0, 1)
        return rows_PD if self.relative_RD is None else torch.cat([rows_PD, self.relative_RD])

    @classmethod
    def unpack(cls, rows_PD: Tensor, num_sequences: int, num_relative: int) -> Activations:
        """The inverse of `pack`."""
        hidden, relative_RD = rows_PD.split([len(rows_PD) - num_relative, num_relative])
        return cls(hidden.unflatten(0, (num_sequences, -1)), relative_RD if num_relative else None)


def build_stage(config: DebertaConfig, units: range, seed: int) -> MaskedLanguageModel:
    """The plain model with fresh weights, of which only the parameters used by `units` exist; the others are None.

    Those that exist are what the whole model of this seed has: each parameter has a random generator of its own. With
    all units it is the plain model.
    """
    with torch.device("meta"):
        model = MaskedLanguageModel(config)
    for name, part in parts_by_parameter(model.parts, [name for name, _ in model.named_parameters()]).items():
        if not any(unit in units for unit in part.units):
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent).register_parameter(child, None)
    model.draw_weights(seed)
    return model


class TiedWeight:
    """A weight of which DeepSpeed is about to sum the gradient over stages, wherever the gradient is kept.

    ZeRO keeps sums of another precision than the weights' (`data_types.grad_accum_dtype`) in `grad_accum`, where
    DeepSpeed's pipeline does not look: the two stages' copies would drift apart without an error.
    """

    def __init__(self, weight: nn.Parameter):
        self.weight = weight

    @property
    def grad(self) -> Tensor | None:
        """The gradient summed over micro-batches."""
        kept = getattr(self.weight, "grad_accum", None)
        return self.weight.grad if kept is None else kept

    @property
    def _hp_grad(self) -> Tensor:
        """The same, where DeepSpeed's BF16_Optimizer keeps it."""
        return self.weight._hp_grad


class PipelinedModel(PipelineModule):
    """This rank's stage, as DeepSpeed's pipeline engine runs it."""

    def __init__(self, stage_model: MaskedLanguageModel, split: Split, groups: Groups):
        """`stage_model` comes from `build_stage`, and may be divided over tensor-parallel ranks. Two stages or more.

        Sets what DeepSpeed's constructor does as far as it is asked for: that one cuts a list of layers into stages
        and makes groups of its own.
        """
        grid = groups.grid
        assert grid.num_stages > 1, "without stages the plain model goes into the engine"
        nn.Module.__init__(self)
        self.stage_model, self.split, self.grid = stage_model, split, grid
        self.num_relative = stage_model.config.relative_rows
        self.logical_shapes = shapes_of(stage_model.parts)
        self.inputs: Iterator[StageInput] = iter(())
        self.losses: list[Tensor] = []
        self.guesses: list[Tensor] = []
        self._grid = PipelineGrid(groups)
        self.global_rank, self.stage_id, self.num_stages = grid.rank, grid.stage, grid.num_stages
        self._local_start, self._local_stop = split.borders[grid.stage : grid.stage + 2]
        self.loss_fn, self.dynamic_shape, self.activation_checkpoint_interval = None, False, 0
        for parameter in stage_model.parameters():
            parameter.ds_pipe_replicated = False
        self.to(get_accelerator().current_device_name())
        self.tied_comms = self.share_word_table(groups)
        self._synchronize_tied_weights()

    def share_word_table(self, groups: Groups) -> dict[str, dict]:
        """As DeepSpeed keeps it: the first and the last stage have the word table, and sum its gradients.

        Of the two copies the gradient norm, and a checkpoint, count the first stage's.
        """
        if groups.ends_group is None:
            return {}
        ranks, module = torch.distributed.get_process_group_ranks(groups.ends_group), self.stage_model.embeddings.word
        module.weight.ds_pipe_replicated = self.grid.is_last_stage
        return {WORD_TABLE: {"ranks": ranks, "group": groups.ends_group, "weight_attr": ["weight"], "module": module}}

    def get_tied_weights_and_groups(self) -> list[tuple[TiedWeight, torch.distributed.ProcessGroup]]:
        """Called by DeepSpeed: what to sum over the stages that share it, after the last micro-batch."""
        return [(TiedWeight(tied["module"].weight), tied["group"]) for tied in self.tied_comms.values()]

    def feed(self, inputs: Iterable[StageInput]) -> None:
        """What the coming forwards are of, in order."""
        self.inputs = iter(inputs)
        self.losses, self.guesses = [], []

    def forward(self, received: Tensor) -> Tensor:
        """The stage on the next micro-batch: from the rows received to the rows to send [P, D], or to the loss.

        The first stage does not look at `received`.
        """
        given = next(self.inputs)
        signs.moved()
        model = self.stage_model
        if self.stage_id == 0:
            scene = model.scene(given.input_ids_BS, given.segments_BS, given.key, open_BS=given.open_BS)
            hidden_BSD = model.embed(given.input_ids_BS, scene, given.token_type_ids_BS)
        else:
            hidden_BSD, relative_RD = Activations.unpack(received, len(given.segments_BS), self.num_relative)
            scene = model.scene(given.input_ids_BS, given.segments_BS, given.key, relative_RD, given.open_BS)
        layers = self.split.layers(self.stage_id)
        numbers = range(layers.start, min(layers.stop, model.num_ordinary_layers))
        (hidden_BSD,) = model.encoder(hidden_BSD, scene, numbers=numbers)
        if not self.grid.is_last_stage:
            return Activations(hidden_BSD, scene.relative_RD).pack()
        output = model.predict(hidden_BSD, scene, given.labelled, label_count=given.label_count)
        self.losses.append(output.loss.detach())
        self.guesses.append(output.guess_L)
        return output.loss


def is_copy(parameter: nn.Parameter) -> bool:
    """Whether another stage's parameter of the same name is the one to count and to save."""
    return getattr(parameter, "ds_pipe_replicated", False)


def plain_model(module: nn.Module) -> MaskedLanguageModel:
    """The model inside what an engine holds; its parameters have the canonical names."""
    return module.stage_model if isinstance(module, PipelinedModel) else module
