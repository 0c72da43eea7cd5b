"""Models of the original release, as its own code wrote and computed them, through our layout and Hugging Face's."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from vectors import VECTORS, folders

from deberta_xl.checkpoint.manifest import CheckpointError
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.model.masked_lm import MaskedLMOutput
from deberta_xl.public.pretrained import DebertaForMaskedLM

# A folder of further vectors in the same format, for an extra check where there is one.
ROOTS = [VECTORS, *(Path(p) for p in [os.environ.get("DEBERTA_REFERENCE_VECTORS", "")] if p)]
# As in tests/unit/model/test_reference_vectors.py: the original's own rounding, with room for another order of sums.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-4}
EXACTLY = {"tolerance": 0.0, "show": lambda _line: None}


def release(vector: Path, folder: Path, part: str = "", config: str = "config.json") -> dict[str, torch.Tensor]:
    """A vector as a released folder: `pytorch_model.bin` and its configuration; the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = json.loads((vector / "config.json").read_text())
    tensors = load_file(vector / "weights.safetensors")
    if part:
        fields = fields[part]
        tensors = {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}
    (folder / config).write_text(json.dumps(fields))
    torch.save(tensors, folder / "pytorch_model.bin")
    return tensors


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Name for name, bit for bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


def read_pickle(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a folder in the original's layout."""
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def compute(folder: Path, vector: Path, dtype: torch.dtype) -> MaskedLMOutput:
    """Logits and loss of a folder's model on the vector's input."""
    inputs = load_file(vector / "inputs.safetensors")
    model = DebertaForMaskedLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        types = inputs.get("token_type_ids")
        return model(inputs["input_ids"], inputs["attention_mask"], types, labels=inputs["labels"])


@pytest.mark.parametrize("vector", [f for root in ROOTS for f in folders("mlm_emd", root)], ids=lambda f: f.name)
def test_every_conversion_keeps_every_bit_and_the_originals_logits_and_loss(vector, tmp_path):
    original = release(vector, tmp_path / "original")
    ways = [
        ("original", "native"), ("native", "microsoft"), ("native", "huggingface"), ("huggingface", "again"),
        ("again", "back"),
    ]  # fmt: skip
    kinds = {"again": "native", "back": "microsoft"}
    for source, target in ways:
        convert(tmp_path / source, tmp_path / target, Conversion(to=kinds.get(target, target), **EXACTLY))
    assert_same(read_pickle(tmp_path / "microsoft"), original)
    assert_same(read_pickle(tmp_path / "back"), original)
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("native", "again")))
    expected = load_file(vector / "outputs.safetensors")
    for folder in ("original", *(target for _, target in ways)):
        for dtype, tolerance in TOLERANCES.items():
            output = compute(tmp_path / folder, vector, dtype)
            assert (output.logits - expected["logits"]).abs().max() <= tolerance, folder
            assert (output.loss - expected["loss"]).abs() <= tolerance, folder


def test_the_pickle_we_write_is_a_sound_archive_and_its_configuration_has_the_originals_fields(tmp_path):
    vector = VECTORS / "c_conv_share"
    release(vector, tmp_path / "original")
    convert(tmp_path / "original", tmp_path / "microsoft", Conversion(to="microsoft"))
    assert zipfile.ZipFile(tmp_path / "microsoft" / "pytorch_model.bin").testzip() is None
    assert_same(torch.load(tmp_path / "microsoft" / "pytorch_model.bin", weights_only=True, mmap=True),
                load_file(vector / "weights.safetensors"))  # fmt: skip
    before = json.loads((vector / "config.json").read_text())
    after = json.loads((tmp_path / "microsoft" / "model_config.json").read_text())
    assert set(after["pos_att_type"].split("|")) == set(before["pos_att_type"].split("|"))
    differing = {key: (value, after.get(key)) for key, value in before.items() if after.get(key) != value}
    assert set(differing) <= {"pos_att_type"}, differing


# v1


@pytest.fixture
def v1(tmp_path) -> dict[str, torch.Tensor]:
    """tmp_path/original: a v1 release with the prefix that some of its files have, and the head under its name."""
    config = transformers.DebertaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=40, relative_attention=True, pos_att_type="c2p|p2c", position_biased_input=False,
        legacy=False,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.DebertaForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    state = {name.replace("deberta.", "bert.", 1): tensor for name, tensor in model.state_dict().items()}
    state["bert.embeddings.position_embeddings.weight"] = torch.randn(40, 32)
    state["bert.embeddings.position_ids"] = torch.arange(40).unsqueeze(0)
    (tmp_path / "original").mkdir()
    fields = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "legacy")}
    (tmp_path / "original" / "model_config.json").write_text(json.dumps(fields | {"pos_att_type": "c2p|p2c"}))
    torch.save(state, tmp_path / "original" / "pytorch_model.bin")
    torch.save(model.state_dict(), tmp_path / "theirs.bin")
    config.save_pretrained(tmp_path / "theirs")
    return state


def test_v1_comes_back_to_the_bit_under_the_name_its_code_knows(v1, tmp_path):
    vocabulary = {"vocab.json": b'{"a": 4}', "merges.txt": b"#version: 0.2\n"}
    for name, content in vocabulary.items():
        (tmp_path / "original" / name).write_bytes(content)
    convert(tmp_path / "original", tmp_path / "native", Conversion(to="native", **EXACTLY))
    convert(tmp_path / "native", tmp_path / "back", Conversion(to="microsoft", **EXACTLY))
    expected = {n.replace("bert.", "deberta.", 1): t for n, t in v1.items() if not n.endswith("position_ids")}
    assert_same(read_pickle(tmp_path / "back"), expected)
    assert {name: (tmp_path / "back" / name).read_bytes() for name in vocabulary} == vocabulary


def test_v1_becomes_transformers_deberta_with_its_fused_projection(v1, tmp_path):
    convert(tmp_path / "original", tmp_path / "native", Conversion(to="native"))
    convert(tmp_path / "native", tmp_path / "exported", Conversion(to="huggingface", **EXACTLY))
    exported = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "exported").eval()
    assert type(exported).__name__ == "DebertaForMaskedLM"
    theirs = transformers.DebertaForMaskedLM(transformers.AutoConfig.from_pretrained(tmp_path / "theirs")).eval()
    theirs.load_state_dict(torch.load(tmp_path / "theirs.bin", weights_only=True))
    ids = torch.arange(4, 40).unsqueeze(0)
    assert torch.equal(exported(ids).logits, theirs(ids).logits)


def test_v1_whose_key_biases_were_trained_since_is_written_as_v2(v1, tmp_path):
    convert(tmp_path / "original", tmp_path / "native", Conversion(to="native"))
    model = DebertaForMaskedLM.from_pretrained(tmp_path / "native")
    with torch.no_grad():
        model.encoder.layers[1].attention.key_proj.bias += 0.5
    model.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "exported", Conversion(to="huggingface", **EXACTLY))
    exported = transformers.AutoModel.from_pretrained(tmp_path / "exported").eval()
    assert type(exported).__name__ == "DebertaV2Model"
    ids = torch.arange(4, 40).unsqueeze(0)
    with torch.no_grad():
        state = model.eval()(ids, labels=torch.zeros_like(ids), output_hidden_states=True).hidden_states[-1]
        # float32 sums in another order.
        assert (exported(ids).last_hidden_state - state).abs().max() <= 2e-5


# v3: tables that are what the discriminator adds to its generator's.

V3 = VECTORS / "c_rtd_gdes"


def test_a_v3_generator_is_a_masked_lm_of_its_own(tmp_path):
    release(V3, tmp_path / "v3", "generator", "generator_config.json")
    (tmp_path / "v3" / "pytorch_model.bin").rename(tmp_path / "v3" / "pytorch_model.generator.bin")
    convert(tmp_path / "v3" / "pytorch_model.generator.bin", tmp_path / "native", Conversion(to="native", **EXACTLY))
    inputs = load_file(V3 / "inputs.safetensors")
    expected = load_file(V3 / "outputs.safetensors")
    model = DebertaForMaskedLM.from_pretrained(tmp_path / "native", dtype=torch.float64)
    with torch.no_grad():
        loss = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss
    assert (loss - expected["generator_loss"]).abs() <= 1e-10


def test_a_v3_discriminator_with_its_generator_beside_it_gets_the_sum_and_keeps_what_it_adds(tmp_path):
    generator = release(V3, tmp_path / "v3", "generator", "generator_config.json")
    (tmp_path / "v3" / "pytorch_model.bin").rename(tmp_path / "v3" / "pytorch_model.generator.bin")
    discriminator = release(V3, tmp_path / "v3", "discriminator")
    convert(tmp_path / "v3" / "discriminator", tmp_path / "native", Conversion(to="native"))
    weights = load_file(tmp_path / "native" / "model.safetensors")
    for ours, theirs in (("word", "word_embeddings"), ("position", "position_embeddings")):
        table = f"deberta.embeddings.{theirs}"
        total = generator[f"{table}.weight"] + discriminator[f"{table}._weight"]
        assert torch.equal(weights[f"embeddings.{ours}.weight"], total)
    convert(tmp_path / "native", tmp_path / "back", Conversion(to="microsoft", **EXACTLY))
    back = read_pickle(tmp_path / "back")
    assert all(torch.equal(back[name], tensor) for name, tensor in discriminator.items())
    merged = {name for name in back if name not in discriminator}
    assert merged == {f"deberta.embeddings.{kind}_embeddings.weight" for kind in ("word", "position")}
    # The sum is there now, and is taken at its word: no generator is needed any more.
    convert(tmp_path / "back", tmp_path / "again", Conversion(to="native", **EXACTLY))
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), weights)


def test_a_v3_discriminator_without_its_generator_is_refused_until_it_is_named(tmp_path):
    release(V3, tmp_path / "discriminator", "discriminator")
    release(V3, tmp_path / "generator", "generator")
    with pytest.raises(CheckpointError, match=r"position_embeddings\._weight without .* generator's table") as caught:
        convert(tmp_path / "discriminator", tmp_path / "native", Conversion(to="native"))
    assert "--generator" in str(caught.value)
    assert not (tmp_path / "native").exists()
    convert(tmp_path / "discriminator", tmp_path / "native", Conversion(to="native", generator=tmp_path / "generator"))
    assert (tmp_path / "native").exists()


def test_a_generator_of_another_size_is_refused(tmp_path):
    release(V3, tmp_path / "discriminator", "discriminator")
    release(VECTORS / "c_conv_share", tmp_path / "generator")
    tensors = read_pickle(tmp_path / "generator")
    tensors["deberta.embeddings.word_embeddings.weight"] = torch.zeros(7, 16)
    torch.save(tensors, tmp_path / "generator" / "pytorch_model.bin")
    conversion = Conversion(to="native", generator=tmp_path / "generator")
    with pytest.raises(CheckpointError, match="do not belong together"):
        convert(tmp_path / "discriminator", tmp_path / "native", conversion)


def test_one_file_of_weights_is_enough_with_its_configuration_beside_it(tmp_path):
    original = release(VECTORS / "c_noshare", tmp_path / "original")
    shutil.move(tmp_path / "original" / "pytorch_model.bin", tmp_path / "original" / "epoch-3.bin")
    convert(tmp_path / "original" / "epoch-3.bin", tmp_path / "back", Conversion(to="microsoft", **EXACTLY))
    assert_same(read_pickle(tmp_path / "back"), original)
