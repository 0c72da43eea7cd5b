"""The contract is enough for a kernel of another kind, which is chosen by its name; and who is refused, and why."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deberta_xl.base.errors import ConfigError
from deberta_xl.kernels import reference, registry, strided
from deberta_xl.kernels.contract import Attend, Memory, RelativeRows, Where
from deberta_xl.kernels.dropout import DropoutRule
from deberta_xl.kernels.registry import KERNELS, Demand, Kernel, choose_kernel
from deberta_xl.kernels.relative_index import Buckets, log_bucket
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.platform import Platform

CONFIG = DebertaConfig(
    vocab_size=60, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48, position_buckets=8,
    max_position_embeddings=24, conv_kernel_size=3, attention_dropout=0,
)  # fmt: skip


def attention(query_BNSH: Tensor, memory: Memory, relative: RelativeRows, where: Where, dropout: DropoutRule) -> Tensor:
    """An invented kernel: document by document, with nothing dense over the pairs of a row, and no dropout."""
    assert where.mask_BST is None
    assert dropout.rate == 0
    context_BNSH = torch.zeros_like(query_BNSH)
    for row, segments in enumerate(where.segments_BT):
        for document in segments[segments > 0].unique():
            keys = (segments == document).nonzero().squeeze(-1)
            slots, positions = keys, keys
            if where.position_BM is not None:
                slots = torch.isin(where.position_BM[row], keys).nonzero().squeeze(-1)
                positions = where.position_BM[row, slots]
            rows = table_rows(positions, keys, where.buckets)
            context = attend_document(
                query_BNSH[row][:, slots],
                memory.key_BNTH[row][:, keys],
                memory.value_BNTH[row][:, keys],
                relative,
                rows,
            )
            context_BNSH = context_BNSH.index_put(
                (torch.tensor([row])[:, None], torch.arange(4)[:, None], slots), context
            )
    return context_BNSH


def table_rows(positions: Tensor, keys: Tensor, buckets: Buckets) -> Tensor:
    """Rows of the relative table for the pairs of a document."""
    offset = log_bucket(positions[:, None] - keys, buckets.position_buckets, buckets.reach)
    return (offset + buckets.span).clamp(0, 2 * buckets.span - 1)


def attend_document(query: Tensor, key: Tensor, value: Tensor, relative: RelativeRows, rows: Tensor) -> Tensor:
    """Eq. (4) by the definition of each term that is used."""
    terms = [torch.einsum("nsh,nth->nst", query, key)]
    if relative.key_NRH is not None:
        terms.append(torch.einsum("nsh,nsth->nst", query, relative.key_NRH[:, rows]))
    if relative.query_NRH is not None:
        terms.append(torch.einsum("nth,nsth->nst", key, relative.query_NRH[:, rows]))
    return (sum(terms) / math.sqrt(len(terms) * query.shape[-1])).softmax(-1) @ value


def refuses_wide_heads(demand: Demand) -> str | None:
    """The invented kernel's only limit."""
    size = demand.config.head_size
    return f"head_dim={size} is more than 16" if size > 16 else None


@pytest.fixture
def invented(monkeypatch) -> str:
    """The name of the invented kernel, which stands behind all others."""
    kernel = Kernel(__name__, refuses_wide_heads, lambda sizes: 0.0, lambda sizes: 0.0)
    monkeypatch.setitem(KERNELS, "by_document", kernel)
    return "by_document"


def train(kernel: str, config: DebertaConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of five steps on a packed row, and the last weights, in float64."""
    ids = torch.randint(4, 60, (2, 24), generator=torch.Generator().manual_seed(1))
    segments = torch.tensor([[1] * 24, [1] * 9 + [2] * 10 + [0] * 5])
    labels = torch.where((ids % 3 == 0) & (segments > 0), ids, 0)
    model = MaskedLanguageModel(config, seed=3).double().train()
    assert model.use_kernel(kernel) == kernel
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(5):
        loss = model(ids, segments, labels=labels, dropout_key=DropoutKey(step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize("share_att_key", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("terms", ["c2p|p2c", "c2p", "p2c", "none"])
def test_an_invented_kernel_is_chosen_by_its_name_and_trains_as_the_reference(invented, terms, share_att_key):
    config = replace(CONFIG, pos_att_type=terms, share_att_key=share_att_key)
    expected, expected_weights = train("reference", config)
    losses, weights = train(invented, config)
    assert losses == pytest.approx(expected, rel=1e-12)
    assert losses[-1] < losses[0]
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-10, atol=1e-12)


def test_auto_takes_the_first_kernel_that_supports_the_model(invented, monkeypatch):
    for platform in (Platform(), Platform("cpu", 8), Platform("cpu", 2), Platform("cuda", 8)):
        assert choose_kernel("auto", Demand(CONFIG, platform=platform)) == "strided"
    monkeypatch.setattr("deberta_xl.kernels.registry.KERNELS", {invented: KERNELS[invented]} | KERNELS)
    assert choose_kernel("auto", Demand(CONFIG)) == invented
    wide = DebertaConfig(vocab_size=60, hidden_size=64, num_heads=2)
    assert choose_kernel("auto", Demand(wide)) == "strided"


def refuses_halves(demand: Demand) -> str | None:
    """Of a kernel that has no numbers of 16 bits."""
    return "it has no numbers of 16 bits" if demand.platform.element_bytes == 2 else None


def test_a_model_that_is_moved_has_the_kernel_of_where_it_is_unless_one_was_chosen(invented, monkeypatch):
    monkeypatch.setitem(KERNELS, invented, KERNELS[invented]._replace(refusal=refuses_halves))
    monkeypatch.setattr("deberta_xl.kernels.registry.KERNELS", {invented: KERNELS[invented]} | KERNELS)
    model = MaskedLanguageModel(CONFIG)
    kept = MaskedLanguageModel(CONFIG)
    kept.use_kernel("reference")

    def found(model: MaskedLanguageModel) -> set[Attend]:
        return {layer.attention.attend for layer in model.encoder_layers.values()}

    assert found(model) == {attention}
    assert found(model.bfloat16()) == {strided.attention}
    assert found(model.double()) == {attention}
    assert found(kept.bfloat16()) == {reference.attention}
    with pytest.raises(ConfigError, match=r"model.kernel=by_document .* it has no numbers of 16 bits; choose"):
        kept.use_kernel(invented)
    assert kept.use_kernel(invented, platform=Platform("cpu", 4)) == invented


def test_an_unknown_kernel_and_one_that_cannot_are_refused_with_the_reason_and_those_that_can(invented):
    with pytest.raises(
        ConfigError, match=r"model.kernel='flash' is unknown; choose one of auto, fused, strided, reference, by_"
    ):
        choose_kernel("flash", Demand(CONFIG))
    wide = DebertaConfig(vocab_size=60, hidden_size=64, num_heads=2)
    words = r"model.kernel=by_document does not support this model: head_dim=32 is more than 16; choose .* auto, stri"
    with pytest.raises(ConfigError, match=words):
        choose_kernel(invented, Demand(wide))


def test_the_fused_kernels_are_autos_on_gpus_and_refuse_what_they_cannot(monkeypatch):
    gpu = Platform("cuda", 2)
    monkeypatch.setattr(registry, "has_triton", lambda: True)
    assert choose_kernel("auto", Demand(CONFIG, platform=gpu)) == "fused"
    refused = {
        "head_dim=130 is more than 128": (DebertaConfig(vocab_size=60, hidden_size=260, num_heads=2), gpu),
        "it computes on NVIDIA GPUs, this is a CPU": (CONFIG, Platform("cpu", 2)),
        "it has no numbers of 64 bits": (CONFIG, Platform("cuda", 8)),
    }
    for words, (config, platform) in refused.items():
        with pytest.raises(ConfigError, match=rf"fused does not support this model: {words}; choose one of auto, str"):
            choose_kernel("fused", Demand(config, platform=platform))
    monkeypatch.setattr(registry, "has_triton", lambda: False)
    with pytest.raises(ConfigError, match=r"Triton is not installed here .*; choose one of auto, strided, reference"):
        choose_kernel("fused", Demand(CONFIG, platform=gpu))
    assert choose_kernel("auto", Demand(CONFIG, platform=gpu)) == "strided"


def test_a_kernel_refuses_the_masks_it_does_not_know(invented, monkeypatch):
    def knows_no_order(demand: Demand) -> str | None:
        return f"it has no {demand.mask} mask" if demand.mask != "bidirectional" else None

    monkeypatch.setitem(KERNELS, invented, KERNELS[invented]._replace(refusal=knows_no_order))
    model = MaskedLanguageModel(CONFIG)
    assert model.use_kernel(invented) == invented
    with pytest.raises(
        ConfigError, match=r"model.kernel=by_document .* it has no prefix mask; choose one of auto, str"
    ):
        model.use_kernel(invented, "prefix")
    assert model.use_kernel("auto", "causal") == "strided"


def test_what_the_reference_needs_dense_is_made_once_for_all_layers():
    model = MaskedLanguageModel(CONFIG).eval()
    seen = []

    def remember(query: Tensor, memory: Memory, relative: RelativeRows, where: Where, dropout: DropoutRule) -> Tensor:
        assert ("blocked_BST" in vars(where)) == any(where is other for other in seen)
        seen.append(where)
        return reference.attention(query, memory, relative, where, dropout)

    for layer in model.encoder.layers:
        layer.attention.attend = remember
    ids = torch.arange(4, 24)[None]
    model(ids, labels=torch.where(ids % 3 == 0, ids, 0))
    # Two ordinary layers share one; the two passes of the enhanced mask decoder, with their own queries, another.
    assert len(seen) == 4
    assert seen[0] is seen[1]
    assert seen[2] is seen[3]
    assert seen[1] is not seen[2]


def test_chosen_queries_see_what_they_saw_among_all():
    segments = torch.tensor([[1, 1, 2, 2, 2, 0]])
    position = torch.tensor([[4, 1]])
    mask = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    open_keys = torch.tensor([[1, 0, 1, 0, 0, 0]]).bool()
    for where in (
        Where(segments, Buckets(4, 6)),
        Where(segments, Buckets(0, 6), mask),
        Where(segments, Buckets(4, 6), open_BT=open_keys),
    ):
        chosen = where.of_queries(position)
        assert torch.equal(chosen.blocked_BST, where.blocked_BST[:, position[0]])
        assert torch.equal(chosen.delta, where.delta[position])
