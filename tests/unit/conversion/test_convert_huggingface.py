"""Random models made by transformers itself go through our layout and come back the same; what they compute agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.weights.native import write_weights

SIZES = {
    "vocab_size": 203, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 64, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
}  # fmt: skip
V2 = {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False}
RELEASES = {
    "v1": ("Deberta", {"position_biased_input": False, "type_vocab_size": 0}),
    "v1 with positions and types in the input": ("Deberta", {"position_biased_input": True, "type_vocab_size": 2}),
    "v1, c2p alone": ("Deberta", {"position_biased_input": False, "pos_att_type": ["c2p"]}),
    "v2": ("DebertaV2", V2 | {"conv_kernel_size": 3, "conv_act": "gelu"}),
    "v2 with its own position projections": ("DebertaV2", V2 | {"share_att_key": False, "norm_rel_ebd": "none"}),
    "v3": ("DebertaV2", V2 | {"type_vocab_size": 0}),
}
# float32 sums in another order: transformers forms v1's projections in one product and normalises by hand.
TOLERANCE = 2e-5


def make(release: str, head: str, folder: Path, *, legacy: bool) -> torch.nn.Module:
    """A model of a release in which every weight has an influence of its own, saved by transformers."""
    family, options = RELEASES[release]
    config = getattr(transformers, f"{family}Config")(**SIZES | options, legacy=legacy)
    torch.manual_seed(3)
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        model.get_input_embeddings().weight[0] = 0  # the padding row
    model.save_pretrained(folder)
    return model


def there_and_back(tmp_path: Path) -> None:
    """tmp_path/source → native → back, both verified to the bit."""
    exactly = {"tolerance": 0.0, "show": lambda _line: None}
    convert(tmp_path / "source", tmp_path / "native", Conversion(to="native", **exactly))
    convert(tmp_path / "native", tmp_path / "back", Conversion(to="huggingface", **exactly))


def assert_same_files(tmp_path: Path) -> None:
    """Name for name, bit for bit."""
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, one of them padded."""
    mask = (torch.arange(40) < torch.tensor([[40], [27]])).long()
    return torch.randint(4, 203, (2, 40), generator=torch.Generator().manual_seed(5)) * mask, mask


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy head", "head"])
@pytest.mark.parametrize("release", RELEASES)
def test_a_masked_lm_of_transformers_comes_back_to_the_bit_and_computes_the_same(release, legacy, tmp_path):
    theirs = make(release, "ForMaskedLM", tmp_path / "source", legacy=legacy)
    there_and_back(tmp_path)
    assert_same_files(tmp_path)
    _, report = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = DebertaForMaskedLM.from_pretrained(tmp_path / "native")
    ids, mask = batch()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, output_hidden_states=True)
        states = ours(ids, mask, labels=torch.zeros_like(ids), output_hidden_states=True).hidden_states
        logits = ours.head(states[-1], ours.embeddings.word)
    assert len(states) == len(expected.hidden_states) == 4
    for our_state, their_state in zip(states, expected.hidden_states, strict=True):
        assert (our_state - their_state)[mask > 0].abs().max() <= TOLERANCE
    assert (logits - expected.logits)[mask > 0].abs().max() <= TOLERANCE


@pytest.mark.parametrize("release", ["v1", "v3"])
def test_an_encoder_without_head_keeps_its_names_and_gets_no_head_on_the_way_back(release, tmp_path, caplog):
    make(release, "Model", tmp_path / "source", legacy=True)
    there_and_back(tmp_path)
    assert_same_files(tmp_path)
    assert "lacks absolute positions (zeros instead) and a masked-LM head (a new one instead)" in caplog.text
    with pytest.raises(ValueError, match=r"tools/convert\.py --to native makes fresh ones"):
        DebertaForMaskedLM.from_pretrained(tmp_path / "source")
    model = DebertaForMaskedLM.from_pretrained(tmp_path / "native")
    assert not model.embeddings.position.weight.any()
    ids, mask = batch()
    assert model(ids, mask, labels=ids).loss.isfinite()


def test_the_head_of_a_task_is_carried_along(tmp_path):
    make("v3", "ForSequenceClassification", tmp_path / "source", legacy=True)
    there_and_back(tmp_path)
    assert_same_files(tmp_path)
    assert {"classifier.weight", "pooler.dense.bias"} <= load_file(tmp_path / "native" / "model.safetensors").keys()


def test_a_tasks_model_of_ours_becomes_transformers_and_stays_without_masked_lm_head(tmp_path):
    make("v3", "ForSequenceClassification", tmp_path / "source", legacy=True)
    convert(tmp_path / "source", tmp_path / "pretraining", Conversion(to="native"))
    weights = load_file(tmp_path / "pretraining" / "model.safetensors")
    task = {n: t for n, t in weights.items() if not n.startswith(("head.", "embeddings.position."))}
    config = json.loads((tmp_path / "pretraining" / "config.json").read_text())
    write_weights(tmp_path / "task", task, config, None)
    convert(tmp_path / "task", tmp_path / "native", Conversion(to="native", tolerance=0.0))
    assert load_file(tmp_path / "native" / "model.safetensors").keys() == task.keys()
    convert(tmp_path / "native", tmp_path / "back", Conversion(to="huggingface", tolerance=0.0))
    back = load_file(tmp_path / "back" / "model.safetensors")
    source = load_file(tmp_path / "source" / "model.safetensors")
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in source.items())


def test_a_head_that_has_no_name_with_us_is_carried_along_too(tmp_path):
    make("v1", "ForQuestionAnswering", tmp_path / "source", legacy=True)
    there_and_back(tmp_path)
    assert_same_files(tmp_path)
    assert "extra.qa_outputs.weight" in load_file(tmp_path / "native" / "model.safetensors")


def test_the_configuration_keeps_what_says_nothing_of_the_architecture(tmp_path):
    family, options = RELEASES["v3"]
    labels = {"id2label": {0: "no", 1: "yes"}, "pooler_dropout": 0.25, "bos_token_id": 1}
    program = {"auto_map": {"AutoModel": "elsewhere--model.Model"}}
    config = getattr(transformers, f"{family}Config")(**SIZES | options | labels | program)
    transformers.DebertaV2ForMaskedLM(config).save_pretrained(tmp_path / "source")
    there_and_back(tmp_path)
    back = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    ours = {"transformers_version", "attention_head_size", "padding_idx", "conv_kernel_size", "conv_groups", "conv_act"}
    ours |= {"embedding_size"}
    before, after = config.to_dict(), back.to_dict()
    changed = {key for key in before if before[key] != after.get(key)} - ours
    assert "auto_map" not in after
    assert changed - {"auto_map"} <= {"architectures", "dtype", "_name_or_path"}


def test_shards_are_written_and_read_and_transformers_reads_them(tmp_path):
    theirs = make("v2", "ForMaskedLM", tmp_path / "source", legacy=False)
    convert(tmp_path / "source", tmp_path / "native", Conversion(to="native", shard_bytes=40_000))
    convert(tmp_path / "native", tmp_path / "back", Conversion(to="huggingface", shard_bytes=60_000))
    for folder, limit in (("native", 40_000), ("back", 60_000)):
        shards = sorted((tmp_path / folder).glob("model-*.safetensors"))
        assert len(shards) > 3
        assert all(path.stat().st_size < limit + 4_000 for path in shards)  # the header comes on top
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "back")
    for name, parameter in theirs.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    read = DebertaForMaskedLM.from_pretrained(tmp_path / "native")
    assert torch.equal(read.embeddings.word.weight, theirs.deberta.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("is_zip", [True, False], ids=["torch 1.6 and newer", "before torch 1.6"])
def test_a_pickle_with_tied_names_and_buffers_is_read(tmp_path, is_zip):
    theirs = make("v1", "ForMaskedLM", tmp_path / "source", legacy=True)
    state = {**theirs.state_dict(), "deberta.embeddings.position_ids": torch.arange(64).unsqueeze(0)}
    assert "cls.predictions.decoder.weight" in state
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "kept.safetensors")
    torch.save(state, tmp_path / "source" / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    there_and_back(tmp_path)
    (tmp_path / "kept.safetensors").rename(tmp_path / "source" / "model.safetensors")
    assert_same_files(tmp_path)


def test_an_output_table_of_its_own_is_refused(tmp_path):
    theirs = make("v3", "ForMaskedLM", tmp_path / "source", legacy=True)
    (tmp_path / "source" / "model.safetensors").unlink()
    state = theirs.state_dict() | {"cls.predictions.decoder.weight": torch.zeros(203, 48)}
    torch.save(state, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder\.weight differs from"):
        convert(tmp_path / "source", tmp_path / "native", Conversion(to="native"))


def test_half_precision_stays_as_it_is_and_can_be_chosen(tmp_path):
    make("v2", "ForMaskedLM", tmp_path / "whole", legacy=False)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    half = {name: tensor.half() for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items()}
    save_file(half, tmp_path / "source" / "model.safetensors")
    there_and_back(tmp_path)
    assert_same_files(tmp_path)
    convert(tmp_path / "native", tmp_path / "wide", Conversion(to="huggingface", dtype=torch.float32))
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(torch.equal(wide[name], tensor.float()) for name, tensor in half.items())
    assert transformers.AutoModel.from_pretrained(tmp_path / "back").dtype == torch.float16
