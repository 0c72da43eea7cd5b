"""A model divided over ranks by the plan equals the plain model: loss, every gradient, with dropout and without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from plain_run import architecture
from ranks import run_ranks
from torch import nn
from vectors import Vector, folders

from deberta_xl.kernels.vocabulary import Drawing
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.layer import EncoderLayer
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.model.trunk import Trunk
from deberta_xl.parallel.grid import Grid
from deberta_xl.parallel.groups import Groups, build_groups
from deberta_xl.parallel.plan import divide
from deberta_xl.settings.architecture import DebertaConfig

SIZES = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 64, "position_buckets": 8}
LAYOUTS = {
    "v2": {"conv_kernel_size": 3},
    "own_position_projections": {"share_att_key": False},
    "c2p": {"pos_att_type": "c2p"},
    "positions_in_the_input": {"position_biased_input": True, "type_vocab_size": 2},
    "p2c_and_own_decoder_layers": {"pos_att_type": "p2c", "share_att_key": False, "decoder_weights": "own"},
    "content_and_three_passes_over_it": {"pos_att_type": "none", "decoder_passes": 3, "decoder_input": "states"},
}
# 101 and 99 do not divide by 2 or 4: the last rank's part of the vocabulary is padded.
VOCABULARIES = (101, 99)
KEYS = (None, DropoutKey(1))


def join(tensor_parallel_size: int) -> Groups:
    """This rank's groups."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return build_groups(Grid.of(rank, size, tensor_parallel_size))


def batch(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two rows with padding and two documents, and labels."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(4, vocab_size, (2, 24), generator=generator)
    segments = torch.tensor([[1] * 24, [1] * 9 + [2] * 10 + [0] * 5])
    labels = torch.where((torch.rand(2, 24, generator=generator) < 0.3) & (segments > 0), ids, 0)
    return ids * (segments > 0), segments, labels


class Outcome(NamedTuple):
    """What is compared."""

    loss: torch.Tensor
    guess_L: torch.Tensor
    gradients: dict[str, torch.Tensor]


def outcome(model: MaskedLanguageModel, key: DropoutKey | None = None) -> Outcome:
    """Loss, guesses and gradients of one batch."""
    ids, segments, labels = batch(model.config.vocab_size)
    output = model(ids, segments, labels=labels, dropout_key=key)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Outcome(output.loss.detach(), output.guess_L, gradients)


def divided_outcome(
    config: DebertaConfig,
    tensor_parallel_size: int,
    key: DropoutKey | None = None,
    *,
    activation_checkpointing: bool,
    sequence_parallel: bool,
) -> Outcome:
    """The outcome of a divided model on this rank, its slices' gradients joined to whole ones."""
    groups = join(tensor_parallel_size)
    model = MaskedLanguageModel(config, seed=3).train(key is not None)
    if activation_checkpointing:
        model.checkpoint_activations()
    divide(model, groups, sequence_parallel=sequence_parallel)
    result = outcome(model, key)
    return result._replace(gradients={name: join_slices(model, name, groups) for name in result.gradients})


def join_slices(model: MaskedLanguageModel, name: str, groups: Groups) -> torch.Tensor:
    """The whole gradient of a parameter."""
    parameter = model.get_parameter(name)
    shard = getattr(parameter, "tensor_parallel_shard", None)
    if shard is None:
        return parameter.grad
    parts = [torch.empty_like(parameter.grad) for _ in range(shard.size)]
    torch.distributed.all_gather(parts, parameter.grad.contiguous(), group=groups.tensor_group)
    return torch.cat(parts, shard.dim).narrow(0, 0, shard.logical_shape[0])


def assert_equal_outcome(actual: Outcome, expected: Outcome) -> None:
    """Tolerances of float32: per tensor 1e-5 of its norm, plus 1e-7 of the global norm (zeros exist)."""
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=0)
    assert torch.equal(actual.guess_L, expected.guess_L)
    total = torch.stack([g.norm() for g in expected.gradients.values()]).norm()
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        difference = (actual.gradients[name] - gradient).norm()
        assert difference <= 1e-5 * gradient.norm() + 1e-7 * total, f"{name}: {difference} of {gradient.norm()}"


def outcomes(tensor_parallel_size: int, configs: list[DebertaConfig], sequence_parallel: bool) -> list[Outcome]:
    """Every configuration on this rank, without dropout; with it, and recomputation."""
    return [
        divided_outcome(
            config,
            tensor_parallel_size,
            key,
            activation_checkpointing=key is not None,
            sequence_parallel=sequence_parallel,
        )
        for config in configs
        for key in KEYS
    ]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["TP", "TP+SP"])
@pytest.mark.parametrize("tensor_parallel_size", [2, 4])
def test_a_divided_model_has_the_plain_ones_loss_guesses_and_gradients(tensor_parallel_size, sequence_parallel):
    # Much dropout: a mask that a rank drew otherwise would change everything.
    dropped = {"hidden_dropout": 0.3, "attention_dropout": 0.2}
    configs = [
        DebertaConfig(vocab_size=size, max_position_embeddings=24, **SIZES, **dropped, **options)
        for options, size in zip(LAYOUTS.values(), VOCABULARIES * 3, strict=True)
    ]
    expected = [outcome(MaskedLanguageModel(c, seed=3).train(key is not None), key) for c in configs for key in KEYS]
    for results in run_ranks(
        outcomes, tensor_parallel_size, tensor_parallel_size, configs, sequence_parallel, timeout=200
    ):
        for actual, reference in zip(results, expected, strict=True):
            assert_equal_outcome(actual, reference)


class Refined(Trunk):
    """An encoder with a layer of its own on it, which nobody divides."""

    def __init__(self, config: DebertaConfig, seed: int):
        with torch.device("meta"):
            super().__init__(config)
            self.refiner = EncoderLayer(config)
        self.draw_weights(seed)

    def forward(self, ids: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        """States."""
        scene = self.scene(ids, segments)
        return self.refiner(self.encode(ids, scene), scene)


def gradients_of_two(tensor_parallel_size: int, *, sequence_parallel: bool = False) -> dict[str, torch.Tensor]:
    """Whole gradients of a model that has two encoders."""
    config = DebertaConfig(vocab_size=101, max_position_embeddings=24, **SIZES)
    model = nn.ModuleList([Refined(config, seed) for seed in (3, 4)]).eval()
    groups = join(tensor_parallel_size)
    divide(model, groups, sequence_parallel=sequence_parallel)
    ids, segments, _ = batch(config.vocab_size)
    torch.stack([encoder(ids, segments) for encoder in model]).prod(0).sum().backward()
    return {name: join_slices(model, name, groups) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["TP", "TP+SP"])
def test_each_encoder_of_a_model_is_divided_and_the_layers_of_a_head_are_not(sequence_parallel):
    (expected,) = run_ranks(gradients_of_two, 1, 1)
    for gradients in run_ranks(partial(gradients_of_two, sequence_parallel=sequence_parallel), 2, 2):
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():  # float32, as above
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-5, name


def vector_outcome(folder) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and whole gradients of a reference vector, divided over two ranks."""
    groups = join(2)
    vector = Vector(folder, torch.float32)
    divide(vector.model, groups)
    inputs = vector.inputs
    output = vector.model(
        inputs["input_ids"], inputs["attention_mask"], inputs.get("token_type_ids"), labels=inputs["labels"]
    )
    output.loss.backward()
    return output.loss.detach(), {n: join_slices(vector.model, n, groups) for n in vector.gradients}


@pytest.mark.parametrize("folder", folders("mlm_emd"), ids=lambda folder: folder.name)
def test_a_divided_model_reproduces_the_original(folder):
    expected = Vector(folder)
    for loss, gradients in run_ranks(vector_outcome, 2, folder):
        # The original's own float32 differs from its float64 by 9e-5 (loss) and 4.5e-5 (gradients).
        assert abs(loss - expected.outputs["loss"]) <= 2e-4
        for name, gradient in expected.gradients.items():
            assert (gradients[name] - gradient).abs().max() <= 1e-4, name


class Collectives:
    """Counts the collectives of this rank, and remembers what shapes they moved."""

    def __init__(self):
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        # What each one sends is its first tensor, or its second where the first receives.
        for name, sent in (
            ("all_reduce", 0), ("all_gather", 1), ("all_gather_into_tensor", 1), ("reduce_scatter_tensor", 1)
        ):  # fmt: skip
            setattr(torch.distributed, name, self.counted(name, getattr(torch.distributed, name), sent))

    def counted(self, name: str, real: Callable, sent: int) -> Callable:
        """The collective `real`, which counts itself."""

        def call(*args: object, **options: object) -> object:
            self.shapes.setdefault(name, []).append(tuple(args[sent].shape))
            return real(*args, **options)

        return call

    def take(self) -> dict[str, list[tuple[int, ...]]]:
        """Name of a collective -> the shapes it sent, since the last call."""
        taken, self.shapes = self.shapes, {}
        return taken


def layer_collectives(sequence_parallel: bool) -> tuple[dict, dict]:
    """Collectives of one layer's forward and backward, on two rows of 24 tokens and a table of 16 rows."""
    config = DebertaConfig(vocab_size=100, max_position_embeddings=24, **SIZES)
    model = MaskedLanguageModel(config, seed=3).eval()
    divide(model, join(2), sequence_parallel=sequence_parallel)
    hidden = torch.randn(2, 12 if sequence_parallel else 24, 32, requires_grad=True)
    scene = model.scene(torch.ones(2, 24, dtype=torch.int64), relative_RD=torch.randn(16, 32, requires_grad=True))
    collectives = Collectives()
    output = model.encoder.layers[0](hidden, scene)
    forward = collectives.take()
    output.sum().backward()
    return forward, collectives.take()


def test_a_layer_needs_two_sums_forward_and_three_backward():
    # Forward: after the output projection and after the feed-forward block. Backward: states and relative table where
    # they enter the heads (two for the attention), and the input of the feed-forward block.
    states, table = (2, 24, 32), (16, 32)
    for forward, backward in run_ranks(layer_collectives, 2, False):
        assert forward == {"all_reduce": [states] * 2}
        assert list(backward) == ["all_reduce"]
        assert sorted(backward["all_reduce"]) == [states, states, table]


def head_collectives() -> tuple[dict, dict]:
    """Collectives of the head's forward and backward, on five labels, with a token drawn for each."""
    model = MaskedLanguageModel(DebertaConfig(vocab_size=101, max_position_embeddings=24, **SIZES), seed=3).eval()
    divide(model, join(2))
    labels = torch.arange(40, 45)
    drawing = Drawing(labels, labels, 1.0)
    collectives = Collectives()
    judged = model.head(torch.randn(5, 32, requires_grad=True), model.embeddings.word, labels, drawing)
    forward = collectives.take()
    judged.loss.backward()
    return forward, collectives.take()


def test_a_divided_vocabulary_needs_one_exchange_forward_and_a_sum_backward():
    # Of each label: the sum of exponentials, the label's logit; value and id of the best guess and of what is drawn.
    for forward, backward in run_ranks(head_collectives, 2):
        assert forward == {"all_gather_into_tensor": [(2 + 2 * 2, 5)]}
        assert backward == {"all_reduce": [(5, 32)]}


def test_sizes_that_do_not_divide_are_refused_with_those_that_do():
    from deberta_xl.parallel.grid import check_divisible

    with pytest.raises(ValueError, match=r"does not divide the 6 ranks; choose one of \[1, 2, 3, 6\]"):
        Grid.of(0, 6, 4)
    with pytest.raises(ValueError, match=r"2 x parallel.pipeline_parallel_size=2 = 4 does not divide the 6 ranks"):
        Grid.of(0, 6, 2, 2)
    with pytest.raises(ValueError, match=r"=3 does not divide model.num_heads=4; choose one of \[1, 2, 4\]"):
        check_divisible(architecture(100), 3)
