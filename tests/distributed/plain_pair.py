"""Replaced token detection in plain PyTorch: two models, two optimizers, a loop; nothing of engine or objective.

Only the data, the models and the rule by which tokens are drawn are the package's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deberta_xl.data.loader import PretrainingData
from deberta_xl.data.random_numbers import derive
from deberta_xl.data.token_store import TokenStore
from deberta_xl.kernels.sampling import DrawRule
from deberta_xl.model.masked_lm import LabelledPositions
from deberta_xl.model.replaced_tokens import ReplacedTokenModel
from deberta_xl.objectives.replaced_tokens import DRAWS
from deberta_xl.settings.objectives import generator_architecture
from deberta_xl.settings.presets import load_run_config
from deberta_xl.settings.pretraining import RunConfig


def adam(model: nn.Module, config: RunConfig, rate: float) -> torch.optim.AdamW:
    """AdamW, which lets matrices and tables decay."""
    decays = [p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]
    section = config.optimizer
    groups = [{"params": p, "weight_decay": d} for p, d in zip(decays, (section.weight_decay, 0.0), strict=True)]
    return torch.optim.AdamW(groups, lr=rate, betas=(section.beta1, section.beta2), eps=section.epsilon)


def corrupt(labels_BS: Tensor, ids_BS: Tensor, drawn_L: Tensor) -> Tensor:
    """The text with the drawn tokens at its labelled places."""
    corrupted_BS = ids_BS.clone()
    corrupted_BS[labels_BS > 0] = drawn_L
    return corrupted_BS


def plain_losses(config_file: Path, *, is_decoupled: bool) -> list[list[float]]:
    """Of each step: generator's and discriminator's loss; gradient norms of both (decoupled), before clipping."""
    config = load_run_config(config_file)
    train, weight = config.train, config.replaced_tokens.weight
    store = TokenStore(config.data.train)
    tokenizer = store.tokenizer()
    data = PretrainingData(store, tokenizer, config.data, config.model.sequence_length, train.seed)
    architecture = config.model.architecture(tokenizer.vocab_size)
    model = ReplacedTokenModel(architecture, generator_architecture(architecture, config.generator), seed=train.seed)
    rates = config.generator.learning_rate, config.optimizer.learning_rate
    optimizers = [
        adam(part, config, rate) for part, rate in zip((model.generator, model.discriminator), rates, strict=True)
    ]
    found = []
    for step in range(1, train.steps + 1):
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, step / config.schedule.warmup_steps)
        starts = range((step - 1) * train.global_batch_size, step * train.global_batch_size, train.micro_batch_size)
        batches = [tuple(map(torch.from_numpy, data.batch(start, train.micro_batch_size))) for start in starts]
        num_labels = sum(int((labels > 0).sum()) for _, _, labels in batches)
        num_tokens = sum(int((segments > 0).sum()) for _, segments, _ in batches)
        generator_loss, discriminator_loss, corrupted = 0.0, 0.0, []
        for number, (ids, segments, labels) in enumerate(batches):
            start = (step - 1) * train.global_batch_size + number * train.micro_batch_size
            keys = derive(data.keys(train.seed, start, train.micro_batch_size), DRAWS)
            rule = DrawRule(torch.from_numpy((keys >> np.uint64(1)).astype(np.int64)))
            output = model.generator(ids, segments, labels=LabelledPositions.of(labels), label_count=1.0, draw=rule)
            (output.loss / num_labels).backward()
            generator_loss += output.loss.item() / num_labels
            corrupted.append(corrupt(labels, ids, output.drawn_L))
        norms = []
        if is_decoupled:
            norms.append(float(nn.utils.clip_grad_norm_(model.generator.parameters(), train.max_grad_norm)))
            optimizers[0].step()
            optimizers[0].zero_grad()
        for (ids, segments, labels), text in zip(batches, corrupted, strict=True):
            original = torch.where(labels > 0, labels, ids)
            is_token = segments > 0
            logits = model.discriminator(text, segments)[is_token]
            loss = F.binary_cross_entropy_with_logits(logits, (text != original)[is_token].float(), reduction="sum")
            (weight * loss / num_tokens).backward()
            discriminator_loss += loss.item() / num_tokens
        if is_decoupled:
            norms.append(float(nn.utils.clip_grad_norm_(model.discriminator.parameters(), train.max_grad_norm)))
            optimizers[1].step()
        else:
            nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
        model.zero_grad()
        found.append([generator_loss, discriminator_loss, *norms])
    return found
