"""What a start of fine-tuning refuses, before anything is built, and with which words."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_dataset import SmallDataset
from small_task import finetune_arguments, write_encoder, write_sentences

from deberta_xl.base.errors import UserError
from deberta_xl.commands.finetuning import parse_arguments, read_inputs
from deberta_xl.commands.outlook import describe_work
from deberta_xl.commands.task_data import report_measures
from deberta_xl.conversion.convert import Conversion, convert
from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import forward_flops
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.presets import load_config, preset_names, to_toml
from deberta_xl.tasks.metrics import is_better
from deberta_xl.tasks.task import Example, Source, Task, examples_fingerprint
from deberta_xl.training.state import TrainState


@pytest.fixture(scope="module")
def encoder(small_dataset: SmallDataset, tmp_path_factory) -> Path:
    """A pretrained encoder, so to speak."""
    return write_encoder(small_dataset, tmp_path_factory.mktemp("encoder") / "weights")


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A task of single sentences."""
    return write_sentences(tmp_path / "sentences")


def test_a_good_start_counts_steps_and_warms_up(encoder, sentences, tmp_path):
    arguments = finetune_arguments(encoder, sentences, tmp_path / "run", "train.epochs=2", "schedule.warmup_share=0.25")
    inputs = read_inputs(parse_arguments([word for word in arguments if not word.startswith("train.steps")]))
    assert inputs.total_steps == 12  # 2 epochs of 48 examples in batches of 8
    assert inputs.schedule.warmup_steps == 3
    assert (len(inputs.train_data), set(inputs.held_out)) == (48, {"valid", "test"})
    assert inputs.head.head.dropout == 0.1
    assert not (tmp_path / "run").exists()


def test_what_a_run_takes_at_most_is_told_with_sift_and_without(encoder, sentences, tmp_path):
    arguments = finetune_arguments(encoder, sentences, tmp_path / "run")
    plain, adversarial = (
        read_inputs(parse_arguments([*arguments, *more])).outlook for more in ([], ["sift.weight=5", "sift.steps=2"])
    )
    # 8 steps of 8 examples of 32 tokens, forward and backward; SiFT has two such passes, and two steps there and back.
    assert plain.flops == 8 * 3 * forward_flops(plain.work.parts, Load(8, 32))
    assert adversarial.flops == plain.flops * 10 / 3
    assert describe_work(plain).startswith("at most ")
    # Of those after steps 3, 6, 8 and after two evaluations: two, the one being written, and the best.
    assert plain.num_checkpoints == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.stps=3",), "unknown key train.stps"),
        (("task.name=sst3",), "did you mean 'sst2'"),
        (("task.data=/nowhere",), "/nowhere is not a folder"),
        (("train.init=/nowhere",), "train.init: /nowhere is not a folder"),
        (("train.init=none",), "train.init is not set: give it by --init"),
        (("train.global_batch_size=7",), "7 is not a multiple"),
        (("schedule.warmup_steps=9",), "schedule.warmup_steps=9 is longer than the run of 8 steps"),
        (("optimizer.layer_decay=1.5",), "optimizer.layer_decay=1.5"),
        (("sift.variant=originl",), "sift.variant"),
        (("task.valid_share=0.2",), "has a valid split of its own"),
        (("task.valid_share=1.0",), "valid_share=1.0 is not a share"),
        (("task.name=copa", "train.class_weights=balanced"), "a choice has no classes to weigh"),
        (("parallel.tensor_parallel_size=2",), "does not divide the 1 ranks"),
        (("parallel.pipeline_parallel_size=2",), "is for pretraining"),
        (("model.sequence_length=4",), "model.sequence_length=4 is too small"),
        (("model.kernel=flash",), "model.kernel='flash' is unknown; choose one of auto, fused, strided, reference"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_run_is_refused_with_a_message(encoder, sentences, tmp_path, overrides, message):
    arguments = finetune_arguments(encoder, sentences, tmp_path / "run")
    parsed = parse_arguments(arguments)
    parsed.overrides += overrides
    with pytest.raises(UserError, match=message):
        read_inputs(parsed)
    assert not (tmp_path / "run").exists()


def test_a_share_of_the_training_examples_is_held_out_with_all_that_has_the_same_text(encoder, sentences, tmp_path):
    (sentences / "dev.tsv").unlink()
    header, *rows = (sentences / "train.tsv").read_text().splitlines(keepends=True)
    (sentences / "train.tsv").write_text("".join([header, *rows, *rows]))
    arguments = finetune_arguments(encoder, sentences, tmp_path / "run", "task.valid_share=0.25")
    inputs = read_inputs(parse_arguments(arguments))
    parts = [[example.texts for example in data.examples] for data in (inputs.train_data, inputs.held_out["valid"])]
    assert len(parts[0]) + len(parts[1]) == 96
    assert 10 <= len(parts[1]) <= 38
    assert not set(parts[0]) & set(parts[1])


def test_a_share_that_holds_out_nothing_is_refused(encoder, sentences, tmp_path):
    (sentences / "dev.tsv").unlink()
    arguments = finetune_arguments(encoder, sentences, tmp_path / "run", "task.valid_share=0.000001")
    with pytest.raises(UserError, match="divides 48 examples into 48 to train on and 0 held out"):
        read_inputs(parse_arguments(arguments))


def test_only_the_first_examples_are_used_where_that_is_asked_for(encoder, sentences, tmp_path):
    few = ("task.max_train_examples=10", "task.max_eval_examples=4")
    inputs = read_inputs(parse_arguments(finetune_arguments(encoder, sentences, tmp_path / "run", *few)))
    assert (len(inputs.train_data), len(inputs.held_out["valid"]), len(inputs.held_out["test"])) == (10, 4, 4)


def test_examples_of_a_batch_are_of_similar_length_unless_they_are_to_be_random(encoder, sentences, tmp_path):
    padding = {}
    for bucketing in ("true", "false"):
        key = f"train.length_bucketing={bucketing}"
        inputs = read_inputs(parse_arguments(finetune_arguments(encoder, sentences, tmp_path / "run", key)))
        epoch = itertools.islice(inputs.objective().batches(1, 0, rank=0, size=1), 6)  # 48 examples in batches of 8
        batches = [batch for of_step in epoch for batch in of_step]
        assert sum(len(batch.segments_BS) for batch in batches) == 48
        padding[bucketing] = sum(int((batch.segments_BS == 0).sum()) for batch in batches)
    assert padding["true"] < padding["false"]


def test_a_held_out_set_of_one_class_is_refused_where_the_metric_needs_two(encoder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.tsv").write_text("gj04\t1\t\tIt works.\ngj04\t0\t*\tWorks it.\n" * 4)
    (data / "dev.tsv").write_text("gj04\t1\t\tIt works.\n")
    arguments = finetune_arguments(encoder, data, tmp_path / "run", task="cola")
    with pytest.raises(UserError, match="matthews is not defined, since every example has the label '1'"):
        read_inputs(parse_arguments(arguments))


@pytest.mark.parametrize("name", preset_names(FinetuneConfig))
def test_presets_are_read_back_as_they_are_written(name, tmp_path):
    config = load_config(name, ["sift.noise=0.1", "task.name=sst2"], FinetuneConfig)
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "again.toml", (), FinetuneConfig) == config


def test_the_first_evaluation_is_the_best_until_another_beats_it_and_waiting_is_counted():
    state = TrainState(step=1)
    by_accuracy = functools.partial(is_better, "accuracy")
    assert state.take(None, by_accuracy)
    state.step = 2
    assert state.take(0.5, by_accuracy)
    state.step = 3
    assert not state.take(0.5, by_accuracy)
    assert not state.take(None, by_accuracy)
    assert (state.best_step, state.best_value, state.num_waited) == (2, 0.5, 2)
    assert state.has_waited(2)
    assert not state.has_waited(3)
    assert not state.has_waited(0)


@pytest.mark.parametrize(
    ("examples", "batch", "epochs"), [(4076, 32, 2), (2000, 32, 3), (250, 32, 3), (5, 8, 2), (64, 32, 3)]
)
def test_an_epoch_is_measured_once_and_never_a_step_before_the_end(examples, batch, epochs):
    train = FinetuneConfig().train
    train = replace(train, global_batch_size=batch, micro_batch_size=1, epochs=float(epochs))
    total = train.total_steps(examples)
    ends = [step for step in range(1, total + 1) if train.ends_epoch(step, examples)]
    assert ends == sorted({-(-examples * epoch // batch) for epoch in range(1, epochs + 1)})
    assert ends[-1] == total


def test_a_models_folder_as_configuration_is_the_model_to_start_from(encoder, sentences, tmp_path):
    arguments = finetune_arguments(encoder, sentences, tmp_path / "run")
    arguments[arguments.index("--config") + 1] = str(encoder)
    alone = [word for word in arguments if word not in ("--init", str(encoder))]
    alone[alone.index("--config") + 1 : alone.index("--config") + 1] = [str(encoder)]
    for given in (arguments, alone):
        assert read_inputs(parse_arguments(given)).config.train.init == str(encoder)
    arguments[arguments.index("--init") + 1] = str(tmp_path)
    with pytest.raises(UserError, match="the architecture of the one it starts from"):
        read_inputs(parse_arguments(arguments))


def test_weights_that_lack_a_tensor_are_refused_before_a_run_folder_is_made(encoder, sentences, tmp_path):
    shutil.copytree(encoder, tmp_path / "damaged")
    (tmp_path / "damaged" / "manifest.json").unlink()
    tensors = load_file(encoder / "model.safetensors")
    del tensors["encoder.layers.1.attention.key_proj.bias"]
    save_file(tensors, tmp_path / "damaged" / "model.safetensors")
    arguments = finetune_arguments(tmp_path / "damaged", sentences, tmp_path / "run")
    with pytest.raises(UserError, match=r"train\.init: .*no tensor for encoder\.layers\.1\.attention\.key_proj\.bias"):
        read_inputs(parse_arguments(arguments))
    assert not (tmp_path / "run").exists()


def test_a_new_head_takes_the_activation_behind_cls_of_the_model_it_starts_from(encoder, sentences, tmp_path):
    convert(encoder, tmp_path / "hub", Conversion(to="huggingface"))
    path = tmp_path / "hub" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pooler_hidden_act": "tanh"}))
    inputs = read_inputs(parse_arguments(finetune_arguments(tmp_path / "hub", sentences, tmp_path / "run")))
    assert inputs.head.head.pooler_act == "tanh"


def test_examples_longer_than_the_rows_of_pretraining_are_counted(encoder, sentences, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "deberta_xl")
    arguments = finetune_arguments(encoder, sentences, tmp_path / "run")
    words = "48 examples or windows to train on are longer than the"
    lengths = read_inputs(parse_arguments(arguments)).train_data.lengths
    assert words not in caplog.text
    shutil.copytree(encoder, tmp_path / "short")
    config = json.loads((encoder / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"sequence_length": 30}))
    read_inputs(parse_arguments(finetune_arguments(tmp_path / "short", sentences, tmp_path / "run")))
    assert 0 < (lengths > 30).sum() < 48
    assert f"{(lengths > 30).sum()} of {words} 30 tokens of a row" in caplog.text


def test_what_the_metrics_are_of_and_held_out_texts_that_are_trained_on_are_said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("deberta_xl"), "propagate", True)
    caplog.set_level(logging.INFO, "deberta_xl")
    source = [Source(files={})]
    texts = [Example(str(number), (f"text {number}",), "a") for number in range(8)]
    task = Task(name="t", head="classification", metrics=["f1"], sources=source)
    report_measures(task, ["fake", "real"], {"train": texts[:4], "valid": texts[3:6], "test": texts[6:]})
    assert "f1 is of the label 'real'" in caplog.text
    assert "valid: the texts of 1 of 3 examples are trained on" in caplog.text
    assert "test:" not in caplog.text
    task = Task(name="t", head="token", metrics=["span_f1"], sources=source)
    report_measures(task, ["O", "U-X"], {"train": []})
    assert "tags of the scheme BILOU" in caplog.text


def test_the_fingerprint_of_examples_follows_their_contents_and_no_name_of_ours():
    examples = [Example("1", ("A text\ud800.", "another"), label=1), Example("2", ("a", "b"), (0, 1), "g", "v", ("x",))]
    # Checkpoints hold it: it may not change. It was the hash of the list's repr when it was first written down.
    known = "93841e50c2b579ad4e71810213b94cf5dd2745f14804b991d6b2467635f2ac7a"
    assert examples_fingerprint(examples) == known
    assert examples_fingerprint(examples[::-1]) != known
    assert examples_fingerprint([examples[0]._replace(label=0), examples[1]]) != known
