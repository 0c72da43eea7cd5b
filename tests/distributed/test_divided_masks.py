"""Causal and prefix masks where layers and the sequence are divided: nothing leaks, and the original is met."""

from __future__ import annotations

import pytest
import torch
from open_masks import MODELS, OPEN, SEGMENTS, build_model, dependence, sees
from ranks import run_ranks
from test_tensor_parallel import join, join_slices
from vectors import Vector, vector_folders

from deberta_xl.parallel.plan import divide
from deberta_xl.parallel.sequence import join_slices as join_sequence

WAYS = pytest.mark.parametrize("is_sliced", [False, True], ids=["whole", "sliced"])


EVERY_TIME = ["wide_convolution_in_groups", "own_decoder_of_states"]
"""Models with everything that reads a neighbour; the full tests have the rest."""


def dependences(mask: str, is_sliced: bool, names: list[str]) -> dict[str, torch.Tensor]:
    """By model, what each output of the divided model depends on."""
    groups, found = join(2), {}
    for name in names:
        model = build_model(**MODELS[name]).float()  # as the divided layers are
        divide(model, groups, sequence_parallel=is_sliced)
        whole = (lambda x: join_sequence(x, groups)) if is_sliced else (lambda x: x)
        found[name] = dependence(model, SEGMENTS, OPEN[mask], whole)
    return found


@WAYS
@pytest.mark.parametrize("mask", OPEN)
@pytest.mark.parametrize(
    "names", [EVERY_TIME, pytest.param(sorted(MODELS.keys() - set(EVERY_TIME)), marks=pytest.mark.full)],
    ids=["every_time", "others"],
)  # fmt: skip
def test_no_output_of_a_divided_model_depends_on_what_its_mask_hides(mask, is_sliced, names):
    expected, is_token = sees(SEGMENTS, OPEN[mask]), SEGMENTS > 0
    for found in run_ranks(dependences, 2, mask, is_sliced, names):
        for name, of_model in found.items():
            assert torch.equal((of_model > 0)[is_token], expected[is_token]), name


def divided_vector(folder: str, is_sliced: bool) -> tuple[list[torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
    """The last two states of the encoder, the loss of the vector's probe and its gradients, in float32."""
    vector, groups = Vector(folder, torch.float32), join(2)
    model, inputs = vector.model, vector.inputs
    divide(model, groups, sequence_parallel=is_sliced)
    mask = inputs["attention_mask"]
    scene = model.scene(inputs["input_ids"], mask, open_BS=torch.zeros_like(mask, dtype=torch.bool))
    states = [model.encode(inputs["input_ids"], scene)]
    states.append(model.encoder.layers[-1](states[0], scene))  # the decoder's, which is never sliced
    probe = ((states[-1] * mask.unsqueeze(-1)) ** 2).mean()
    probe.backward()
    gradients = {n: join_slices(model, n, groups) for n, p in model.named_parameters() if p.grad is not None}
    return [state.detach() for state in states], probe.detach(), gradients


@WAYS
@pytest.mark.parametrize("folder", vector_folders("encoder_mask3d"), ids=lambda folder: folder.name)
def test_the_originals_causal_states_and_gradients_are_those_of_two_ranks(folder, is_sliced):
    vector = Vector(folder)
    for states, probe, gradients in run_ranks(divided_vector, 2, folder, is_sliced):
        last = vector.config.num_layers - 1
        for number, state in zip((last - 1, last), states, strict=True):
            torch.testing.assert_close(state.double(), vector.outputs[f"hidden.{number}"], rtol=0, atol=1e-5)
        torch.testing.assert_close(probe.double(), vector.outputs["probe_loss"], rtol=1e-5, atol=0)
        assert vector.gradients.keys() <= gradients.keys()
        for name, expected in vector.gradients.items():
            torch.testing.assert_close(gradients[name].double(), expected, rtol=0, atol=1e-5, msg=name)
