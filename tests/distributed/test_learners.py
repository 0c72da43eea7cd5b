"""An update of one learner leaves the other's weights, moments and counts alone, whatever engine holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import Case, Layout, Run
from plain_run import ROWS, architecture
from ranks import run_ranks
from small_dataset import SmallDataset
from torch import Tensor

from deberta_xl.checkpoint.fragments import (
    adam_steps,
    canonical_parameters,
    create_adam_state,
    engine_fragments,
    fragment_values,
)
from deberta_xl.checkpoint.rank_file import KINDS
from deberta_xl.objectives.objective import Mean
from deberta_xl.training.step import even_shares, micro_batch_keys

CASES = {
    "ZeRO-1": Case(1, 2),
    "ZeRO-2": Case(2, 2),
    "ZeRO-3": Case(3, 2),
    "bf16": Case(2, 2, precision="bf16"),
    "bf16 with float32 sums": Case(1, 2, precision="bf16_fp32_sums"),
    "bf16 with float32 sums at once": Case(1, 2, precision="bf16_fp32_sums_at_once"),
    "fp16": Case(2, 2, precision="fp16"),
    "ZeRO-3 offloaded": Case(3, 2, offload=True),
    "ZeRO-2 offloaded": Case(2, 2, offload=True),
    "without bias correction": Case(1, 2, bias_correction=False),
}
EVERY_TIME = ("ZeRO-3",)


def state(run: Run) -> dict[str, dict[str, Tensor]]:
    """Learner -> name and kind of every tensor of this rank's part of the state -> a copy."""
    create_adam_state(run.engine)
    found: dict[str, dict[str, Tensor]] = {"generator": {}, "discriminator": {}}
    fragments = engine_fragments(run.engine, canonical_parameters(run.engine))
    for kind in KINDS:
        for piece, values in fragment_values(run.engine, fragments, kind):
            found[piece.name.partition(".")[0]][f"{piece.name} {kind}"] = values.clone()
    return found


def is_alike(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether nothing has changed."""
    return all(torch.equal(before[name], after[name]) for name in before)


def update_in_turns(dataset: SmallDataset, folder: Path, case: Case) -> None:
    """Generator, discriminator, discriminator, generator."""
    case = case._replace(objective="replaced_tokens")
    words = ["optimizer.learning_rate=0"]
    run = Run(dataset, folder, Layout(data=2), case, architecture(dataset.tokenizer.vocab_size), 8, words)
    training, objective = run.training, run.training.objective
    training.begin()
    training.is_finite = True
    batches = next(objective.batches(1, 0, rank=run.grid.data_parallel_rank, size=2))
    shares = even_shares({"labels": 20, "tokens": 40 * ROWS}, len(batches), 2)
    keys = micro_batch_keys(1, 1, len(batches), run.grid)
    losses = {
        "generator": lambda model, batch, shares, key: {
            "loss": model("propose", **objective.given(batch, shares, key)).loss
        },
        "discriminator": lambda model, batch, shares, key: {
            "loss": objective.losses(model, batch, shares, key)["loss"]
        },
    }
    norms, steps = {}, {"generator": 0, "discriminator": 0}
    for learner in ("generator", "discriminator", "discriminator", "generator"):
        other = "generator" if learner == "discriminator" else "discriminator"
        before = state(run)
        training.update(losses[learner], batches, shares, keys, learner=learner, reports={"loss": Mean("labels")})
        after = state(run)
        steps[learner] += 1
        assert is_alike(before[other], after[other]), f"{other} changed with {learner}"
        assert not is_alike(before[learner], after[learner]), f"{learner} did not change"
        assert adam_steps(run.engine) == steps
        norms.setdefault(learner, []).append(float(training.recorder.norms[f"{learner}_grad_norm"]))
    # At a rate of 0 only moments move, so a gradient comes again as it was, whatever the buffers held in between.
    for first, second in norms.values():
        assert second == pytest.approx(first, rel=1e-6)
    training.heartbeat.close()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERY_TIME else pytest.mark.full) for name in CASES]
)
def test_learners_take_turns(small_dataset, tmp_path, name):
    run_ranks(update_in_turns, 2, small_dataset, tmp_path / "run", CASES[name], timeout=120)
