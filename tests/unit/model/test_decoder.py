"""The decoder in its general form (arXiv 2006.03654, section 3.2): BERT's is one of its forms; each is a few lines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.masked_lm import LabelledPositions, MaskedLanguageModel
from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import forward_flops, masked_lm_parts, num_parameters
from deberta_xl.model.task_model import TaskModel
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig

CONFIG = DebertaConfig(
    vocab_size=97, hidden_size=24, num_layers=3, num_heads=3, intermediate_size=40, position_buckets=8,
    max_position_embeddings=20, conv_kernel_size=3,
)  # fmt: skip
FORMS = {
    "as released": {},
    "no decoder": {"decoder_passes": 0},
    "one pass": {"decoder_passes": 1},
    "three passes over the states": {"decoder_passes": 3, "decoder_input": "states"},
    "two layers of its own": {"decoder_weights": "own"},
    "one layer of its own over the states": {"decoder_passes": 1, "decoder_weights": "own", "decoder_input": "states"},
    "p2c with its own projections": {"pos_att_type": "p2c", "share_att_key": False},
    "no positions at all": {"pos_att_type": "none", "share_att_key": False, "decoder_passes": 0},
}
IDS = torch.arange(2 * 20).view(2, 20) % 90 + 4
SEGMENTS = torch.tensor([[1] * 20, [1] * 8 + [2] * 7 + [0] * 5])
LABELS = torch.where((torch.arange(20) % 3 == 1) & (SEGMENTS > 0), IDS, 0)


def build(**form: object) -> MaskedLanguageModel:
    """In float64, and without randomness."""
    return MaskedLanguageModel(replace(CONFIG, **form)).double().eval()


def outcome(model: MaskedLanguageModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    loss = model(IDS, SEGMENTS, labels=LABELS).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_one_pass_over_the_last_states_is_berts_decoding_the_plain_encoder_with_all_its_layers():
    plain, one = build(decoder_passes=0), build(decoder_passes=1, decoder_input="states")
    assert plain.state_dict().keys() == one.state_dict().keys()
    assert torch.equal(plain(IDS, SEGMENTS).logits, one(IDS, SEGMENTS).logits)
    (loss, gradients), (same_loss, same_gradients) = outcome(plain), outcome(one)
    # The pass is over the labelled positions alone: sums of fewer rows, in another order.
    assert same_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert all((gradients[n] - same_gradients[n]).abs().max() < 1e-12 for n in gradients)
    released, _ = outcome(build())
    assert abs(released.item() - loss.item()) > 1e-4


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_form_is_what_the_paper_says_of_it(form):
    """H from all layers but the one that decodes, I from it, then n layers that attend to H."""
    model, config = build(**form), replace(CONFIG, **form)
    scene = model.scene(IDS, SEGMENTS)
    is_own = bool(config.num_own_decoder_layers)
    below = 3 if is_own or not config.num_decoder_passes else 2
    (hidden,) = model.encoder(model.embed(IDS, scene), scene, numbers=range(below))
    state = hidden + model.embeddings.positions(SEGMENTS) if config.decodes_positions else hidden
    for number in range(config.num_decoder_passes):
        layer = model.decoder.layers[number] if is_own else model.encoder.layers[2]
        state = layer.refine(state, layer.attention.memorize(hidden), scene)
    expected = model.head(state, model.embeddings.word)
    assert torch.equal(model(IDS, SEGMENTS).logits, expected)
    at_labels = model(IDS, SEGMENTS, labels=LABELS).logits
    assert (at_labels - expected[LABELS > 0]).abs().max() < 1e-12


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_no_parameter_is_dead(form):
    _, gradients = outcome(build(**form))
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    assert ("embeddings.position.weight" in gradients) == replace(CONFIG, **form).decodes_positions


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_its_parameters_and_operations_are_counted(form):
    config = replace(CONFIG, vocab_size=128, **form)  # columns of a block, none of which is padding
    model = MaskedLanguageModel(config).eval()
    assert num_parameters(masked_lm_parts(config)) == sum(p.numel() for p in model.parameters())
    model.use_kernel("reference")  # which makes the products of the definition
    labels = torch.zeros_like(IDS)
    labels[:, :6] = IDS[:, :6]
    with FlopCounterMode(display=False) as counter:
        model(IDS, labels=LabelledPositions.of(labels))
    # A shared layer projects key-side positions in each pass (their dropout differs); the definition counts them once.
    again = config.num_decoder_passes - 1 if config.shares_last_layer else 0
    again *= 2 * IDS.numel() * 2 * config.relative_span * config.attention_size
    assert forward_flops(masked_lm_parts(config), Load(2, 20, 12)) == counter.get_total_flops() - again


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_recomputing_changes_no_gradient_and_each_pass_has_masks_of_its_own(form):
    model = MaskedLanguageModel(replace(CONFIG, **form))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(IDS, SEGMENTS, labels=LABELS, dropout_key=DropoutKey(3)).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    inputs: list[torch.Tensor] = []
    for layer in model.encoder_layers.values():
        layer.attention.relative_dropout.register_forward_hook(lambda _m, _a, output: inputs.append(output == 0))
    expected = gradients()
    assert all(not torch.equal(a, b) for n, a in enumerate(inputs) for b in inputs[:n])
    model.checkpoint_activations()
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(), strict=True))


def test_a_models_kernel_is_that_of_the_decoders_layers_too(monkeypatch):
    model = build(decoder_weights="own")
    chosen = object()
    monkeypatch.setattr("deberta_xl.model.trunk.load_kernel", lambda _name: chosen)
    model.use_kernel("reference")
    assert all(layer.attention.attend is chosen for layer in (*model.encoder.layers, *model.decoder.layers))


def test_a_tasks_model_has_neither_the_decoders_layers_nor_its_positions():
    task = TaskModel(replace(CONFIG, decoder_weights="own"), HeadConfig(kind="token", num_labels=2))
    names = {name.partition(".")[0] for name, _ in task.named_parameters()}
    assert names == {"embeddings", "encoder", "classifier"}
    assert task.embeddings.position is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"position_biased_input": True, "decoder_passes": 1}, "decoder_passes=1 with position_biased_input=true"),
        ({"position_biased_input": True, "decoder_weights": "own"}, "decoder_weights=own, but there is no decoder"),
        ({"decoder_passes": 0, "decoder_weights": "own"}, "decoder_weights=own.*decoder_passes to 1 or more"),
        ({"decoder_passes": 0, "decoder_input": "states"}, "decoder_input=states, but there is no decoder"),
        ({"decoder_passes": -1}, "decoder_passes=-1"),
        ({"num_layers": 1}, "num_layers=1.*decoder_passes=0"),
        ({"embedding_size": 12}, "embedding_size=12 differs.*decoder adds position vectors"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        replace(CONFIG, **values)


def test_what_needs_no_layer_below_and_no_positions_may_do_without():
    assert not build(num_layers=1, decoder_passes=0)(IDS).logits.isnan().any()
    assert not build(num_layers=1, decoder_weights="own")(IDS).logits.isnan().any()
    narrow = build(embedding_size=12, decoder_input="states")
    assert narrow(IDS).logits.shape == (2, 20, 97)
