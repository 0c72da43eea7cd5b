"""Which weights a new pretraining run may start from, as far as it is found out before anything is built."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from small_dataset import NAMES, PIECES, SPECIALS, SmallDataset, documents

from deberta_xl.base.errors import TokenizerError, UserError
from deberta_xl.base.launch import Launch
from deberta_xl.base.log import logger
from deberta_xl.commands.inputs import Layout
from deberta_xl.commands.pretraining import PretrainingInputs, check_models, parse_arguments, read_inputs
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.conversion.edits import Edits
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.kernels.registry import KERNELS, Demand
from deberta_xl.model.masked_lm import MaskedLanguageModel
from deberta_xl.objectives.autoregressive import Prefix
from deberta_xl.parallel.grid import Grid
from deberta_xl.public.pretrained import DebertaForMaskedLM
from deberta_xl.settings.architecture import DebertaConfig
from deberta_xl.settings.deepspeed_config import load_deepspeed_config
from deberta_xl.settings.presets import load_run_config, to_toml
from deberta_xl.weights.initial_weights import load_initial_weights
from deberta_xl.weights.named_folder import peek

ENGINE = Path(__file__).parent.parent.parent.parent / "deepspeed_configs" / "cpu_debug.json"
SIZES = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64, "position_buckets": 8,
    "max_position_embeddings": 48, "conv_kernel_size": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(small_dataset: SmallDataset, tmp_path_factory) -> Path:
    """A weights folder with the dataset's tokenizer."""
    return write_weights(tmp_path_factory.mktemp("weights") / "own", small_dataset.tokenizer)


def write_weights(folder: Path, tokenizer: Tokenizer) -> Path:
    """A weights folder for a tokenizer."""
    tokenizer.save(folder.with_name("tokenizer"))
    model = DebertaForMaskedLM(DebertaConfig(vocab_size=tokenizer.vocab_size, **SIZES), seed=4)
    model.save_pretrained(folder, tokenizer=folder.with_name("tokenizer"))
    return folder


def read(dataset: SmallDataset, run_folder: Path, init: Path, *overrides: str) -> PretrainingInputs:
    """What a start with `train.init` finds."""
    sizes = [f"model.{name}={value}" for name, value in SIZES.items()]
    files = [f"data.train={dataset.train}", f"run.folder={run_folder}", f"train.init={init}"]
    options = ["--config", "debug", "--deepspeed_config", str(ENGINE)]
    return read_inputs(parse_arguments([*options, *sizes, "model.sequence_length=48", *files, *overrides]))


def swapped(tokenizer: Tokenizer) -> Tokenizer:
    """Another tokenizer with as many ids: two pieces have changed places."""
    model = ModelProto.FromString(tokenizer.spm_model)
    model.pieces[10].piece, model.pieces[20].piece = model.pieces[20].piece, model.pieces[10].piece
    return Tokenizer(model.SerializeToString(), tokenizer.vocab_size)


def rescored(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer with the same pieces that cuts text otherwise."""
    model = ModelProto.FromString(tokenizer.spm_model)
    model.pieces[10].score -= 1.0
    return Tokenizer(model.SerializeToString(), tokenizer.vocab_size)


def test_an_unknown_kernel_is_refused_with_those_there_are_before_anything_is_built(small_dataset, weights, tmp_path):
    with pytest.raises(
        UserError, match=r"model.kernel='flash' is unknown; choose one of auto, fused, strided, reference"
    ):
        read(small_dataset, tmp_path / "run", weights, "model.kernel=flash")


class Writer(Prefix):
    """An objective of a user's own."""


@pytest.mark.parametrize(
    ("words", "mask"),
    [
        (["train.objective=causal"], "causal"),
        ([f"train.objective={__name__}:Writer"], "prefix"),
        (["train.objective=prefix"], "prefix"),
        (["train.objective=mixed", "autoregressive.form=prefix"], "prefix"),
        (["train.objective=mixed"], "causal"),
    ],
)
def test_a_kernel_is_asked_for_the_mask_of_the_objective(small_dataset, weights, tmp_path, monkeypatch, words, mask):
    def refuses_order(demand: Demand) -> str | None:
        return None if demand.mask == "bidirectional" else f"it has no {demand.mask} mask"

    monkeypatch.setitem(KERNELS, "unordered", KERNELS["reference"]._replace(refusal=refuses_order))
    assert read(small_dataset, tmp_path / "run", weights, "model.kernel=unordered").mask == "bidirectional"
    inputs = read(small_dataset, tmp_path / "run", weights, *words)
    assert inputs.mask == inputs.outlook.work.mask == mask
    with pytest.raises(UserError, match=f"model.kernel=unordered .* it has no {mask} mask; choose one of auto, st"):
        read(small_dataset, tmp_path / "run", weights, "model.kernel=unordered", *words)


@pytest.mark.parametrize("kind", ["native", "huggingface", "microsoft"])
def test_weights_of_the_same_model_and_tokenizer_are_taken_in_every_layout(small_dataset, weights, tmp_path, kind):
    if kind != "native":
        convert(weights, tmp_path / kind, Conversion(to=kind))
        weights = tmp_path / kind
    assert read(small_dataset, tmp_path / "run", weights).config.train.init == str(weights)
    assert not (tmp_path / "run").exists()


def test_weights_for_other_pieces_are_refused_and_fit_after_the_conversion_that_the_message_names(
    small_dataset, tmp_path
):
    other = write_weights(tmp_path / "other", swapped(small_dataset.tokenizer))
    with pytest.raises(UserError, match="another tokenizer: 2 ids stand for other pieces") as caught:
        read(small_dataset, tmp_path / "run", other)
    folder = read_tokenizer_folder(str(caught.value))
    convert(other, tmp_path / "fitting", Conversion(to="native", edits=Edits(tokenizer=folder)))
    read(small_dataset, tmp_path / "run", tmp_path / "fitting")


def read_tokenizer_folder(message: str) -> Path:
    """The folder that a message gives to tools/convert.py."""
    words = message.split()
    assert "tools/convert.py --to native --tokenizer" in message
    return Path(words[words.index("--tokenizer") + 1])


def test_a_tokenizer_that_differs_in_size_or_scores_only_is_refused_too(small_dataset, tmp_path):
    other = write_weights(tmp_path / "scores", rescored(small_dataset.tokenizer))
    with pytest.raises(UserError, match="the same pieces, but other scores or another normalisation"):
        read(small_dataset, tmp_path / "run", other)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents()), model_writer=model, vocab_size=PIECES - 100, minloglevel=2,
        **SPECIALS, **NAMES,
    )  # fmt: skip
    other = write_weights(tmp_path / "size", Tokenizer(model.getvalue()))
    with pytest.raises(UserError, match=r"another tokenizer: \d+ ids stand for other pieces"):
        read(small_dataset, tmp_path / "run", other)


def test_weights_without_tokenizer_are_taken_with_a_warning(small_dataset, weights, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logger, "propagate", True)
    shutil.copytree(weights, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer"))
    (tmp_path / "bare" / "manifest.json").unlink()
    read(small_dataset, tmp_path / "run", tmp_path / "bare")
    assert "bare has no tokenizer" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.init=/nowhere",), "train.init: /nowhere is not a folder"),
        (("model.num_layers=3",), "another architecture: num_layers is 2 there, 3 here"),
        (("model.vocab_size=600",), "another architecture: vocab_size is 504 there, 600 here"),
        (("model.max_position_embeddings=96",), "convert.py --to native --max_position_embeddings 96 .*own NEW_FOLDER"),
    ],
)
def test_other_weights_are_refused_with_a_message(small_dataset, weights, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        read(small_dataset, tmp_path / "run", weights, *overrides)
    assert not (tmp_path / "run").exists()


def test_longer_weights_begin_a_run_whose_rows_grow(small_dataset, weights, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logger, "propagate", True)
    longer = tmp_path / "longer"
    convert(weights, longer, Conversion(to="native", edits=Edits(max_position_embeddings=192)))
    files = [f"data.train={small_dataset.train}", f"run.folder={tmp_path / 'run'}", f"train.init={longer}"]
    words = [
        "model.sequence_length=192",
        "train.lengths=48:0.9",
        "train.global_batch_size=4",
        "train.micro_batch_size=1",
    ]
    options = ["--config", str(longer), "--deepspeed_config", str(ENGINE)]
    inputs = read_inputs(parse_arguments([*options, *files, *words]))
    assert [stretch.length for stretch in inputs.config.stretches] == [48, 192]
    objective = inputs.objective()
    begun = objective.build()
    load_initial_weights(begun, longer)
    before = DebertaForMaskedLM.from_pretrained(weights).eval()
    ids = torch.randint(8, 400, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(begun.eval()(ids, torch.ones_like(ids)).logits, before(ids).logits)


def test_a_run_that_has_a_checkpoint_no_longer_needs_what_it_began_with(small_dataset, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-00000003").mkdir(parents=True)
    read(small_dataset, tmp_path / "run", tmp_path / "gone")


def test_a_dataset_without_its_tokenizer_asks_for_that_one_and_never_for_a_new_one(small_dataset, weights, tmp_path):
    for path in small_dataset.train.parent.glob("train.[bi]*"):  # as Megatron's own tool leaves a dataset
        (tmp_path / path.name).write_bytes(path.read_bytes())
    dataset = small_dataset._replace(train=tmp_path / "train")
    with pytest.raises(TokenizerError, match=r"copy the tokenizer that made this dataset .*train\.tokenizer") as caught:
        read(dataset, tmp_path / "run", weights)
    assert "train_tokenizer" not in str(caught.value)
    small_dataset.tokenizer.save(tmp_path / "train.tokenizer")
    assert read(dataset, tmp_path / "run", weights).tokenizer.fingerprint == small_dataset.tokenizer.fingerprint


# A model's folder as configuration, and what its files must hold.


def without(source: Path, folder: Path, beginning: str | tuple[str, ...]) -> Path:
    """A Hugging Face folder of the weights in `source`, without the tensors whose names begin so."""
    convert(source, folder, Conversion(to="huggingface"))
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith(beginning)}, folder / "model.safetensors")
    return folder


def read_from_folder(dataset: SmallDataset, folder: Path, run_folder: Path, *overrides: str) -> PretrainingInputs:
    """What a start with `--config folder` finds."""
    files = [f"data.train={dataset.train}", f"run.folder={run_folder}"]
    return read_inputs(
        parse_arguments(["--config", str(folder), "--deepspeed_config", str(ENGINE), *files, *overrides])
    )


@pytest.mark.parametrize("kind", ["native", "huggingface", "microsoft"])
def test_a_models_folder_is_a_configuration_of_its_architecture(small_dataset, weights, tmp_path, kind):
    convert(weights, tmp_path / kind, Conversion(to=kind))
    folder = tmp_path / kind
    inputs = read_from_folder(small_dataset, folder, tmp_path / "run", f"train.init={folder}", "train.steps=7")
    there = peek(folder)[1]
    assert inputs.architecture == there
    assert (inputs.config.model.sequence_length, inputs.config.train.steps) == (48, 7)
    # The run's own configuration repeats it.
    (tmp_path / "again.toml").write_text(to_toml(inputs.config))
    assert load_run_config(tmp_path / "again.toml") == inputs.config


def test_a_preset_comes_before_a_folder_of_its_name(small_dataset, weights, tmp_path, monkeypatch):
    shutil.copytree(weights, tmp_path / "debug")
    monkeypatch.chdir(tmp_path)
    assert read_from_folder(small_dataset, Path("debug"), tmp_path / "run").architecture.num_layers == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--config: empty"):
        read_from_folder(small_dataset, Path("empty"), tmp_path / "run")


def test_weights_that_lack_a_tensor_are_refused_before_a_run_folder_is_made(small_dataset, weights, tmp_path):
    folder = without(weights, tmp_path / "hub", "deberta.encoder.layer.1.attention.self.key_proj")
    with pytest.raises(UserError, match=r"no tensor for: encoder\.layers\.1\.attention\.key_proj"):
        read(small_dataset, tmp_path / "run", folder)
    assert not (tmp_path / "run").exists()


def test_weights_without_positions_or_head_begin_with_fresh_ones_and_a_warning(
    small_dataset, weights, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(logger, "propagate", True)
    folder = without(weights, tmp_path / "hub", ("deberta.embeddings.position_embeddings", "lm_predictions"))
    inputs = read(small_dataset, tmp_path / "run", folder)
    assert "lacks absolute positions (zeros instead) and a masked-LM head (a new one instead)" in caplog.text
    model = MaskedLanguageModel(inputs.architecture)
    load_initial_weights(model, folder)
    assert not model.embeddings.position.weight.any()
    assert model.head.dense.weight.std() > 0


def written_by(objective: str | None, folder: Path, tokenizer: Tokenizer) -> Path:
    """Weights that come from training by an objective."""
    write_weights(folder, tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({"objective": objective} if objective else {})))
    return folder


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        (None, "causal", "saw all of its document: it begins train.objective=causal with the habits of that"),
        (None, "mixed", "saw all of its document: it begins train.objective=mixed with the habits of that"),
        ("causal", "masked_lm", "saw those before it: it begins train.objective=masked_lm"),
        ("prefix", "causal", "saw those before it and the document's prefix: it begins train.objective=causal"),
        ("causal", f"{__name__}:Writer", f"saw those before it: it begins train.objective={__name__}:Writer"),
        ("causal", "causal", None),
        ("mixed", "causal", None),
        (None, "masked_lm", None),
    ],
)
def test_weights_from_training_with_another_sight_are_taken_and_that_is_said(
    small_dataset, tmp_path, caplog, there, here, words
):
    folder = written_by(there, tmp_path / "weights", small_dataset.tokenizer)
    with caplog.at_level("INFO"):
        read(small_dataset, tmp_path / "run", folder, f"train.objective={here}")
    said = [line for line in caplog.messages if "comes from training in which" in line]
    assert len(said) == (words is not None)
    assert words is None or words in said[0]


def test_a_generator_that_does_not_divide_is_named_as_such():
    words = ["train.objective=replaced_tokens", "replaced_tokens.sharing=none", "generator.num_heads=1"]
    config = load_run_config("debug", words)
    layout = Layout(load_deepspeed_config(ENGINE, config), Launch(world_size=2), Grid(tensor_parallel_size=2))
    with pytest.raises(UserError, match=r"tensor_parallel_size=2 does not divide generator\.num_heads=1"):
        check_models(config.model.architecture(100), layout, config, "replaced_tokens")
