"""What is particular to pipelines: the original through stages, evaluation, dropout, the shared word table."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from full_state import full_state
from layouts import Case, Layout, Run, evaluate_untrained, run_cases
from plain_run import LENGTH, architecture, assert_equal_curves
from ranks import run_ranks
from small_dataset import SmallDataset
from vectors import Vector, vector_folders

from deberta_xl.checkpoint.store import save_checkpoint
from deberta_xl.model.masked_lm import LabelledPositions, MaskedLanguageModel
from deberta_xl.model.part_costs import Load
from deberta_xl.model.parts import masked_lm_parts
from deberta_xl.parallel.pipeline import PipelinedModel, StageInput, build_stage
from deberta_xl.parallel.plan import divide
from deberta_xl.parallel.stages import split_model
from deberta_xl.settings.pretraining import OptimizerSection
from deberta_xl.training.engine import build_engine
from deberta_xl.training.pipelined import nothing_to_load


def run_vector(folder: Path, root: Path, layout: Layout) -> float:
    """One step on a reference vector's batch, in a pipeline; its loss. The gradients go into a checkpoint."""
    groups = layout.join()
    vector = Vector(folder, torch.float32)
    config = replace(vector.config, hidden_dropout=0.0, attention_dropout=0.0)
    rows, length = vector.inputs["input_ids"].shape
    split = split_model(vector.model.parts, layout.pipeline, Load(rows, length, 0.15 * rows * length))
    model = build_stage(config, split.units(groups.grid.stage), seed=0)
    weights = vector.model.state_dict()
    model.load_state_dict({name: weights[name] for name, _ in model.named_parameters()})
    divide(model, groups)
    settings = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    engine = build_engine(PipelinedModel(model, split, groups), OptimizerSection(), settings, groups)
    inputs = vector.inputs
    labelled = LabelledPositions.of(inputs["labels"])
    count = float(len(labelled.label_L))
    types = inputs["token_type_ids"] if config.type_vocab_size else None
    given = StageInput(inputs["input_ids"], inputs["attention_mask"], labelled, count, token_type_ids_BS=types)
    engine.module.feed([given])
    loss = engine.train_batch(itertools.repeat(nothing_to_load(engine)))
    place = (groups.grid.tensor_parallel_size, groups.grid.tensor_parallel_rank)
    save_checkpoint(engine, root / layout.label, {"step": 1}, extra_files={}, tensor_parallel=place)
    return float(loss)


@pytest.mark.parametrize("layout", [Layout(pipeline=2), Layout(tensor=2, pipeline=2)], ids=lambda layout: layout.label)
@pytest.mark.parametrize("folder", vector_folders("mlm_emd"), ids=lambda folder: folder.name)
def test_a_pipeline_reproduces_the_original(folder, tmp_path, layout):
    vector = Vector(folder)
    losses = run_ranks(run_vector, layout.world_size, folder, tmp_path, layout)
    # The original's own float32 differs from its float64 by 9e-5 (loss) and 4.5e-5 (gradients).
    assert losses == pytest.approx([float(vector.outputs["loss"])] * layout.world_size, abs=2e-4)
    moments = full_state(tmp_path / layout.label / "step-00000001")["exp_avg"]
    for name, gradient in vector.gradients.items():
        assert (moments[name] / (1 - OptimizerSection().beta1) - gradient).abs().max() <= 1e-4, name


def evaluation_of(dataset: SmallDataset, folder: Path, layout: Layout) -> tuple[float, ...]:
    """Held-out loss, accuracy, number of labels, and what rank 0 would draw, of an untrained model."""
    case, config = Case(accumulation=4 // layout.data), architecture(dataset.tokenizer.vocab_size)
    found = evaluate_untrained(dataset, folder / layout.label, layout, case, config, max_samples=43)
    return (*found[:3], int(found.guess_L.sum()) if layout.data == 1 else 0)


def test_evaluation_through_the_pipeline_is_the_plain_ones_on_every_rank(small_dataset, tmp_path):
    (alone,) = run_ranks(evaluation_of, 1, small_dataset, tmp_path, Layout())
    for layout in (Layout(pipeline=2), Layout(tensor=2, pipeline=2), Layout(pipeline=2, data=2)):
        expected = alone if layout.data == 1 else (*alone[:3], 0)
        for result in run_ranks(evaluation_of, layout.world_size, small_dataset, tmp_path, layout):
            assert result == pytest.approx(expected, rel=1e-6)


def test_dropout_does_not_depend_on_stages_nor_on_divided_layers_nor_on_slices_nor_on_recomputation(
    small_dataset, tmp_path
):
    kept = Case(accumulation=2, dropout=0.2)
    recomputed = kept._replace(recompute=True)
    (expected,) = run_ranks(run_cases, 1, small_dataset, tmp_path, Layout(), [kept], {})
    (quiet,) = run_ranks(run_cases, 1, small_dataset, tmp_path, Layout(), [Case(accumulation=2)], {})
    assert abs(expected[0].losses[0] - quiet[0].losses[0]) > 1e-4  # else nothing was dropped
    for layout, cases in (
        (Layout(pipeline=4), [kept, recomputed]),
        (Layout(tensor=2, pipeline=2), [recomputed, kept._replace(sliced=True)]),
    ):
        for curves in run_ranks(run_cases, 4, small_dataset, tmp_path, layout, cases, {}):
            for case, curve in zip(cases, curves, strict=True):
                assert_equal_curves(curve, expected[0], case)


def test_dropout_does_not_depend_on_the_number_of_replicas(small_dataset, tmp_path):
    two, four = Case(accumulation=2, dropout=0.2), Case(accumulation=4, dropout=0.2)  # micro-batches of two rows
    (expected,) = run_ranks(run_cases, 1, small_dataset, tmp_path, Layout(), [four], {})
    for layout in (Layout(data=2), Layout(pipeline=2, data=2)):
        for (curve,) in run_ranks(run_cases, layout.world_size, small_dataset, tmp_path, layout, [two], {}):
            assert_equal_curves(curve, expected[0], two)


def word_table_after_training(dataset: SmallDataset, folder: Path, case: Case) -> torch.Tensor | None:
    """This stage's copy of the word table after some steps; None where there is none."""
    config = architecture(dataset.tokenizer.vocab_size)
    run = Run(dataset, folder / "run", Layout(pipeline=3), case, config, steps=4)
    run.train()
    table = run.engine.module.stage_model.embeddings.word.weight
    return None if table is None else table.detach().float()


@pytest.mark.parametrize(
    "precision", ["fp32", "bf16", "bf16_fp32_sums", "bf16_fp32_sums_at_once", "fp16", "fp16_fp32_sums"]
)
def test_both_copies_of_the_word_table_stay_bitwise_equal(small_dataset, tmp_path, precision):
    # In fp16 with float32 sums DeepSpeed alone would sum nothing over the stages.
    case = Case(accumulation=2, precision=precision)
    first, middle, last = run_ranks(word_table_after_training, 3, small_dataset, tmp_path, case)
    assert middle is None
    assert torch.equal(first, last)
    fresh = MaskedLanguageModel(architecture(small_dataset.tokenizer.vocab_size), seed=3)
    assert not torch.equal(first, fresh.embeddings.word.weight)


def test_the_stages_together_are_the_plain_model(small_dataset):
    config = architecture(small_dataset.tokenizer.vocab_size)
    plain = dict(MaskedLanguageModel(config, seed=3).named_parameters())
    for stages in (1, 3, 5):
        split = split_model(masked_lm_parts(config), stages, Load(2, LENGTH, 0.3 * LENGTH))
        parts = [dict(build_stage(config, split.units(s), seed=3).named_parameters()) for s in range(stages)]
        for name, parameter in ((n, p) for part in parts for n, p in part.items()):
            assert torch.equal(parameter, plain[name]), name
        seen = {name: sum(name in part for part in parts) for name in plain}
        assert min(seen.values()) == 1
        shared = {"embeddings.word.weight"} if stages > 1 else set()
        assert {name for name, count in seen.items() if count > 1} == shared
