"""The papers' variations under replaced token detection: trained, resumed, converted, and put to use."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from full_state import assert_bitwise_equal, full_state
from ranks import run_ranks
from small_dataset import SmallDataset
from test_pretrain_command import arguments

from deberta_xl.base.stop_request import StopRequest
from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.commands.pretraining import parse_arguments, read_inputs
from deberta_xl.commands.training_command import assemble
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.public.detection import DebertaForDetection, detect
from deberta_xl.weights.native import find_weights_folder, open_weights

PACE = (
    "train.objective=replaced_tokens", "train.log_interval=4", "checkpoint.interval=2", "evaluation.interval=4",
    "model.conv_kernel_size=0", "schedule.decay=constant",
)  # fmt: skip
TEXT = "the class of  a function"


class Variation(NamedTuple):
    """Settings of both models, and what refuses them."""

    words: tuple[str, ...]
    original: str | None = None
    """How the original's layout says that it cannot have them."""


VARIATIONS = {
    "content alone": Variation(("model.pos_att_type=none", "replaced_tokens.sharing=none")),
    "p2c, convolution": Variation(("model.pos_att_type=p2c", "model.conv_kernel_size=3"), "pos_att_type=p2c"),
    "c2p, projections of its own": Variation(("model.pos_att_type=c2p", "model.share_att_key=false")),
    "no decoder": Variation(("model.decoder_passes=0",), "decoder_passes=0"),
    "one pass over states": Variation(
        ("model.decoder_passes=1", "model.decoder_input=states", "replaced_tokens.training=joint"), "decoder_passes=1"
    ),
    "three layers of its own": Variation(
        (
            "model.decoder_passes=3", "model.decoder_weights=own", "model.conv_kernel_size=3",
            "replaced_tokens.sharing=es", "replaced_tokens.training=joint",
        ),
        "decoder_weights=own",
    ),
}  # fmt: skip


def train(starts: list[list[str]]) -> list[str]:
    """Starts on this rank, one after the other; how they ended."""
    return [assemble(read_inputs(parse_arguments(given)), StopRequest()).train() for given in starts]


@pytest.mark.full
@pytest.mark.parametrize("name", VARIATIONS)
def test_a_pair_of_varied_models_trains_resumes_and_is_converted_or_refused_by_name(
    name: str, small_dataset: SmallDataset, tmp_path: Path
):
    variation = VARIATIONS[name]

    def words(folder: str, num_steps: int) -> list[str]:
        return arguments(small_dataset, tmp_path / folder, *PACE, *variation.words, f"train.steps={num_steps}")

    starts = [words("whole", 4), words("run", 2), words("run", 4)]
    assert run_ranks(train, 1, starts, backend=None, timeout=300) == [["done"] * 3]
    run, whole = (tmp_path / folder / "checkpoints" / "step-00000004" for folder in ("run", "whole"))
    assert_bitwise_equal(full_state(run), full_state(whole))
    judged = detect(DebertaForDetection.from_pretrained(run), small_dataset.tokenizer, TEXT)
    assert len({token.probability for token in judged}) > 1
    for kind in ("huggingface", "microsoft"):
        if kind == "microsoft" and variation.original is not None:
            with pytest.raises(CheckpointError, match=variation.original):
                convert(run, tmp_path / kind, Conversion(to=kind))
            continue
        convert(run, tmp_path / kind, Conversion(to=kind))
        assert detect(DebertaForDetection.from_pretrained(tmp_path / kind), small_dataset.tokenizer, TEXT) == judged
        convert(tmp_path / kind, tmp_path / f"{kind}-back", Conversion(to="native"))
        back, stored = (open_weights(find_weights_folder(folder)) for folder in (tmp_path / f"{kind}-back", run))
        assert back.keys() == stored.keys()
        assert all(torch.equal(back[tensor].read(), stored[tensor].read()) for tensor in stored)
