"""Changes on the way: averages, a larger vocabulary, longer sequences, fewer layers; and what each leaves as it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoint import write_state
from small_dataset import documents

from deberta_xl.base.durable import write_files
from deberta_xl.checkpoint.manifest import CheckpointError, file_facts, step_folder_name, write_manifest
from deberta_xl.checkpoint.rank_file import KINDS
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.conversion.edits import Edits, relative_rows, row_of
from deberta_xl.corpus.tokenizer_training import train_tokenizer
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.kernels.relative_index import Buckets, offset_rows
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.weights.native_config import native_config

SIZES = {"hidden_size": 32, "num_layers": 6, "num_heads": 4, "intermediate_size": 48, "conv_kernel_size": 3}
POSITIONS = {"position_buckets": 8, "max_position_embeddings": 48}
VOCAB_SIZE = 420


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> tuple[Path, Path]:
    """Two tokenizers of the same text, the second with more pieces."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, size in (("small", VOCAB_SIZE), ("large", 500)):
        train_tokenizer(documents(), size, folder / name)
    return folder / "small", folder / "large"


def build(seed: int = 0, **options: object) -> DebertaForMaskedLM:
    """A model in which every weight has an influence."""
    model = DebertaForMaskedLM(DebertaConfig(**{"vocab_size": VOCAB_SIZE, **SIZES, **POSITIONS, **options}), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture
def native(tokenizers, tmp_path) -> DebertaForMaskedLM:
    """A model, and tmp_path/native, its folder."""
    model = build()
    model.save_pretrained(tmp_path / "native", tokenizer=tokenizers[0])
    return model


def edited(tmp_path: Path, **edits: object) -> DebertaForMaskedLM:
    """tmp_path/native, changed and verified."""
    conversion = Conversion(to="native", edits=Edits(**edits), tolerance=0.0, show=lambda _line: None)
    convert(tmp_path / "native", tmp_path / "edited", conversion)
    return DebertaForMaskedLM.from_pretrained(tmp_path / "edited")


def refused(tmp_path: Path, words: str, **edits: object) -> None:
    """The change makes no sense."""
    with pytest.raises(CheckpointError, match=words):
        edited(tmp_path, **edits)
    assert not (tmp_path / "edited").exists()


def others_are_equal(before: DebertaForMaskedLM, after: DebertaForMaskedLM, *changed: str) -> bool:
    """Whether all parameters but the changed ones are as they were."""
    return all(
        name in changed or torch.equal(parameter, before.get_parameter(name))
        for name, parameter in after.named_parameters()
    )


def logits(model: DebertaForMaskedLM, length: int = 40) -> torch.Tensor:
    """What a model predicts for some ids."""
    ids = torch.randint(4, 400, (2, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(ids).logits


# Average


def write_run(run: Path, models: dict[int, DebertaForMaskedLM]) -> None:
    """A run folder with a checkpoint of each step."""
    for step, model in models.items():
        checkpoint = run / "checkpoints" / step_folder_name(step)
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        names = [path.name for path in write_state(checkpoint, dict.fromkeys(KINDS, weights), cuts=[1000, 5001])]
        names += write_files(checkpoint, {"config.json": json.dumps(native_config(model.config)).encode()})
        write_manifest(checkpoint, {name: file_facts(checkpoint / name) for name in names})


def test_the_average_is_that_of_the_newest_whole_checkpoints(tmp_path, caplog):
    models = {step: build(step) for step in (1, 2, 3, 4)}
    write_run(tmp_path / "native", models)
    damaged = tmp_path / "native" / "checkpoints" / step_folder_name(3) / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    averaged = edited(tmp_path, average=2)
    assert "passed over" in caplog.text
    for name, parameter in averaged.named_parameters():
        total = models[2].get_parameter(name).double() + models[4].get_parameter(name).double()
        assert torch.equal(parameter, (total / 2).float())
    assert not list((tmp_path / "edited").glob("rank-*"))  # no optimizer state


def test_an_average_needs_enough_checkpoints_of_one_architecture(native, tmp_path):
    refused(tmp_path, "no run folder|0 whole checkpoints", average=2)
    write_run(tmp_path / "native", {1: build(1), 2: build(2, conv_kernel_size=0)})
    refused(tmp_path, "2 or more", average=1)
    refused(tmp_path, "another architecture", average=2)
    refused(tmp_path, "has 2 whole checkpoints", average=3)


# Vocabulary


def test_new_rows_start_as_the_mean_and_the_old_ones_predict_as_before(native, tmp_path, caplog):
    caplog.set_level("INFO", "deberta_xl")
    model = edited(tmp_path, vocab_size=VOCAB_SIZE + 5)
    assert model.config.vocab_size == VOCAB_SIZE + 5
    assert "5 as the mean of all rows" in caplog.text
    table = native.embeddings.word.weight
    assert torch.equal(model.embeddings.word.weight[:VOCAB_SIZE], table)
    # The mean is formed in float64 and rounded once.
    assert torch.equal(model.embeddings.word.weight[VOCAB_SIZE:], table.double().mean(0).float().expand(5, -1))
    assert torch.equal(model.head.bias[:VOCAB_SIZE], native.head.bias)
    assert others_are_equal(native, model, "embeddings.word.weight", "head.bias")
    # A product with more columns may be blocked otherwise.
    assert (logits(model)[..., :VOCAB_SIZE] - logits(native)).abs().max() <= 1e-5


def test_rows_follow_their_pieces_to_another_tokenizer(native, tokenizers, tmp_path):
    old, new = (Tokenizer.load(folder) for folder in tokenizers)
    model = edited(tmp_path, tokenizer=tokenizers[1])
    assert model.config.vocab_size == new.vocab_size == 500
    assert Tokenizer.load(tmp_path / "edited" / "tokenizer").fingerprint == new.fingerprint
    assert new.mask_id != old.mask_id
    known = {old.id_to_piece(i): i for i in range(old.mask_id + 1)}
    table = native.embeddings.word.weight
    fresh = 0
    for number in range(new.mask_id + 1):
        piece = new.id_to_piece(number)
        parts = [known[piece]] if piece in known else parts_of(old, piece)
        fresh += piece not in known
        assert torch.equal(model.embeddings.word.weight[number], table[parts].double().mean(0).float())
        assert torch.equal(model.head.bias[number], native.head.bias[parts].double().mean(0).float())
    assert 0 < fresh < 200
    # Spare ids have no text.
    assert torch.equal(model.embeddings.word.weight[-1], table.double().mean(0).float())


def parts_of(old: Tokenizer, piece: str) -> list[int]:
    """The old pieces of a new one: alone it is a word, and inside a word it has no mark before it."""
    text = piece.replace("▁", " ").strip()
    ids = old.encode(text).tolist() if piece.startswith("▁") else old.encode("0" + text).tolist()
    shown = [old.id_to_piece(i) for i in ids]
    if not piece.startswith("▁"):
        assert shown[0] in ("▁0", "▁")
        ids = ids[1 if shown[0] == "▁0" else 2 :]
    return ids


def test_a_smaller_vocabulary_and_an_unknown_one_are_refused(native, tokenizers, tmp_path):
    refused(tmp_path, "only more rows can be had", vocab_size=VOCAB_SIZE - 1)
    refused(tmp_path, "is less than the 500 ids", tokenizer=tokenizers[1], vocab_size=450)
    build().save_pretrained(tmp_path / "bare")
    (tmp_path / "native").rename(tmp_path / "put aside")
    (tmp_path / "bare").rename(tmp_path / "native")
    refused(tmp_path, "nobody knows which row belongs to which piece", tokenizer=tokenizers[1])


# Positions


def test_longer_sequences_leave_short_ones_as_they_were(native, tmp_path):
    model = edited(tmp_path, max_position_embeddings=100)
    assert (model.config.max_position_embeddings, model.config.relative_reach) == (100, 48)
    positions = native.embeddings.position.weight
    assert torch.equal(model.embeddings.position.weight, torch.cat([positions, positions, positions[:4]]))
    assert others_are_equal(native, model, "embeddings.position.weight")
    assert torch.equal(logits(model), logits(native))
    assert logits(model, 100).isfinite().all()
    buckets = Buckets(model.config.position_buckets, model.config.relative_reach)
    # Keys farther than the reach are where the farthest in it are, ahead and behind.
    assert offset_rows(100, buckets, torch.device("cpu"))[[0, 52, 146, -1]].tolist() == [1, 1, 15, 15]


def test_without_buckets_far_rows_copy_the_farthest_and_nothing_changes(tmp_path):
    native = build(position_buckets=0, max_relative_positions=20)
    native.save_pretrained(tmp_path / "native")
    model = edited(tmp_path, max_relative_positions=48)
    assert model.encoder.relative_position.table.weight.shape[0] == 96
    assert torch.equal(logits(model), logits(native))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"position_buckets": 8}, {"position_buckets": 32}),
        ({"position_buckets": 32}, {"position_buckets": 64}),
        ({"position_buckets": 256, "max_position_embeddings": 512}, {"position_buckets": 320}),
        ({"position_buckets": 8}, {"max_relative_positions": 200}),
        ({"position_buckets": 8}, {"position_buckets": 24, "max_relative_positions": 200}),
        ({"position_buckets": 0}, {"max_relative_positions": 90}),
    ],
)
def test_every_row_starts_as_the_old_row_of_the_nearest_distance_in_its_bucket(old, new):
    before = DebertaConfig(**{"vocab_size": 10, **SIZES, **POSITIONS, **old})
    after = dataclasses.replace(before, **new)
    rows = relative_rows(before, after)
    assert rows.shape == (2 * after.relative_span,)
    assert int(rows.min()) >= 0
    assert int(rows.max()) < 2 * before.relative_span
    offsets = torch.arange(-(after.relative_reach - 1), after.relative_reach)
    here, there = row_of(offsets, after), row_of(offsets, before)
    for row in here.unique():
        inside = here == row
        nearest = offsets[inside].abs().argmin()
        assert rows[row] == there[inside][nearest]
    # Offsets whose new bucket lies within one old bucket see the row they saw.
    exact = torch.tensor([len(there[here == row].unique()) == 1 for row in here])
    assert torch.equal(rows[here[exact]], there[exact])
    assert exact.float().mean() > 0.4


def test_more_buckets_change_only_the_relative_table_and_near_offsets_not_at_all(native, tmp_path):
    model = edited(tmp_path, position_buckets=16)
    assert others_are_equal(native, model, "encoder.relative_position.table.weight")
    # At distances up to half the old buckets each offset has a row of its own, before and after.
    offsets = torch.arange(-4, 5)
    before, after = (
        m.encoder.relative_position.table.weight[row_of(offsets, m.config)] for m in (native, model)
    )  # fmt: skip
    assert torch.equal(before, after)
    assert torch.equal(logits(model, 5), logits(native, 5))


def test_fewer_positions_and_a_change_of_kind_are_refused(native, tmp_path):
    refused(tmp_path, "max_position_embeddings 40: the model has 48", max_position_embeddings=40)
    refused(tmp_path, "max_position_embeddings 0: the model has 48", max_position_embeddings=0)
    refused(tmp_path, "position_buckets 4: the model has 8", position_buckets=4)
    refused(tmp_path, "max_relative_positions 20: the model has 48", max_relative_positions=20)
    build(position_buckets=0).save_pretrained(tmp_path / "plain")
    (tmp_path / "native").rename(tmp_path / "put aside")
    (tmp_path / "plain").rename(tmp_path / "native")
    refused(tmp_path, "position_buckets 8: the model has 0", position_buckets=8)


# Depth


@pytest.mark.parametrize(
    ("num_layers", "kept"), [(2, [0, 5]), (3, [0, 2, 5]), (4, [0, 2, 3, 5]), (6, [0, 1, 2, 3, 4, 5])]
)
def test_layers_are_kept_evenly_with_the_first_and_the_last(native, tmp_path, num_layers, kept):
    model = edited(tmp_path, num_layers=num_layers)
    assert len(model.encoder.layers) == num_layers
    for number, origin in enumerate(kept):
        for name, parameter in model.encoder.layers[number].named_parameters():
            assert torch.equal(parameter, native.encoder.layers[origin].get_parameter(name))
    assert logits(model).isfinite().all()


def test_impossible_depths_are_refused(native, tmp_path):
    for number in (1, 7):
        refused(tmp_path, r"allowed: 2 … 6", num_layers=number)


def test_changes_combine_and_are_exported_at_once(native, tmp_path):
    edits = Edits(num_layers=3, vocab_size=VOCAB_SIZE + 2, max_position_embeddings=64, position_buckets=16)
    convert(tmp_path / "native", tmp_path / "out", Conversion(to="huggingface", edits=edits, dtype=torch.bfloat16))
    model = DebertaForMaskedLM.from_pretrained(tmp_path / "out")
    config = model.config
    assert (config.num_layers, config.vocab_size, config.max_position_embeddings) == (3, VOCAB_SIZE + 2, 64)
    assert config.position_buckets == 16
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
