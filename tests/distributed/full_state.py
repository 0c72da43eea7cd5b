"""The whole state of training: weights and moments of every parameter, from a checkpoint or as DeepSpeed tells them."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from deberta_xl.checkpoint.rank_file import KINDS, Piece, fill, read_indices

FullState = dict[str, dict[str, Tensor]]
"""Kind → name → whole tensor."""


def reported_state(engine: deepspeed.DeepSpeedEngine) -> FullState:
    """The optimizer's state through DeepSpeed's public accessors, an implementation that is not ours."""
    state = {kind: {} for kind in KINDS}
    for name, parameter in engine.module.named_parameters():
        for kind in KINDS:
            full = safe_get_full_fp32_param(parameter)
            if kind != "master":
                full = safe_get_full_optimizer_state(parameter, kind)
            state[kind][name] = full.detach().clone().view(getattr(parameter, "ds_shape", parameter.shape))
    return state


def full_state(folder: Path) -> FullState:
    """Everything in a checkpoint, put together."""
    stored = read_indices(sorted(folder.glob("rank-*.safetensors")))
    state = {}
    for kind in KINDS:
        state[kind] = {name: torch.full(shape, torch.nan) for name, shape in stored.logical_shapes.items()}
        whole = [(Piece(name, tuple(t.shape), 0, t.numel()), t.view(-1)) for name, t in state[kind].items()]
        fill(whole, stored, kind)
    return state


def assert_bitwise_equal(actual: FullState, expected: FullState) -> None:
    """Every tensor of every kind is the same, bit for bit."""
    for kind in KINDS:
        assert actual[kind].keys() == expected[kind].keys()
        for name, tensor in expected[kind].items():
            assert torch.equal(actual[kind][name], tensor), f"{kind} of {name}"
