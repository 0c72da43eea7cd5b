"""Our model against the original code's outputs: every stated activation, the loss, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vectors import Vector, vector_folders

from deberta_xl.kernels import reference
from deberta_xl.kernels.contract import Memory
from deberta_xl.kernels.relative_index import log_bucket
from deberta_xl.model.embeddings import position_ids

# float64: the original's own rounding, 1e-13, with room for another order of summation.
# float32: the original's float32 run differs from its float64 run by up to 9e-5 (activations), 4.5e-5 (gradients).
TOLERANCES = {torch.float64: (1e-10, 1e-10), torch.float32: (2e-4, 1e-4)}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    """Largest absolute difference at most `tolerance`."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    difference = (actual.double() - expected).abs().max().item()
    assert difference <= tolerance, f"{what}: differs by {difference:.2e}, allowed {tolerance:.0e}"


def assert_gradients(vector: Vector, tolerance: float) -> None:
    """Every gradient equals the original's; parameters the original left without one have none here."""
    for name, parameter in vector.model.named_parameters():
        if name in vector.gradients:
            assert_close(parameter.grad, vector.gradients[name], tolerance, f"gradient of {name}")
        else:
            assert parameter.grad is None or not parameter.grad.any(), f"{name} has a gradient, the original has none"


def capture_first_layer(vector: Vector) -> dict[str, torch.Tensor]:
    """Fills in, during the next forward, the first layer's attention probabilities and its context."""
    seen: dict[str, torch.Tensor] = {}
    attention = vector.model.encoder.layers[0].attention
    attention.out_proj.register_forward_hook(lambda _module, inputs, _output: seen.update(context=inputs[0]))

    def attend(query: torch.Tensor, memory: Memory, *others: Any) -> torch.Tensor:
        # The context of values that are the unit vectors is the probabilities.
        unit = torch.eye(memory.key_BNTH.shape[2], dtype=query.dtype).expand(*memory.key_BNTH.shape[:2], -1, -1)
        seen["attention_probs"] = reference.attention(query, memory._replace(value_BNTH=unit), *others)
        return reference.attention(query, memory, *others)

    attention.attend = attend
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("folder", vector_folders("mlm_emd"), ids=lambda folder: folder.name)
def test_masked_lm_gives_the_originals_outputs_and_gradients(folder, dtype):
    vector = Vector(folder, dtype)
    activations, gradients = TOLERANCES[dtype]
    seen = capture_first_layer(vector)
    inputs, expected = vector.inputs, vector.outputs
    output = vector.model(
        inputs["input_ids"], inputs["attention_mask"], inputs.get("token_type_ids"), labels=inputs["labels"],
        output_hidden_states=True,
    )  # fmt: skip
    output.loss.backward()
    assert_close(output.loss, expected["loss"], activations, "loss")
    assert_close(output.logits, expected["logits"], activations, "logits")
    labels = expected["target_labels"]
    per_token = torch.nn.functional.cross_entropy(output.logits, labels, reduction="none")
    assert_close(per_token, expected["loss_per_token"], activations, "loss per token")
    assert torch.equal(output.guess_L, expected["logits"].argmax(-1))
    for number, state in enumerate(output.hidden_states):
        name = f"hidden.{number - 1}" if number else "embeddings"
        assert_close(state, expected[name], activations, name)
    assert_close(vector.model.encoder.relative_position(), expected["rel_embeddings_after_norm"], activations, "table")
    for name in ("attention_probs", "context"):
        assert_close(seen[name], expected[f"layer0.{name}"], activations, f"layer0.{name}")
    assert_gradients(vector, gradients)


@pytest.mark.parametrize("folder", vector_folders("mlm_emd"), ids=lambda folder: folder.name)
def test_skipping_the_last_ordinary_pass_and_recomputing_changes_no_gradient(folder):
    vector = Vector(folder)
    vector.model.checkpoint_activations()
    inputs = vector.inputs
    mask, types = inputs["attention_mask"], inputs.get("token_type_ids")
    vector.model(inputs["input_ids"], mask, types, labels=inputs["labels"]).loss.backward()
    assert_gradients(vector, 1e-10)


@pytest.mark.parametrize("folder", vector_folders("mlm_emd"), ids=lambda folder: folder.name)
def test_decoding_every_position_agrees_with_decoding_the_labelled_ones(folder):
    vector = Vector(folder)
    inputs = vector.inputs
    with torch.no_grad():
        output = vector.model(inputs["input_ids"], inputs["attention_mask"], inputs.get("token_type_ids"))
    assert output.loss is None
    assert_close(output.logits[inputs["labels"] > 0], vector.outputs["logits"], 1e-10, "logits")


@pytest.mark.parametrize("folder", vector_folders("mlm_emd"), ids=lambda folder: folder.name)
def test_each_pass_of_the_enhanced_mask_decoder_gives_the_originals_states(folder):
    vector = Vector(folder)
    if vector.config.position_biased_input:
        pytest.skip("there is no enhanced mask decoder with absolute positions in the input")
    passes = []
    layer = vector.model.encoder.layers[-1]
    layer.feed_forward_norm.register_forward_hook(lambda _m, _a, output: passes.append(output))
    inputs = vector.inputs
    with torch.no_grad():
        labelled = inputs["labels"] > 0
        vector.model(inputs["input_ids"], inputs["attention_mask"], inputs.get("token_type_ids"))
    assert len(passes) == 2
    for number, state in enumerate(passes):
        assert_close(state[labelled], vector.outputs[f"emd.{number}"], 1e-10, f"emd.{number}")
    positions = vector.model.embeddings.position(position_ids(inputs["attention_mask"]))
    is_token = inputs["attention_mask"] > 0
    assert_close(positions[is_token], vector.outputs["position_embeddings"][is_token], 0.0, "position embeddings")


@pytest.mark.parametrize("form", ["pairs", "open"])
@pytest.mark.parametrize("folder", vector_folders("encoder_mask3d"), ids=lambda folder: folder.name)
def test_a_causal_mask_gives_the_originals_states_and_gradients_in_both_forms(folder, form):
    vector = Vector(folder)
    inputs = vector.inputs
    mask = inputs["attention_mask_3d" if form == "pairs" else "attention_mask"]
    states = vector.model(
        inputs["input_ids"], mask, labels=torch.zeros_like(inputs["input_ids"]), output_hidden_states=True,
        open_BS=None if form == "pairs" else torch.zeros_like(mask, dtype=torch.bool),
    ).hidden_states[1:]  # fmt: skip
    for number, state in enumerate(states):
        assert_close(state, vector.outputs[f"hidden.{number}"], 1e-10, f"hidden.{number}")
    probe = ((states[-1] * inputs["attention_mask"].unsqueeze(-1)) ** 2).mean()
    assert_close(probe, vector.outputs["probe_loss"], 1e-10, "probe loss")
    probe.backward()
    assert_gradients(vector, 1e-10)


@pytest.mark.parametrize("folder", vector_folders("log_bucket"), ids=lambda folder: folder.name)
def test_buckets_are_the_originals(folder):
    tensors = load_file(folder / "outputs.safetensors")
    combinations = [name.removesuffix(".rel") for name in tensors if name.endswith(".rel")]
    assert combinations
    for name in combinations:
        buckets, reach = (int(part[1:]) for part in name.split("_"))
        assert torch.equal(log_bucket(tensors[f"{name}.rel"], buckets, reach), tensors[f"{name}.bucket"]), name
