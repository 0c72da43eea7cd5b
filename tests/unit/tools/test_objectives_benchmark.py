"""benchmarks/objectives.py: equal compute is equal, settings of all objectives hold, the table tells what was found."""

from __future__ import annotations

import json

import pytest

from benchmarks import objectives
from deberta_xl.base.errors import UserError


@pytest.fixture
def arguments(small_dataset, tmp_path):
    """A comparison whose datasets are there."""
    (tmp_path / "data").symlink_to(small_dataset.train.parent)
    given = ["--text", "a.txt", "--held_out", "b.txt", "--data", str(tmp_path), "--output", str(tmp_path)]
    return objectives.parse_arguments([*given, "--tasks", "trec", "sick", "--steps", "600"])


def test_every_objective_gets_the_same_operations(arguments):
    shares = objectives.share_out(arguments)
    assert list(shares) == list(objectives.OBJECTIVES)
    budget = 600 * shares["masked_lm"].step_flops
    for share in shares.values():
        assert share.steps * share.step_flops == pytest.approx(budget, abs=share.step_flops / 2)
    assert shares["masked_lm"].steps == 600
    assert shares["rtd_gdes"].steps == shares["rtd_es"].steps < 600  # there is a generator, too
    assert shares["causal"].steps < shares["mixed"].steps < 600  # predicts every token, or half the time
    assert shares["masked_lm_plain"].steps < 600  # all tokens go through the last layer, not the masked ones alone


def test_the_table_has_means_and_spreads_of_what_the_runs_found(arguments):
    shares = {"masked_lm": objectives.Pretraining(600, 2e10), "causal": objectives.Pretraining(500, 2.4e10)}
    arguments.objectives = list(shares)
    for name in objectives.encoders_of(arguments):
        for seed in arguments.seeds:
            for task, metrics in (("trec", {"valid": {"accuracy": 0.5 + seed / 10}}), ("sick", {"test": {"f1": 0.25}})):
                folder = objectives.run_folder(arguments, name, seed, task)
                folder.mkdir(parents=True)
                (folder / "results.json").write_text(json.dumps({"metrics": metrics}))
    for seed in arguments.seeds:
        folder = objectives.run_folder(arguments, "causal", seed)
        folder.mkdir(parents=True)
        (folder / "perplexity.json").write_text(json.dumps({"perplexity": 40 + seed}))
    header, _, fresh, masked, causal = objectives.table(arguments, shares).splitlines()
    assert header == (
        "| objective | steps | 10^12 operations | trec (accuracy, valid) | sick (f1, test) | perplexity |"
    )
    assert fresh == "| no pretraining | 0 | 0.0 | 0.650 ± 0.071 | 0.250 ± 0.000 | – |"
    assert masked == "| masked LM with EMD | 600 | 12.0 | 0.650 ± 0.071 | 0.250 ± 0.000 | – |"
    assert causal == "| causal | 500 | 12.0 | – | – | 41.5 ± 0.7 |"  # asked for another task than the encoders


def test_runs_of_another_budget_are_not_mixed_in(tmp_path):
    (tmp_path / "config.toml").write_text("[train]\nsteps = 70\n")
    with pytest.raises(UserError, match="has made 70 steps, now it should be 80"):
        objectives.check_steps(tmp_path, 80)
