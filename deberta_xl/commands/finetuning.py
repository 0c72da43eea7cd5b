"""A fine-tuning run's command line and inputs, read and checked before DeepSpeed is imported."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deberta_xl.base.errors import ConfigError, counted
from deberta_xl.base.log import rank_zero
from deberta_xl.checkpoint.manifest import step_folders
from deberta_xl.commands.arguments import parse, training_parser
from deberta_xl.commands.inputs import Inputs, Words, check_model, read_layout
from deberta_xl.commands.task_data import TRAIN, read_examples, tokenize_all
from deberta_xl.data.tokenizer import Tokenizer
from deberta_xl.planning.outlook import Outlook
from deberta_xl.planning.workload import task_workload
from deberta_xl.settings.architecture import DebertaConfig, HeadConfig
from deberta_xl.settings.finetuning import FinetuneConfig, SiftSection
from deberta_xl.settings.presets import load_config, model_folder
from deberta_xl.tasks.features import TaskData
from deberta_xl.tasks.labels import class_weights
from deberta_xl.tasks.task import Task, load_task, task_names

if TYPE_CHECKING:
    from deberta_xl.objectives.task import TaskObjective
    from deberta_xl.weights.foreign_heads import Pooling
    from deberta_xl.weights.head_facts import HeadFacts
    from deberta_xl.weights.native_config import Learnt

DEFAULT_PRESET = "finetune"
SHORT_FORMS = {"task": "task.name", "data": "task.data", "init": "train.init"}
"""Options of the command line that stand for keys of the configuration."""
EXAMPLE = """\
deepspeed --quiet --num_accelerators 2 deberta_xl/finetune.py --config finetune \\
      --deepspeed_config deepspeed_configs/cpu_debug.json --task sst2 --data glue/SST-2 --init runs/first \\
      run.folder=runs/sst2 train.epochs=3

docs/finetuning.md has tasks, SiFT, seeds."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --task, --data and --init are other words for keys of the configuration."""
    description = "Fine-tune a DeBERTa on DeepSpeed, with SiFT or without."
    parser = training_parser(description, EXAMPLE, FinetuneConfig)
    parser.add_argument("--task", help=f"a TOML file, or one of: {', '.join(task_names())}")
    parser.add_argument("--data", help="folder with the task's files")
    parser.add_argument("--init", help="folder of the pretrained (or fine-tuned) model to start from")
    parsed = parse(parser, arguments)
    given = {key: getattr(parsed, short) for short, key in SHORT_FORMS.items() if getattr(parsed, short) is not None}
    parsed.overrides += [f"{key}={value}" for key, value in given.items()]
    return parsed


@dataclass(frozen=True, kw_only=True)
class FinetuningInputs(Inputs):
    """Everything that a fine-tuning run is assembled from."""

    config: FinetuneConfig
    head: HeadFacts
    train_data: TaskData
    held_out: Mapping[str, TaskData]
    """Split -> its examples."""
    class_weights: np.ndarray | None
    """float32 [classes]; None where all count alike."""

    def objective(self) -> TaskObjective:
        """The task's."""
        from deberta_xl.objectives.task import TaskObjective

        return TaskObjective(
            self.config,
            self.architecture,
            self.head,
            self.tokenizer,
            self.train_data,
            self.held_out,
            self.class_weights,
        )

    @property
    def outlook(self) -> Outlook:
        """Of examples as long as they may be."""
        config, data = self.config, self.train_data
        work = task_workload(self.architecture, self.head.head, config, num_options=data.num_options)
        split = work.split(1, config.train.micro_batch_size)
        # One at each interval, and one whenever an evaluation is the best so far.
        evaluation_interval = config.evaluation.interval or len(data) / config.train.global_batch_size
        regular = math.ceil(self.total_steps / config.checkpoint.interval)
        num_saves = min(regular + math.ceil(self.total_steps / evaluation_interval), self.total_steps)
        return Outlook(work, config, self.engine, self.grid, split, self.total_steps, num_saves, self.platform)

    def words(self) -> Words:
        """`head: classification`; `32 examples`; `3.00 epochs of 67,349 examples; held out: valid 872`."""
        data, batch = self.train_data, self.config.train.global_batch_size
        held_out = ", ".join(f"{split} {len(of_split.examples):,}" for split, of_split in self.held_out.items())
        windows = f" in {counted(len(data), 'window')}" if len(data) != len(data.examples) else ""
        epochs, examples = self.total_steps * batch / len(data), counted(len(data.examples), "example")
        return Words(
            f"head: {self.head.head.kind}",
            counted(batch, "example"),
            f"{epochs:.2f} epochs of {examples}{windows}; held out: {held_out}",
        )

    def print_more(self) -> None:
        """What SiFT does."""
        if self.config.sift.weight:
            rank_zero("SiFT: %s", describe_sift(self.config.sift))


def describe_sift(sift: SiftSection) -> str:
    """What SiFT does in this run, in words."""
    return f"weight {sift.weight:g}, {sift.variant} variant, {counted(sift.steps, 'step')}, noise {sift.noise:g}"


def read_inputs(arguments: argparse.Namespace) -> FinetuningInputs:
    """Read and check configuration, launcher, the checkpoint's description and the task's files. Raises UserError."""
    config = read_config(arguments.config, arguments.overrides)
    refuse_pipeline(config)
    layout = read_layout(arguments, config)
    check_given(config)
    task = load_task(config.task.name)
    if config.train.class_weights != "none" and not task.has_classes:
        raise ConfigError(f"train.class_weights=balanced: a {task.head} has no classes to weigh; leave it at none")
    examples = read_examples(task, config)
    init = describe_init(config)
    architecture, tokenizer_folder = init.architecture, init.tokenizer_folder
    check_model(architecture, layout, config)
    tokenizer = Tokenizer.load(tokenizer_folder)
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ConfigError(f"{tokenizer_folder} has {tokenizer.vocab_size} ids, the model {architecture.vocab_size}")
    data = tokenize_all(task, examples, tokenizer, config)
    tell_of_longer_rows(init.learnt, data[TRAIN], config)
    head = describe_head(task, data[TRAIN].labels, architecture, init.pooling, config)
    if not config.train.fresh_weights and not step_folders(Path(config.run.folder) / "checkpoints"):
        check_weights(config, architecture, head)
    train_data = data.pop(TRAIN)
    total_steps = config.train.total_steps(len(train_data))
    balanced = config.train.class_weights == "balanced"
    return FinetuningInputs(
        config=config, **layout._asdict(), tokenizer=tokenizer, tokenizer_folder=tokenizer_folder,
        architecture=architecture, total_steps=total_steps, head=head, train_data=train_data, held_out=data,
        schedule=config.schedule.for_steps(total_steps),
        class_weights=class_weights(task, head.head.num_labels, train_data.examples) if balanced else None,
    )  # fmt: skip


def read_config(name: str, overrides: Sequence[str]) -> FinetuneConfig:
    """The configuration of a preset or TOML file; of a model's folder, the preset `finetune` of that model."""
    folder = model_folder(name, FinetuneConfig)
    if folder is None:
        return load_config(name, overrides, FinetuneConfig)
    config = load_config(DEFAULT_PRESET, [f"train.init={folder}", *overrides], FinetuneConfig)
    if config.train.init is None or Path(config.train.init).resolve() != folder.resolve():
        raise ConfigError(
            f"--config {folder}: a fine-tuned model has the architecture of the one it starts from, which is to be "
            f"{config.train.init}; leave out one of the two (--config {DEFAULT_PRESET} goes with any)"
        )
    return config


def check_weights(config: FinetuneConfig, architecture: DebertaConfig, head: HeadFacts) -> None:
    """Refuse a checkpoint to start from without the tensors that it should have."""
    from deberta_xl.weights.initial_encoder import peek_encoder

    peek_encoder(Path(config.train.init), architecture, head.head)


def refuse_pipeline(config: FinetuneConfig) -> None:
    """Stages pass on one forward per micro-batch; fine-tuning's objective makes several."""
    stages = config.parallel.pipeline_parallel_size
    if stages > 1:
        raise ConfigError(
            f"parallel.pipeline_parallel_size={stages} is for pretraining; fine-tuning divides a model by "
            "parallel.tensor_parallel_size and the ZeRO stage of the DeepSpeed JSON"
        )


def check_given(config: FinetuneConfig) -> None:
    """Refuse a run without task, data or checkpoint."""
    for short, key in SHORT_FORMS.items():
        section, name = key.split(".")
        if getattr(getattr(config, section), name) is None:
            raise ConfigError(f"{key} is not set: give it by --{short} (deberta_xl/finetune.py --help has an example)")


class Init(NamedTuple):
    """What has to be known of the checkpoint to start from, before its weights are read."""

    architecture: DebertaConfig
    pooling: Pooling
    tokenizer_folder: Path
    learnt: Learnt


def describe_init(config: FinetuneConfig) -> Init:
    """Of the folder that `train.init` names. Raises UserError where it is none, or has no tokenizer."""
    from deberta_xl.weights.initial_encoder import peek_init, peek_pooling
    from deberta_xl.weights.named_folder import find_tokenizer, learnt_in

    folder, architecture = peek_init(Path(config.train.init))
    learnt = learnt_in(folder)
    if (objective := learnt.objective) in ("causal", "prefix"):
        rank_zero("train.init=%s was trained with train.objective=%s: its tokens saw less than now", folder, objective)
    pooling = peek_pooling(folder, architecture)
    return Init(config.model.applied_to(architecture), pooling, find_tokenizer(folder), learnt)


def tell_of_longer_rows(learnt: Learnt, data: TaskData, config: FinetuneConfig) -> None:
    """Say how many examples have positions of which the checkpoint to start from has learnt nothing."""
    longer = int((data.lengths > (learnt.sequence_length or config.model.sequence_length)).sum())
    if longer and not config.train.fresh_weights:
        rank_zero(
            "%d of %d examples or windows to train on are longer than the %d tokens of a row that train.init was "
            "trained on: positions behind those are learnt here alone", longer, len(data), learnt.sequence_length,
        )  # fmt: skip


def describe_head(
    task: Task, labels: Sequence[str], architecture: DebertaConfig, pooling: Pooling, config: FinetuneConfig
) -> HeadFacts:
    """The head that the task needs, and what has to be known to use it."""
    from deberta_xl.weights.head_facts import HeadFacts

    chosen = config.model.head_dropout
    num_labels = len(labels) if task.has_classes else 2 if task.head == "span" else 1
    dropout = architecture.hidden_dropout if chosen is None else chosen
    head = HeadConfig(kind=task.head, num_labels=num_labels, dropout=dropout)
    if head.is_pooled:
        head = dataclasses.replace(head, **pooling._asdict())
    lengths = config.model.sequence_length, config.model.document_stride
    return HeadFacts(head, list(labels), task, *lengths, config.sift.normalizes_twice)
