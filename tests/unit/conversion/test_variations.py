"""What the worlds can express of the paper's variations: exactly, carried along, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.conversion.edits import Edits
from deberta_xl.model.task_model import TaskModel
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig
from deberta_xl.weights.initial_encoder import load_encoder
from deberta_xl.weights.initial_weights import computed_by

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 48,
    "position_buckets": 8, "max_position_embeddings": 24, "head_dim": 8,
}  # fmt: skip
IDS = torch.arange(2 * 24).view(2, 24) % 90 + 4
# float32 sums in another order.
TOLERANCE = 1e-5
EXACT = {"tolerance": 0.0, "show": lambda _line: None}


def save(folder: Path, **options: object) -> DebertaForMaskedLM:
    """A native model in which every weight has an influence of its own."""
    model = DebertaForMaskedLM(DebertaConfig(**SIZES | options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


def there_and_back(folder: Path) -> Path:
    """native → Hugging Face → native, verified to the bit; the folder between."""
    convert(folder, folder.parent / "exported", Conversion(to="huggingface", **EXACT))
    convert(folder.parent / "exported", folder.parent / "back", Conversion(to="native", **EXACT))
    before, after = (load_file(folder.parent / name / "model.safetensors") for name in (folder.name, "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return folder.parent / "exported"


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest."""
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize(
    "options", [{"decoder_passes": 0}, {"decoder_passes": 1, "decoder_input": "states"}], ids=["no decoder", "BERT's"]
)
def test_prediction_from_the_last_state_is_transformers_own(tmp_path, options, caplog):
    model = save(tmp_path / "native", **options)
    exported = there_and_back(tmp_path / "native")
    assert DebertaForMaskedLM.from_pretrained(tmp_path / "back").config == model.config
    assert "decoder" not in caplog.text
    theirs, report = transformers.AutoModelForMaskedLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert difference(model(IDS).logits, theirs.eval()(IDS).logits) <= TOLERANCE


@pytest.mark.parametrize(
    "options",
    [{"decoder_weights": "own"}, {"decoder_weights": "own", "decoder_input": "states"}, {"decoder_passes": 3}],
    ids=str,
)
def test_another_decoder_is_carried_along_and_said_to_be_left_aside(tmp_path, options, caplog):
    model = save(tmp_path / "native", **options)
    exported = there_and_back(tmp_path / "native")
    assert "AutoModel is exact, AutoModelForMaskedLM predicts from the encoder's last state" in caplog.text
    back = DebertaForMaskedLM.from_pretrained(tmp_path / "back")
    assert back.config == model.config
    theirs = transformers.AutoModel.from_pretrained(exported).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, back(IDS).logits)
        states = model(IDS, output_hidden_states=True).hidden_states[-1]
        assert difference(states, theirs(IDS).last_hidden_state) <= TOLERANCE


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_the_original_code_decodes_in_one_way_and_others_are_refused_by_name(tmp_path, passes):
    save(tmp_path / "native", decoder_passes=passes)
    with pytest.raises(CheckpointError, match=rf"decoder_passes={passes}, .*two passes of the last layer"):
        convert(tmp_path / "native", tmp_path / "original", Conversion(to="microsoft"))
    assert not (tmp_path / "original").exists()


def test_the_released_decoder_needs_no_words_there(tmp_path):
    save(tmp_path / "native", decoder_passes=2)
    convert(tmp_path / "native", tmp_path / "original", Conversion(to="microsoft", **EXACT))
    assert "decoder" not in (tmp_path / "original/model_config.json").read_text()


def test_layers_of_the_decoders_own_that_transformers_dropped_are_made_anew_and_a_task_needs_none(tmp_path, caplog):
    model = save(tmp_path / "native", decoder_weights="own")
    convert(tmp_path / "native", tmp_path / "exported", Conversion(to="huggingface"))
    transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "exported").save_pretrained(tmp_path / "theirs")
    fields = json.loads((tmp_path / "theirs/config.json").read_text())
    assert fields["decoder_weights"] == "own"
    convert(tmp_path / "theirs", tmp_path / "back", Conversion(to="native"))
    assert "layers of the decoder's own (new ones instead)" in caplog.text
    back = DebertaForMaskedLM.from_pretrained(tmp_path / "back")
    first, second = (layer.attention.query_proj.weight for layer in back.decoder.layers)
    assert not torch.equal(first, second)
    assert first.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(back.head.dense.weight, model.head.dense.weight)
    task = TaskModel(model.config, HeadConfig(kind="token", num_labels=2))
    load_encoder(task, tmp_path / "theirs", ["a", "b"])
    assert torch.equal(task.encoder.layers[2].feed_forward.up.weight, model.encoder.layers[2].feed_forward.up.weight)


def test_the_card_says_what_of_the_decoder_transformers_leaves_aside(tmp_path):
    for name, options in {"none": {"decoder_passes": 0}, "own": {"decoder_weights": "own"}}.items():
        save(tmp_path / name, **options)
        convert(tmp_path / name, tmp_path / f"{name}-card", Conversion(to="huggingface", with_card=True))
    without, own = ((tmp_path / f"{name}-card/README.md").read_text() for name in ("none", "own"))
    assert "without an enhanced mask decoder" in without
    assert "predict\nalike, from the encoder's last state" in without
    assert "2 layers of its own over the states and absolute positions" in own
    assert "`deberta.embeddings.position_embeddings.weight` and `decoder.layers.#`" in own


def test_a_longer_model_that_reads_no_absolute_positions_needs_no_table_for_them(tmp_path):
    save(tmp_path / "native", decoder_passes=0)
    convert(tmp_path / "native", tmp_path / "long", Conversion(to="native", edits=Edits(max_position_embeddings=40)))
    model = DebertaForMaskedLM.from_pretrained(tmp_path / "long")
    assert model.config.max_position_embeddings == 40
    assert model.embeddings.position is None


@pytest.mark.parametrize("share_att_key", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("terms", ["p2c", "none"])
def test_position_terms_are_computed_alike_by_transformers(tmp_path, terms, share_att_key):
    model = save(tmp_path / "native", pos_att_type=terms, share_att_key=share_att_key, decoder_passes=0)
    exported = there_and_back(tmp_path / "native")
    back = DebertaForMaskedLM.from_pretrained(tmp_path / "back").config
    assert computed_by(back) == computed_by(model.config)
    theirs, report = transformers.AutoModelForMaskedLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert difference(model(IDS).logits, theirs.eval()(IDS).logits) <= TOLERANCE


def v1(folder: Path, **options: object) -> transformers.DebertaForMaskedLM:
    """A model of v1's layout that transformers made."""
    torch.manual_seed(2)
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 24, "type_vocab_size": 0, "position_biased_input": True, "initializer_range": 0.2,
    }  # fmt: skip
    model = transformers.DebertaForMaskedLM(transformers.DebertaConfig(**sizes | options)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"relative_attention": True, "pos_att_type": ["p2c"]},
        {"relative_attention": True, "pos_att_type": []},
        {"relative_attention": False},
    ],
    ids=str,
)
def test_models_of_transformers_with_fewer_terms_are_read_as_they_compute(tmp_path, options):
    theirs = v1(tmp_path / "theirs", **options)
    convert(tmp_path / "theirs", tmp_path / "native", Conversion(to="native", **EXACT))
    ours = DebertaForMaskedLM.from_pretrained(tmp_path / "native")
    assert ours.config.pos_att_type == ("p2c" if options.get("pos_att_type") else "none")
    convert(tmp_path / "native", tmp_path / "back", Conversion(to="huggingface", **EXACT))
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
        assert difference(ours(IDS).logits, expected) <= TOLERANCE
        assert difference(again(IDS).logits, expected) <= TOLERANCE


def test_the_original_has_content_alone_and_not_p2c_alone(tmp_path):
    model = save(tmp_path / "none", pos_att_type="none")
    convert(tmp_path / "none", tmp_path / "original", Conversion(to="microsoft", **EXACT))
    fields = json.loads((tmp_path / "original/model_config.json").read_text())
    assert (fields["relative_attention"], fields["pos_att_type"], fields["norm_rel_ebd"]) == (False, "none", "none")
    convert(tmp_path / "original", tmp_path / "back", Conversion(to="native", **EXACT))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, DebertaForMaskedLM.from_pretrained(tmp_path / "back")(IDS).logits)
    save(tmp_path / "p2c", pos_att_type="p2c")
    with pytest.raises(CheckpointError, match=r"pos_att_type=p2c: the original's code ends with an error"):
        convert(tmp_path / "p2c", tmp_path / "refused", Conversion(to="microsoft"))


def test_rows_that_no_term_reads_cannot_be_had_more_of(tmp_path):
    save(tmp_path / "native", pos_att_type="none")
    with pytest.raises(CheckpointError, match=r"--position_buckets: pos_att_type=none has no relative table"):
        convert(tmp_path / "native", tmp_path / "out", Conversion(to="native", edits=Edits(position_buckets=12)))
    longer = Conversion(to="native", edits=Edits(max_position_embeddings=40))
    convert(tmp_path / "native", tmp_path / "long", longer)
    assert DebertaForMaskedLM.from_pretrained(tmp_path / "long").config.max_position_embeddings == 40
