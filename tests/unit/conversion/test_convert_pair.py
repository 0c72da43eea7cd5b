"""A discriminator and its generator through all layouts: ours, the original's two files, transformers' two folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_checkpoint import write_state
from small_pair import DISCRIMINATOR, GENERATOR, LEARNT, pair_tensors, write_pair
from torch import Tensor
from vectors import vector_folders

from deberta_xl.base.durable import write_files
from deberta_xl.checkpoint.manifest import CheckpointError, file_facts, step_folder_name, write_manifest
from deberta_xl.checkpoint.rank_file import KINDS
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.conversion.edits import Edits
from deberta_xl.corpus.tokenizer_training import train_tokenizer
from deberta_xl.model.replaced_tokens import ReplacedTokenModel
from deberta_xl.model.task_model import TaskModel
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import HeadConfig
from deberta_xl.weights.initial_encoder import find_init, load_encoder
from deberta_xl.weights.initial_weights import computed_by
from deberta_xl.weights.native import write_weights
from deberta_xl.weights.native_config import native_config, read_native_config

SHARED = {f"deberta.embeddings.{kind}_embeddings.weight" for kind in ("word", "position")}
EXACTLY = {"tolerance": 0.0, "show": lambda _line: None}
UNREAD = "deberta.embeddings.position_embeddings."
"""The discriminator's, which its input does not have."""
CASES = [
    pytest.param(sharing, positions, marks=pytest.mark.full if positions and sharing != "gdes" else ())
    for sharing in ("gdes", "es", "none")
    for positions in (False, True)
]


def release(vector: Path, folder: Path) -> dict[str, dict[str, Tensor]]:
    """A vector as the original releases a pair; the tensors of its two files."""
    folder.mkdir()
    fields = json.loads((vector / "config.json").read_text())
    tensors = load_file(vector / "weights.safetensors")
    files = {"generator": ("generator_config.json", "pytorch_model.generator.bin"),
             "discriminator": ("config.json", "pytorch_model.bin")}  # fmt: skip
    parts = {}
    for part, (config, weights) in files.items():
        parts[part] = {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}
        if fields["embedding_sharing"] == "es":  # what the first forward pass makes of them
            parts[part] |= {n: t for n, t in parts["generator"].items() if n in SHARED}
        (folder / config).write_text(json.dumps(fields[part] | {"embedding_sharing": fields["embedding_sharing"]}))
        torch.save(parts[part], folder / weights)
    return parts


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Name for name, bit for bit."""
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different


@pytest.mark.parametrize("vector", vector_folders("rtd"), ids=lambda folder: folder.name)
def test_the_originals_pair_comes_back_to_the_bit_but_for_a_table_that_is_never_read(vector, tmp_path):
    original = release(vector, tmp_path / "original")
    kinds = ["native", "huggingface", "native", "microsoft"]
    for number, kind in enumerate(kinds):
        source = tmp_path / (f"{number - 1}" if number else "original")
        convert(source, tmp_path / f"{number}", Conversion(to=kind, **EXACTLY))
    assert_same(load_file(tmp_path / "0" / "model.safetensors"), load_file(tmp_path / "2" / "model.safetensors"))
    last = tmp_path / f"{len(kinds) - 1}"
    assert_same(torch.load(last / "pytorch_model.generator.bin", weights_only=True), original["generator"])
    back = torch.load(last / "pytorch_model.bin", weights_only=True)
    for name, tensor in original["discriminator"].items():
        assert torch.equal(back[name], torch.zeros_like(tensor) if name == f"{UNREAD}_weight" else tensor), name
    assert back.keys() - original["discriminator"].keys() <= SHARED


@pytest.mark.parametrize(("sharing", "positions"), CASES)
def test_a_native_pair_comes_back_from_the_two_other_layouts_as_it_was(sharing, positions, tmp_path):
    stored = write_pair(tmp_path / "native", sharing, positions=positions)
    for other in ("microsoft", "huggingface"):
        convert(tmp_path / "native", tmp_path / other, Conversion(to=other, **EXACTLY))
        convert(tmp_path / other, tmp_path / f"from {other}", Conversion(to="native", **EXACTLY))
        assert_same(load_file(tmp_path / f"from {other}" / "model.safetensors"), stored)
        before, after = (read_native_config(tmp_path / f / "config.json") for f in ("native", f"from {other}"))
        assert (after.sharing, after.learnt) == (before.sharing, LEARNT)
        assert computed_by(after.architecture) == computed_by(before.architecture)
        assert computed_by(after.generator) == computed_by(before.generator)


def test_what_the_discriminator_adds_is_never_its_table(tmp_path):
    stored = write_pair(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "original", Conversion(to="microsoft"))
    written = torch.load(tmp_path / "original" / "pytorch_model.bin", weights_only=True)
    word = "deberta.embeddings.word_embeddings"
    assert torch.equal(written[f"{word}._weight"], stored["discriminator.embeddings.word_delta.weight"])
    total = stored["generator.embeddings.word.weight"] + stored["discriminator.embeddings.word_delta.weight"]
    assert torch.equal(written[f"{word}.weight"], total)
    assert not written[f"{UNREAD}_weight"].any()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """Of a few pieces."""
    folder = tmp_path_factory.mktemp("pieces") / "tokenizer"
    train_tokenizer(
        ["the old harbour lies where the river meets the sea"] * 9, DISCRIMINATOR.vocab_size, folder, allow_smaller=True
    )
    return folder


def test_transformers_computes_what_is_fine_tuned_here_with_the_same_ids(tokenizer, tmp_path):
    write_pair(tmp_path / "native", tokenizer=tokenizer)
    convert(tmp_path / "native", tmp_path / "exported", Conversion(to="huggingface", with_card=True, **EXACTLY))
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not report["missing_keys"]
    assert all(n.startswith("mask_predictions.") or n.endswith("._weight") for n in report["unexpected_keys"])
    model = TaskModel(DISCRIMINATOR, HeadConfig(kind="token", num_labels=2)).eval()
    load_encoder(model, find_init(tmp_path / "native"), [])
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")("the sea meets the old river")
    ids = torch.tensor([inputs.input_ids])
    assert ids.shape[1] > 6
    with torch.no_grad():
        ours = model.encode(ids, model.scene(ids))
        assert (theirs.eval()(ids).last_hidden_state - ours).abs().max() <= 1e-5
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "replaced token detection" in card
    assert "fill-mask" not in card


def test_the_generator_of_an_export_is_a_masked_lm_for_transformers_and_here(tmp_path):
    stored = write_pair(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "exported", Conversion(to="huggingface"))
    _, report = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "exported", subfolder="generator", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model = DebertaForMaskedLM.from_pretrained(tmp_path / "exported" / "generator")
    assert all(torch.equal(p, stored[f"generator.{name}"]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["native", "huggingface", "microsoft"])
@pytest.mark.parametrize("part", ["discriminator", "generator"])
def test_one_of_the_two_is_converted_by_its_name(part, kind, tmp_path):
    stored = write_pair(tmp_path / "native")
    convert(tmp_path / "native" / part, tmp_path / "one", Conversion(to=kind, **EXACTLY))
    assert not (tmp_path / "one" / "generator").exists()
    convert(tmp_path / "one", tmp_path / "back", Conversion(to="native", **EXACTLY))
    found = load_file(tmp_path / "back" / "model.safetensors")
    names = [n for n in stored if n.startswith(part) and not n.endswith("word_delta.weight")]
    assert all(torch.equal(found[name.removeprefix(f"{part}.")], stored[name]) for name in names)


def test_more_rows_go_to_both_tables_alike(tmp_path):
    stored = write_pair(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "more", Conversion(to="native", edits=Edits(vocab_size=50)))
    found = load_file(tmp_path / "more" / "model.safetensors")
    word, delta = "generator.embeddings.word.weight", "discriminator.embeddings.word_delta.weight"
    assert found[word].shape == found[delta].shape == (50, 16)
    assert torch.equal(found[word][:48], stored[word])
    assert torch.allclose((found[word] + found[delta])[:48], stored[word] + stored[delta], atol=1e-6)


def test_the_average_of_a_run_is_that_of_both_models(tmp_path):
    steps = []
    for step in (1, 2):
        tensors = {name: tensor * step for name, tensor in pair_tensors("gdes").items()}
        folder = tmp_path / "run" / "checkpoints" / step_folder_name(step)
        names = [path.name for path in write_state(folder, {kind: tensors for kind in KINDS}, [])]
        config = native_config(DISCRIMINATOR, generator=GENERATOR, sharing="gdes")
        names += write_files(folder, {"config.json": json.dumps(config).encode()})
        write_manifest(folder, {name: file_facts(folder / name) for name in names})
        steps.append(tensors)
    convert(tmp_path / "run", tmp_path / "averaged", Conversion(to="native", edits=Edits(average=2), **EXACTLY))
    found = load_file(tmp_path / "averaged" / "model.safetensors")
    assert found.keys() == steps[0].keys()
    for name, tensor in steps[0].items():
        assert torch.equal(found[name], ((tensor.double() + steps[1][name].double()) / 2).float()), name


# Refused.


def complaint(source: Path, to: str = "native", **options: object) -> str:
    """Why it is not converted; nothing is left."""
    with pytest.raises(CheckpointError) as caught:
        convert(source, source.parent / "refused", Conversion(to=to, **options))
    assert not (source.parent / "refused").exists()
    return str(caught.value)


def test_fewer_layers_of_two_models_are_refused(tmp_path):
    write_pair(tmp_path / "native")
    assert "SOURCE/discriminator or SOURCE/generator" in complaint(tmp_path / "native", edits=Edits(num_layers=2))


def test_the_generator_of_another_discriminator_is_refused(tmp_path):
    write_pair(tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "original", Conversion(to="microsoft"))
    path = tmp_path / "original" / "pytorch_model.generator.bin"
    tensors = torch.load(path, weights_only=True)
    tensors["deberta.embeddings.word_embeddings.weight"] = torch.randn(48, 16)
    torch.save(tensors, path)
    assert "that generator is another discriminator's" in complaint(tmp_path / "original")


def test_other_tables_where_one_is_to_be_shared_are_refused(tmp_path):
    write_pair(tmp_path / "native", "none")
    convert(tmp_path / "native", tmp_path / "original", Conversion(to="microsoft"))
    path = tmp_path / "original" / "model_config.json"
    path.write_text(
        path.read_text().replace('"none"', '"es"').replace('"norm_rel_ebd": "es"', '"norm_rel_ebd": "none"')
    )
    assert "are to be one (sharing=es)" in complaint(tmp_path / "original")
    path.write_text(path.read_text().replace('"embedding_sharing": "es"', '"embedding_sharing": "some"'))
    assert "embedding_sharing='some' is not known; known: gdes, es, none" in complaint(tmp_path / "original")


def test_a_generator_of_another_vocabulary_is_refused(tmp_path):
    write_pair(tmp_path / "native", "none")
    convert(tmp_path / "native", tmp_path / "exported", Conversion(to="huggingface"))
    partner = tmp_path / "exported" / "generator"
    tensors = load_file(partner / "model.safetensors")
    for name in ("deberta.embeddings.word_embeddings.weight", "lm_predictions.lm_head.bias"):
        tensors[name] = tensors[name][:40].clone()
    save_file(tensors, partner / "model.safetensors")
    config = json.loads((partner / "config.json").read_text())
    (partner / "config.json").write_text(json.dumps(config | {"vocab_size": 40}))
    assert "the discriminator has 48 ids, the generator 40: they do not belong" in complaint(tmp_path / "exported")


def test_a_generator_with_another_tokenizer_is_refused(tokenizer, tmp_path):
    write_pair(tmp_path / "native", tokenizer=tokenizer)
    convert(tmp_path / "native", tmp_path / "exported", Conversion(to="huggingface"))
    other = ["another text of other words than those before"] * 9
    train_tokenizer(other, DISCRIMINATOR.vocab_size, tmp_path / "other", allow_smaller=True)
    for path in (tmp_path / "exported" / "generator").glob("*token*"):
        path.unlink()
    shutil.copy(tmp_path / "other" / "spm.model", tmp_path / "exported" / "generator")
    message = complaint(tmp_path / "exported")
    assert "is another than the discriminator's: " in message
    assert "they do not belong together" in message


@pytest.mark.parametrize("sharing", ["gdes", "es", "none"])
def test_a_pair_that_decodes_without_absolute_positions_goes_there_and_back(sharing, tmp_path):
    config, partner = (dataclasses.replace(of, decoder_passes=0) for of in (DISCRIMINATOR, GENERATOR))
    model = ReplacedTokenModel(config, partner, sharing, seed=1)
    stored = {name: p.detach() + 0.1 for name, p in model.named_parameters()}
    assert not any("embeddings.position" in name for name in stored)
    write_weights(tmp_path / "native", stored, native_config(config, generator=partner, sharing=sharing), None)
    convert(tmp_path / "native", tmp_path / "there", Conversion(to="huggingface", **EXACTLY))
    convert(tmp_path / "there", tmp_path / "back", Conversion(to="native", **EXACTLY))
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), stored)
    with pytest.raises(CheckpointError, match="decoder_passes=0"):
        convert(tmp_path / "native", tmp_path / "refused", Conversion(to="microsoft"))
