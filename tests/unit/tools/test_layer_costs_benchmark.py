"""benchmarks/layer_costs.py: what a layer launches, moves and keeps on a GPU, counted without one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from benchmarks import layer_costs
from benchmarks.recorder import Launch, Recorder, counted_bytes, pretended_gpu

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")
UNIT = {"base": 8 * 512 * 768 * 2, "xxlarge": 8 * 512 * 1536 * 2}
"""Bytes of the states of 8 rows of 512 tokens, bfloat16."""


def launches_of(run) -> list[Launch]:
    """What a function launches, on a GPU that is pretended."""
    recorder = Recorder()
    with torch.device("meta"), pretended_gpu(recorder):
        run()
    return recorder.launches


@needs_triton
@pytest.mark.parametrize("preset", UNIT)
def test_a_layer_launches_moves_and_keeps_no_more_than_this_without_the_attention_kernel(preset):
    _, layer = layer_costs.count_layer(preset, 8, 512, layer_costs.no_attention)
    # Forward: eight products (query, key, value, two of the relative table, output, up, down), that table's dropout,
    # GELU, and what closes either half.
    assert len(layer.forward) == 8 + 1 + 1 + 2
    # Backward: two products and a bias each; the dropout and GELU; norm and dropout of either half; sums of gradients,
    # of what is read twice or more: by query, key, value and residual 3, by a residual 1, the table 1, by all layers 1,
    # weight and bias of query and key 4.
    assert len(layer.backward) == 8 * 3 + 1 + 1 + 2 * 2 + 10
    states = UNIT[preset]
    moved = [sum(launch.moved_bytes for launch in launches if not launch.operations) / states for launches in layer[:2]]
    # In states: GELU reads 4 and writes 4, each end of a half reads 2 and writes 2.
    assert moved[0] == pytest.approx(8 + 2 * 4, rel=0.03)
    # GELU's gradient 12; biases 1 each, up's 4; each norm 3, each dropout 2; sums of states' gradients 4 · 3; the rest
    # are the dropout and sums of the table, which has an eighth of the rows, and the sums of two weights' gradients.
    assert moved[1] == pytest.approx(12 + 5 + 4 + 6 + 4 + 12, rel=0.09)
    # Query, key, value, context, two sums and what they become, the inner states before and after GELU; and of the
    # table, with an eighth of the rows, what dropout leaves and two projections.
    assert layer.kept_bytes / states == pytest.approx(4 + 4 + 8 + 3 / 8, rel=0.01)


def test_a_view_is_no_launch_and_what_is_expanded_is_as_small_as_it_is():
    def run() -> None:
        x = torch.ones(4, 1)
        (x.expand(4, 100) + x.view(1, 4).unsqueeze(-1)[0]).mul_(2)

    fill, add, mul = launches_of(run)
    assert [fill.name, add.name, mul.name] == ["ones", "add", "mul_"]
    assert add.moved_bytes == 4 * (4 + 4 + 400)
    assert mul.moved_bytes == 4 * (400 + 400)


def test_products_have_their_operations_and_look_ups_read_what_they_give():
    def run() -> None:
        nn.functional.embedding(torch.zeros(3, dtype=torch.int64), torch.zeros(1000, 5)) @ torch.zeros(5, 7)

    look_up, product = (launch for launch in launches_of(run) if launch.name in ("embedding", "mm"))
    assert look_up.moved_bytes == 4 * (15 + 15) + 8 * 3
    assert product.operations == 2 * 3 * 5 * 7


@needs_triton
def test_a_kernel_of_tritons_is_counted_and_not_launched():
    from deberta_xl.kernels.dropout import DropoutRule, drop

    drawn, dropped = launches_of(lambda: drop(torch.zeros(3, 8), DropoutRule(0.1, 5)))
    assert dropped == Launch("drop_kernel", 2 * drawn.moved_bytes, 0)
    assert not torch.empty(0, device="meta").is_cuda


def look() -> None:
    """Waits for the device."""
    torch.zeros(3).sum().item()


def mix() -> None:
    """A tensor that has stayed on the host."""
    torch.zeros(3) + torch.zeros(3, device="cpu")


@pytest.mark.parametrize(
    ("run", "message"), [(look, "cannot be called on meta tensors"), (mix, "is not on the expected device meta")]
)
def test_a_look_at_numbers_and_a_tensor_of_the_host_raise(run, message):
    with pytest.raises(RuntimeError, match=message):
        launches_of(run)


def test_what_autograd_keeps_is_counted_once_and_without_weights():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    x = torch.zeros(2, 6)
    with counted_bytes(model) as counter:
        loss = model(x).sum() + model(x).sum()
        assert counter.now == counter.peak == 4 * (2 * 6 + 2 * 2 * 6)
        loss.backward()
    assert counter.now == 0


@needs_triton
def test_the_table_tells_costs_and_an_estimate(capsys):
    layer_costs.main(["--presets", "base", "--rows", "1", "--operators"])
    told = capsys.readouterr().out
    assert "base, 1 x 512, kernel: without: keeps" in told
    assert "  forward    12 launches,   8 of them matrix products" in told
    assert "add_norm_kernel" in told
    assert "of the peak" in told
