"""Sequence parallelism beside tensor parallelism: few collectives, less kept for the backward pass, the plain run.

Most comparisons with the plain run are cases of test_layout_matrix.py; loss, guesses and every gradient of one batch,
for six kinds of model, with dropout and without, are compared in test_tensor_parallel.py.
"""

from __future__ import annotations

import pytest
import torch
from full_state import FullState
from layouts import Case, run_cases
from plain_run import Curve, architecture, assert_equal_curves, train_plainly
from ranks import run_ranks
from small_dataset import SmallDataset
from test_layout_matrix import LAYOUTS, LOW_PRECISION, VARIANTS, compare
from test_tensor_parallel import (
    SIZES,
    Collectives,
    Outcome,
    assert_equal_outcome,
    batch,
    divided_outcome,
    join,
    layer_collectives,
    outcome,
)

from deberta_xl.kernels.contract import Where
from deberta_xl.kernels.relative_index import Buckets
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.model.part_costs import Division, Load, layer_bytes
from deberta_xl.parallel import plan
from deberta_xl.parallel.plan import divide
from deberta_xl.parallel.sequence import own_slice
from deberta_xl.parallel.shard import shard_of
from deberta_xl.settings.architecture import DebertaConfig


def small_config(**options: object) -> DebertaConfig:
    """Three layers, 24 tokens."""
    return DebertaConfig(vocab_size=101, max_position_embeddings=24, **SIZES, **options)


def sliced_model(config: DebertaConfig) -> MaskedLanguageModel:
    """A model whose layers and sequence are divided over two ranks."""
    model = MaskedLanguageModel(config, seed=3)
    divide(model, join(2), sequence_parallel=True)
    return model


@pytest.fixture(scope="module")
def plain(small_dataset: SmallDataset) -> tuple[Curve, FullState]:
    """The reference run: one process, nothing divided."""
    return train_plainly(small_dataset, architecture(small_dataset.tokenizer.vocab_size))


def sliced(cases: list[Case]) -> list[Case]:
    """The same cases with sequence parallelism."""
    return [case._replace(sliced=True) for case in cases]


@pytest.mark.full
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_architecture_gives_its_plain_run_over_stages_and_slices(small_dataset, tmp_path, options):
    options = {"vocab_size": small_dataset.tokenizer.vocab_size} | options
    plain = train_plainly(small_dataset, architecture(**options))
    compare(small_dataset, tmp_path, LAYOUTS["TP2xPP2"], sliced([Case(1, 2)]), plain, **options)


@pytest.mark.full
@pytest.mark.parametrize("precision", LOW_PRECISION)
def test_low_precision_on_slices_follows_the_plain_run_within_its_rounding(small_dataset, plain, tmp_path, precision):
    loss, norm = LOW_PRECISION[precision]
    cases = sliced([Case(stage, 2, precision=precision) for stage in (1, 2, 3)])
    arguments = (small_dataset, tmp_path, LAYOUTS["TP2xDP2"], cases, {})
    for curves in run_ranks(run_cases, 4, *arguments, timeout=300):
        for case, curve in zip(cases, curves, strict=True):
            assert_equal_curves(curve, plain[0], case, loss, norm)


def test_a_layer_needs_two_gathers_and_two_scatters_each_way_and_three_small_sums_backward():
    # What the sums of tensor parallelism move in two halves: whole sequences are gathered where states enter the heads
    # and the feed-forward block, slices are scattered after them; the other way round in the backward pass. There the
    # relative table is summed as without, never gathered, and each norm's weight and bias in one sum.
    part, whole, table, norm = (2, 12, 32), (4, 12, 32), (16, 32), (64,)
    for forward, backward in run_ranks(layer_collectives, 2, True):
        assert forward == {"all_gather_into_tensor": [part] * 2, "reduce_scatter_tensor": [whole] * 2}
        sums = backward.pop("all_reduce")
        assert backward == {"all_gather_into_tensor": [part] * 2, "reduce_scatter_tensor": [whole] * 2}
        assert sorted(sums) == [table, norm, norm]


def model_collectives() -> tuple[dict[str, int], dict[str, int]]:
    """How many collectives the whole model needs beyond those of its two sliced layers, forward and backward."""
    model = sliced_model(small_config(conv_kernel_size=3))
    ids, segments, labels = batch(101)
    collectives = Collectives()
    loss = model(ids, segments, labels=labels).loss
    forward = {name: len(shapes) for name, shapes in collectives.take().items()}
    loss.backward()
    return forward, {name: len(shapes) for name, shapes in collectives.take().items()}


def test_around_the_layers_the_sequence_is_joined_twice_forward_and_twice_backward():
    # Forward: for the convolution and for prediction; backward: for what the embeddings and the convolution made whole.
    # Sums forward: word table; twice 2 in EMD. One gather forward in the loss, of each rank's figures.
    # Sums backward: head; in EMD keys and values, and twice queries, table and feed-forward; in two layers 3 each; the
    # convolution's norm.
    for forward, backward in run_ranks(model_collectives, 2):
        assert forward == {
            "all_reduce": 1 + 4, "all_gather_into_tensor": 2 * 2 + 2 + 1, "reduce_scatter_tensor": 2 * 2,
        }  # fmt: skip
        assert backward == {
            "all_reduce": 1 + 7 + 2 * 3 + 1, "all_gather_into_tensor": 2 * 2 + 2, "reduce_scatter_tensor": 2 * 2,
        }  # fmt: skip


def convolution_input() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings and states of two rows of 24 tokens, and their documents, of which one crosses the middle."""
    generator = torch.Generator().manual_seed(2)
    embedded, hidden = torch.randn(2, 2, 24, 32, generator=generator)
    return embedded, hidden, batch(101)[1]


def where(segments: torch.Tensor) -> Where:
    """Rows of such documents; a convolution asks for nothing else."""
    return Where(segments, Buckets(8, 24))


def convolved_slice() -> torch.Tensor:
    """What the convolution makes of this rank's slices."""
    groups = join(2)
    model = sliced_model(small_config(conv_kernel_size=3)).eval()
    embedded, hidden, segments = convolution_input()
    with torch.no_grad():
        return model.encoder.convolution(own_slice(embedded, groups), own_slice(hidden, groups), where(segments))


def test_the_convolution_sees_neighbours_beyond_the_cut():
    plain = MaskedLanguageModel(small_config(conv_kernel_size=3), seed=3).eval().encoder.convolution
    embedded, hidden, segments = convolution_input()
    with torch.no_grad():
        expected = plain(embedded, hidden, where(segments))
        cut = zip(*(x.chunk(2, dim=1) for x in (embedded, hidden, segments)), strict=True)
        halves = [plain(e, h, where(s)) for e, h, s in cut]
    differs = (torch.cat(halves, dim=1) - expected).abs().amax((0, 2)) > 1e-3
    assert differs.nonzero().flatten().tolist() == [11, 12]  # what each rank alone would get wrong
    torch.testing.assert_close(torch.cat(run_ranks(convolved_slice, 2), dim=1), expected)


def unsummed_outcome(place: str) -> Outcome:
    """The outcome when the plan forgets a place, as a model divided by hand might."""
    del plan.SLICED_LAYER_PLAN[place]
    return divided_outcome(small_config(), 2, activation_checkpointing=False, sequence_parallel=True)


def test_a_norm_whose_gradients_are_not_summed_over_slices_is_noticed():
    expected = outcome(MaskedLanguageModel(small_config(), seed=3).eval())
    for actual in run_ranks(unsummed_outcome, 2, "attention_norm"):
        torch.testing.assert_close(actual.loss, expected.loss)  # the forward pass is right: nothing else would tell
        with pytest.raises(AssertionError, match=r"encoder\.layers\.0\.attention_norm\.weight"):
            assert_equal_outcome(actual, expected)


def replicated_gradients() -> dict[str, torch.Tensor]:
    """This rank's gradients of what every rank holds."""
    model = sliced_model(small_config(conv_kernel_size=3)).eval()
    gradients = outcome(model).gradients
    return {name: gradients[name] for name, p in model.named_parameters() if shard_of(p) is None}


def test_what_every_rank_holds_gets_the_very_same_gradient_on_each():
    # Bit for bit, or the copies would drift apart over the steps.
    one, other = run_ranks(replicated_gradients, 2)
    assert {"encoder.relative_position.table.weight", "encoder.convolution.weight"} < one.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


DROPPED = {"hidden_dropout": 0.3, "attention_dropout": 0.3}


def kept_bytes(*, sequence_parallel: bool, activation_checkpointing: bool) -> int:
    """Bytes that one more layer keeps for the backward pass, parameters left out; with dropout, in training."""
    totals = []
    for num_layers in (3, 4):
        sizes = {**SIZES, **DROPPED, "num_layers": num_layers}
        model = MaskedLanguageModel(DebertaConfig(vocab_size=101, max_position_embeddings=24, **sizes), seed=3).train()
        model.use_kernel("reference")  # which keeps as much whatever documents there are
        divide(model, join(2), sequence_parallel=sequence_parallel)
        if activation_checkpointing:
            model.checkpoint_activations()
        totals.append(bytes_kept_by(model))
    return totals[1] - totals[0]


def bytes_kept_by(model: MaskedLanguageModel) -> int:
    """Bytes that a forward keeps besides the parameters."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids, segments, labels = batch(model.config.vocab_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, segments, labels=labels, dropout_key=DropoutKey(1))
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def kept_with_and_without_slices(activation_checkpointing: bool) -> tuple[int, int]:
    """What a layer keeps on this rank of two, in bytes: with a divided sequence and without."""
    return tuple(
        kept_bytes(sequence_parallel=is_sliced, activation_checkpointing=activation_checkpointing)
        for is_sliced in (True, False)
    )


STATES = 2 * 24 * 32
"""Numbers in the states of a batch, B·S·D."""


def test_a_layer_keeps_its_norms_inputs_and_dropout_masks_as_slices():
    # In float32, of 4 bytes: two norms' inputs, and a mean and a deviation per token and norm; two masks of a byte.
    outside = 2 * (4 * STATES + 2 * 4 * 2 * 24) + 2 * STATES
    for sliced, whole in run_ranks(kept_with_and_without_slices, 2, False):
        assert whole - sliced == outside / 2
        # The estimate printed at the start leaves out means and deviations.
        for kept, slices in ((sliced, 2), (whole, 1)):
            expected = layer_bytes(small_config(), Load(2, 24), 24, Division(4, "reference", 2, slices))
            assert expected == pytest.approx(kept, rel=0.02)


def test_a_recomputed_layer_keeps_only_a_slice_of_its_input():
    for sliced, whole in run_ranks(kept_with_and_without_slices, 2, True):
        assert (sliced, whole) == (4 * STATES / 2, 4 * STATES)
