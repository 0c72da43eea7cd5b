"""A model of one's own on the trunk: a head in a dozen lines, with the weights and names of every other model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deberta_xl.base.errors import ConfigError
from deberta_xl.model.dropout import DropoutKey
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.model.trunk import Trunk
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.native import fill_model

CONFIG = DebertaConfig(
    vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, position_buckets=8,
    max_position_embeddings=24, conv_kernel_size=3,
)  # fmt: skip


class Sentiment(Trunk):
    """The example of `Trunk`'s documentation."""

    def __init__(self, config: DebertaConfig, seed: int = 0):
        with torch.device("meta"):
            super().__init__(config)
            self.classifier = nn.Linear(config.hidden_size, 2)
        self.draw_weights(seed)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, dropout_key: DropoutKey | None = None
    ) -> Tensor:
        """Logits."""
        scene = self.scene(input_ids, attention_mask, dropout_key)
        return self.classifier(self.encode(input_ids, scene)[:, 0])


def test_a_model_of_ones_own_has_the_trunks_names_and_fresh_weights():
    own, pretraining = Sentiment(CONFIG, seed=3), MaskedLanguageModel(CONFIG, seed=3)
    shared = {name: p for name, p in pretraining.named_parameters() if not name.startswith("head.")}
    assert own.state_dict().keys() == shared.keys() | {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(own.get_parameter(name), parameter) for name, parameter in shared.items())
    assert own.classifier.weight.std() > 0
    with torch.device("meta"):
        assert {p.device.type for p in Sentiment(CONFIG).parameters()} == {"meta"}


class Prototypes(Trunk):
    """A head with parameters that are nobody's `weight` or `bias`, and a norm of another kind than ours."""

    def __init__(self, config: DebertaConfig, seed: int = 0):
        with torch.device("meta"):
            super().__init__(config)
            self.norm = nn.RMSNorm(config.hidden_size)
            self.prototypes = nn.Parameter(torch.empty(5, config.hidden_size))
            self.threshold = nn.Parameter(torch.empty(5))
        self.draw_weights(seed)


def test_what_a_head_has_begins_by_its_dimensions():
    model = Prototypes(CONFIG)
    assert model.prototypes.std().item() == pytest.approx(CONFIG.initializer_range, rel=0.3)
    assert torch.equal(model.norm.weight, torch.ones(CONFIG.hidden_size))
    assert not model.threshold.any()
    assert not torch.equal(model.prototypes, Prototypes(CONFIG, seed=1).prototypes)


class Weighted(Trunk):
    """A head with a buffer, which has its values from where it is made."""

    def __init__(self, config: DebertaConfig, *, is_lost: bool = False):
        with torch.device("meta"):
            super().__init__(config)
            self.classifier = nn.Linear(config.hidden_size, 2)
            if is_lost:
                self.register_buffer("class_weights", torch.tensor([1.0, 3.0]))
        if not is_lost:
            self.register_buffer("class_weights", torch.tensor([1.0, 3.0]))
        self.draw_weights(0)


def test_buffers_keep_their_values_and_one_that_has_lost_them_is_refused(tmp_path):
    model = Weighted(CONFIG)
    assert model.class_weights.tolist() == [1, 3]
    fill_model(model, dict(Weighted(CONFIG).named_parameters()), tmp_path, torch.float32)
    assert model.class_weights.tolist() == [1, 3]
    with pytest.raises(ConfigError, match="Weighted makes class_weights on the meta device"):
        Weighted(CONFIG, is_lost=True)
    with torch.device("meta"):  # as it is built to be counted
        Weighted(CONFIG, is_lost=True)


def test_a_model_of_ones_own_learns_with_keyed_masks_and_recomputed_layers():
    inputs = torch.randint(4, 60, (8, 24), generator=torch.Generator().manual_seed(0))
    labels = (inputs[:, 1] > 32).long()
    losses = {}
    for recomputes in (False, True):
        model = Sentiment(CONFIG, seed=3).train()
        if recomputes:
            model.checkpoint_activations()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses[recomputes] = []
        for step in range(12):
            loss = nn.functional.cross_entropy(model(inputs, dropout_key=DropoutKey(step)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[recomputes].append(loss.item())
    assert losses[True] == losses[False]
    assert losses[False][-1] < 0.5 * losses[False][0]


def test_recomputation_without_a_key_draws_the_masks_again_from_torchs_generator():
    inputs = torch.arange(4, 24)[None]
    gradients = []
    for recomputes in (False, True):
        model = Sentiment(CONFIG, seed=3).train()
        if recomputes:
            model.checkpoint_activations()
        torch.manual_seed(1)
        model(inputs).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
