"""Fine-tuning runs: what they leave behind, resuming, several ranks, early stopping, SiFT, every kind of head."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from small_dataset import SmallDataset
from small_task import finetune_arguments, write_encoder, write_questions, write_sentences

from deberta_xl.base.stop_request import StopRequest
from deberta_xl.commands.finetuning import parse_arguments, read_inputs
from deberta_xl.commands.training_command import assemble
from deberta_xl.public.finetuned import DebertaForTask
from deberta_xl.weights.native import find_weights_folder, read_weights


def train(arguments: list[str], stop_after: int | None = None) -> str:
    """A whole run on this rank; how it ended. `stop_after` asks it to stop as a signal would."""
    run = assemble(read_inputs(parse_arguments(arguments)), StopRequest())
    advance = run.state.advance

    def advance_and_stop(count: int, **facts: bool) -> None:
        advance(count, **facts)
        if run.state.step == stop_after:
            run.stop.signal = signal.SIGUSR1

    run.state.advance = advance_and_stop
    return run.train()


def finetune(arguments: list[str], num_ranks: int = 1, **options: object) -> None:
    """A run on several ranks, which must end well."""
    ended = set(run_ranks(train, num_ranks, arguments, *options.values(), backend=None, timeout=400))
    assert ended == {"stopped" if options else "done"}


def metrics(folder: Path, name: str) -> dict[int, float]:
    """Step -> value of a metric."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the newest checkpoint."""
    return read_weights(find_weights_folder(folder))


@pytest.fixture(scope="module")
def encoder(small_dataset: SmallDataset, tmp_path_factory) -> Path:
    """A pretrained encoder, so to speak."""
    return write_encoder(small_dataset, tmp_path_factory.mktemp("encoder") / "weights")


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> Path:
    """A task of single sentences."""
    return write_sentences(tmp_path_factory.mktemp("task") / "sentences")


SIFT = ("sift.weight=2", "optimizer.layer_decay=0.9")


@pytest.fixture(scope="module")
def uninterrupted(encoder, sentences, tmp_path_factory) -> Path:
    """A run with dropout, SiFT and layer-wise decay, from the first to the last step at once."""
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finetune(finetune_arguments(encoder, sentences, folder, *SIFT))
    return folder


def test_a_run_leaves_everything_in_its_folder(uninterrupted):
    assert (uninterrupted / "STATE").read_text() == "done\n"
    assert sorted(metrics(uninterrupted, "loss")) == list(range(1, 9))
    assert sorted(metrics(uninterrupted, "valid_accuracy")) == [4, 8]
    total, task, adversarial = (metrics(uninterrupted, f"{name}loss") for name in ("", "task_", "adversarial_"))
    assert total == pytest.approx({step: task[step] + 2 * adversarial[step] for step in total}, rel=1e-5)
    for name in ("confusion.png", "calibration.png", "metrics.png", "config.toml", "best/model.safetensors"):
        assert (uninterrupted / name).stat().st_size > 0, name
    results = json.loads((uninterrupted / "results.json").read_text())
    best = results["best_step"]
    assert results["metrics"] == {"valid": {"accuracy": metrics(uninterrupted, "valid_accuracy")[best]}}
    submitted = (uninterrupted / "predictions" / "test" / "SST-2.tsv").read_text().splitlines()
    assert submitted[0] == "index\tprediction"
    assert len(submitted) == 1 + 8


def test_a_run_that_is_shortened_to_where_it_stands_is_evaluated_there_and_ends(encoder, sentences, tmp_path):
    words = [*finetune_arguments(encoder, sentences, tmp_path), "evaluation.interval=8"]
    finetune([*words, "train.profile=1:2"], stop_after=1)  # step 2 was agreed on by then
    assert len(list((tmp_path / "profile").iterdir())) == 1
    assert metrics(tmp_path, "valid_accuracy") == {}
    finetune([*words, "train.steps=2"])
    assert json.loads((tmp_path / "results.json").read_text())["best_step"] == 2
    assert min(metrics(tmp_path, "model_flops_per_second").values()) > 0


def test_tensorboard_holds_curves_and_figures(uninterrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(uninterrupted / "tensorboard")).Reload().Tags()
    assert {"train/loss", "train/adversarial_loss", "valid/accuracy"} <= set(tags["scalars"])
    assert {"valid/confusion", "valid/calibration"} <= set(tags["images"])


def test_the_best_weights_are_those_of_their_step(uninterrupted):
    best = json.loads((uninterrupted / "results.json").read_text())["best_step"]
    model = DebertaForTask.from_pretrained(uninterrupted)
    expected = read_weights(uninterrupted / "checkpoints" / f"step-{best:08d}")
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    assert model.facts.labels == ["0", "1"]


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_stopped_run_resumes_to_identical_weights(encoder, sentences, uninterrupted, tmp_path, stop_after):
    arguments = finetune_arguments(encoder, sentences, tmp_path / "run", *SIFT)
    finetune(arguments, stop_after=stop_after)
    assert (tmp_path / "run" / "STATE").read_text() == "stopped\n"
    finetune(arguments)
    actual, expected = weights(tmp_path / "run"), weights(uninterrupted)
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]
    for name in ("loss", "valid_accuracy"):
        assert metrics(tmp_path / "run", name) == metrics(uninterrupted, name)


@pytest.mark.parametrize("engine", ["cpu_debug", "zero3_fp32"])
def test_two_ranks_give_the_run_of_one_with_dropout_and_sift(encoder, sentences, uninterrupted, tmp_path, engine):
    arguments = finetune_arguments(encoder, sentences, tmp_path / "two", *SIFT)
    finetune([word.replace("cpu_debug", engine) for word in arguments], 2)
    for name in ("loss", "adversarial_loss", "grad_norm"):
        # float32 sums in another order, over 8 steps of Adam at a high rate.
        assert metrics(tmp_path / "two", name) == pytest.approx(metrics(uninterrupted, name), rel=1e-4), name
    assert metrics(tmp_path / "two", "valid_accuracy") == metrics(uninterrupted, "valid_accuracy")


STEADY = ("model.dropout=0", "model.head_dropout=0", "sift.weight=2")


@pytest.fixture(scope="module")
def plain(encoder, sentences, tmp_path_factory) -> Path:
    """A run of one rank without dropout."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    finetune(finetune_arguments(encoder, sentences, folder, *STEADY))
    return folder


@pytest.mark.parametrize("sequence_parallel", ["false", "true"])
def test_tensor_parallelism_gives_the_plain_run(encoder, sentences, plain, tmp_path, sequence_parallel):
    two = ("parallel.tensor_parallel_size=2", f"parallel.sequence_parallel={sequence_parallel}")
    finetune(finetune_arguments(encoder, sentences, tmp_path / "divided", *STEADY, *two), 2)
    for name in ("task_loss", "adversarial_loss", "grad_norm"):
        # SiFT's noise does not depend on how the model is divided; a divergence near 0 keeps fewer digits.
        divided = metrics(tmp_path / "divided", name)
        assert divided == pytest.approx(metrics(plain, name), rel=1e-3, abs=1e-6), name


def test_waiting_too_long_for_a_better_metric_ends_the_run(encoder, sentences, tmp_path):
    # A rate of 0 changes nothing, so the second evaluation is no better than the first.
    still = ("optimizer.learning_rate=0.0", "evaluation.interval=1", "evaluation.patience=2")
    finetune(finetune_arguments(encoder, sentences, tmp_path / "run", *still))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["best_step"], results["steps"]) == (1, 3)


def test_a_run_whose_outputs_are_no_numbers_has_diverged_instead_of_scoring(encoder, sentences, tmp_path):
    wild = ("optimizer.learning_rate=1e20", "schedule.warmup_share=0", "train.max_grad_norm=0")
    with pytest.raises(AssertionError, match=r"Diverged: .*are not finite numbers: its training has diverged"):
        finetune(finetune_arguments(encoder, sentences, tmp_path / "run", *wild))
    assert not (tmp_path / "run" / "results.json").exists()


def test_spans_are_learned_in_windows(encoder, tmp_path):
    data = write_questions(tmp_path / "data")
    finetune(finetune_arguments(encoder, data, tmp_path / "run", "sift.weight=1", task="squad"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["metrics"]["valid"]) == {"squad_f1", "squad_exact_match"}
    answers = json.loads((tmp_path / "run" / "predictions" / "valid" / "predictions.json").read_text())
    assert set(answers) == {f"dev{n}" for n in range(8)}


def test_a_fine_tuned_model_is_fine_tuned_further_and_other_classes_get_a_new_head(uninterrupted, tmp_path):
    rows = "".join(json.dumps({"premise": f"it is {n}", "hypothesis": "so", "label": label}) + "\n"
                   for n, label in enumerate(["entailment", "contradiction", "neutral"] * 4))  # fmt: skip
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "val"):
        (data / f"{name}.jsonl").write_text(rows)
    quiet = ("optimizer.learning_rate=0.0", "train.steps=1")
    finetune(finetune_arguments(uninterrupted, data, tmp_path / "run", *quiet, task="cb"))
    first, second = read_weights(uninterrupted / "best"), weights(tmp_path / "run")
    assert second["classifier.weight"].shape == (3, 32)
    assert all(torch.equal(second[name], w) for name, w in first.items() if not name.startswith("classifier"))
    assert (
        "was fine-tuned for 2 outputs (classification ['0', '1']), this task has 3"
        in (tmp_path / "run/log/rank-00000.log").read_text()
    )


def test_fresh_weights_are_not_the_checkpoints(encoder, sentences, tmp_path):
    quiet = ("optimizer.learning_rate=0.0", "train.steps=1")
    for name, more in (("warm", ()), ("fresh", ("train.fresh_weights=true",))):
        finetune(finetune_arguments(encoder, sentences, tmp_path / name, *quiet, *more))
    pretrained = read_weights(encoder)["embeddings.word.weight"]
    assert torch.equal(weights(tmp_path / "warm")["embeddings.word.weight"], pretrained)
    assert not torch.equal(weights(tmp_path / "fresh")["embeddings.word.weight"], pretrained)
