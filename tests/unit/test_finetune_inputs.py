"""What a start of fine-tuning refuses, before anything is built, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_dataset import SmallDataset
from small_task import finetune_arguments, write_encoder, write_sentences

from deberta_xl.config_file import load_config, preset_names, to_toml
from deberta_xl.errors import UserError
from deberta_xl.finetune import parse_arguments
from deberta_xl.finetune_config import FinetuneConfig
from deberta_xl.finetune_inputs import read_inputs
from deberta_xl.training.task_state import TaskState


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
        (("parallel.tensor_parallel_size=2",), "does not divide the 1 ranks"),
        (("parallel.pipeline_parallel_size=2",), "is for pretraining"),
        (("model.sequence_length=4",), "model.sequence_length=4 is too small"),
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
    config = load_config(name, ["sift.radius=0.1", "task.name=sst2"], FinetuneConfig)
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "again.toml", (), FinetuneConfig) == config


def test_the_first_evaluation_is_the_best_until_another_beats_it_and_waiting_is_counted():
    state = TaskState(step=1)
    assert state.take("accuracy", None)
    state.step = 2
    assert state.take("accuracy", 0.5)
    state.step = 3
    assert not state.take("accuracy", 0.5)
    assert not state.take("accuracy", None)
    assert (state.best_step, state.best_value, state.num_waited) == (2, 0.5, 2)
    assert state.has_waited(2)
    assert not state.has_waited(3)
    assert not state.has_waited(0)
