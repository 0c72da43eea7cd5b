"""benchmarks/ablations.py: each variation is a model without a piece of it, and the table tells what was found."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from benchmarks import ablations
from deberta_xl.base.errors import UserError
from deberta_xl.commands.pretraining import parse_arguments, read_inputs


@pytest.fixture
def arguments(small_dataset, tmp_path) -> Namespace:
    """A comparison on datasets of one's own."""
    given = ["--train", small_dataset.train, "--valid", small_dataset.valid, "--output", tmp_path, "--steps", "20"]
    found = ablations.parse_arguments([*map(str, given), "--variations", "full", "no_emd_c2p"])
    ablations.check_arguments(found)
    return found


def test_a_variation_lacks_what_it_says_and_nothing_else(arguments):
    models = {}
    for name in ablations.VARIATIONS:
        _, script, *settings = ablations.pretraining_command(arguments, name, 1)
        assert script == "deberta_xl/pretrain.py"
        config = read_inputs(parse_arguments(settings)).config
        assert config.train.steps == 20
        models[name] = config.model
    full = models["full"]
    assert (full.num_decoder_passes, full.pos_att_type) == (2, "c2p|p2c")
    for name, model in models.items():
        assert (model.num_decoder_passes == 0) == ("emd" in name)
        assert model.has_content_to_position == ("c2p" not in name)
        assert model.has_position_to_content == ("p2c" not in name)


def test_what_is_finished_is_not_made_again_and_the_table_has_means_and_spreads(arguments):
    for name, losses in {"full": (3.0, 3.2), "no_emd_c2p": (3.5, 3.5)}.items():
        for seed, loss in zip(arguments.seeds, losses, strict=True):
            folder = ablations.objectives.run_folder(arguments, name, seed)
            folder.mkdir(parents=True)
            (folder / "STATE").write_text("done\n")
            (folder / "config.toml").write_text("[train]\nsteps = 20\n")
            (folder / "held_out.json").write_text(json.dumps({"loss": loss, "accuracy": 0.25}))
    assert ablations.unfinished(arguments) == []
    header, _, full, without = ablations.table(arguments).splitlines()
    assert header == "| model | held-out loss | held-out accuracy |"
    assert full == "| all of it | 3.100 ± 0.141 | 0.250 ± 0.000 |"
    assert without == "| – (EMD + c2p) | 3.500 ± 0.000 | 0.250 ± 0.000 |"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--text", "a.txt"], "give either --text and --held_out, or --train and --valid"),
        (["--text", "a.txt", "--valid", "b"], "give either --text and --held_out, or --train and --valid"),
        (["--train", "a", "--valid", "b", "--tasks", "trec"], "--tasks needs --data"),
        (["--text", ".", "--held_out", "b.txt"], "has no files that end in .txt or .jsonl"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        ablations.check_arguments(ablations.parse_arguments([*given, "--output", str(tmp_path / "out")]))
