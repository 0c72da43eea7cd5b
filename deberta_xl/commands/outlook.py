"""What a run will take, said before its first step: operations and days, disk; and settings that look like a slip."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deberta_xl.base.log import rank_zero
from deberta_xl.checkpoint.manifest import step_folders
from deberta_xl.model.parts import uncounted
from deberta_xl.planning.cost import REFERENCE_FLOPS, rank_hours
from deberta_xl.planning.hardware import device_gibibytes
from deberta_xl.planning.outlook import Outlook
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.objectives import generator_architecture
from deberta_xl.settings.pretraining import DataSection

if TYPE_CHECKING:
    from deberta_xl.commands.pretraining import PretrainingInputs

MANY_EPOCHS = 100
"""Repeated text is worth less from about 4 passes on and nothing beyond some 40 (arXiv 2305.16264)."""
OF_MASKING = ("masking", "mask_probability", "max_ngram", "replace_with_mask", "replace_with_random")
"""Settings of `data` that only masked tokens read."""
V3_MASKING = {"max_ngram": 1, "replace_with_mask": 1.0, "replace_with_random": 0.0}
"""How `data` masks for the generator of DeBERTaV3; the defaults are the masked-LM's."""
FEW_LONG = 0.1
"""Share of the tokens in documents that need longer rows, below which these teach little."""
SPARE_ROWS = 1000
"""Rows of the word table beyond the tokenizer's pieces that pass as padding to a round number."""


def print_memory(outlook: Outlook) -> None:
    """What a rank needs, on rank 0; of a pipeline one line for each stage."""
    stages = outlook.memory()
    where = f"{outlook.kernel} attention on {outlook.platform.describe()}"
    for stage, needed in enumerate(stages):
        of_stage = f" of stage {stage}" if len(stages) > 1 else ""
        rank_zero("each rank%s: %s estimated, with %s", of_stage, needed.describe(), where)
    if parts := uncounted(outlook.work.parts):
        rank_zero("memory and work leave out what is not known of: %s", ", ".join(parts))


def print_outlook(outlook: Outlook) -> None:
    """Work, disk, what fits the device, and whether the disk does, on rank 0."""
    rank_zero("work: %s", describe_work(outlook))
    rank_zero("checkpoints: %s", describe_disk(outlook))
    if (gibibytes := device_gibibytes()) is not None:
        rank_zero("%s", describe_fit(outlook, gibibytes))
    if warning := disk_warning(outlook):
        rank_zero("%s", warning, level=logging.WARNING)


def describe_work(outlook: Outlook) -> str:
    """`1.2e+21 operations; if each of 8 ranks keeps up 100 TFLOP/s, 17.36 days = 3,333.3 rank hours`.

    Texts to fine-tune on are shorter than the longest; how much, is not looked at.
    """
    hours, ranks = rank_hours(outlook.flops), outlook.grid.world_size
    at_most = "at most " if isinstance(outlook.config, FinetuneConfig) else ""
    return (
        f"{at_most}{outlook.flops:.2g} operations; if {f'each of {ranks} ranks' if ranks > 1 else 'the rank'} keeps up "
        f"{REFERENCE_FLOPS / 1e12:.0f} TFLOP/s, {hours / ranks / 24:,.2f} days = {hours:,.1f} rank hours"
    )


def describe_disk(outlook: Outlook) -> str:
    """`18.81 GB each, at most 4 at a time: 75.26 GB, of 512 GB free`."""
    each, count, free = outlook.checkpoint_bytes, outlook.num_checkpoints, free_bytes(Path(outlook.config.run.folder))
    total = f"{count * each / 1e9:,.2f} GB, of {free / 1e9:,.0f} GB free"
    return f"{each / 1e9:,.2f} GB each, at most {count} at a time: {total}"


def free_bytes(folder: Path) -> int:
    """Free disk where a folder is or will be."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def describe_fit(outlook: Outlook, gibibytes: float) -> str:
    """Which micro-batches fit a device of so many GiB, with and without recomputation."""
    found = []
    for recomputes in (False, True):
        largest = outlook.largest_micro_batch(gibibytes, recomputes=recomputes)
        setting = f"train.activation_checkpointing={str(recomputes).lower()}"
        found.append(f"{largest} with {setting}" if largest else f"none with {setting}")
    return f"largest train.micro_batch_size that fits GPU_MEMORY_GIB={gibibytes:g}: {', '.join(found)}"


def disk_warning(outlook: Outlook) -> str | None:
    """Whether the checkpoints of a new run do not fit."""
    folder = Path(outlook.config.run.folder)
    needed, free = outlook.checkpoint_bytes * outlook.num_checkpoints, free_bytes(folder)
    if needed <= free or step_folders(folder / "checkpoints"):
        return None
    return (
        f"{needed / 1e9:,.1f} GB of checkpoints do not fit the {free / 1e9:,.1f} GB that are free for "
        f"{folder}: a smaller checkpoint.keep, another run.folder, or make room"
    )


def slips(inputs: PretrainingInputs) -> Iterator[str]:
    """Settings of pretraining that nobody means."""
    train, architecture, rows = inputs.config.train, inputs.architecture, inputs.data.num_rows
    epochs = train.steps * train.global_batch_size / rows
    if epochs > MANY_EPOCHS:
        yield (
            f"the run reads its {rows:,} rows {epochs:,.0f} times: more text, or "
            f"train.steps={max(1, round(MANY_EPOCHS * rows / train.global_batch_size))} for {MANY_EPOCHS} times"
        )
    yield from short_documents(inputs)
    yield from objective_slips(inputs)
    spare = architecture.vocab_size - inputs.tokenizer.vocab_size
    if spare > max(SPARE_ROWS, inputs.tokenizer.vocab_size // 10):
        yield (
            f"model.vocab_size={architecture.vocab_size}, but the tokenizer has {inputs.tokenizer.vocab_size} pieces: "
            f"{spare:,} rows of the word table ({spare * architecture.embedding_width:,} parameters) will never be "
            "trained; leave model.vocab_size out to take the tokenizer's size"
        )


def short_documents(inputs: PretrainingInputs) -> Iterator[str]:
    """Rows that grow longer over documents that do not."""
    lengths = [stretch.length for stretch in inputs.config.stretches]
    if inputs.config.data.attend_across_documents:
        return
    for shorter, longer in itertools.pairwise(lengths):
        share = inputs.data.share_in_longer_documents(shorter)
        if share < FEW_LONG:
            yield (
                f"train.lengths has rows of {longer} tokens after those of {shorter}, but only {100 * share:.1f} % of "
                f"the dataset's tokens stand in documents longer than {shorter}: the others meet nothing new in longer "
                "rows; longer documents, or data.attend_across_documents=true"
            )


def objective_slips(inputs: PretrainingInputs) -> Iterator[str]:
    """Settings that are at odds with what is learned."""
    config, architecture = inputs.config, inputs.architecture
    if inputs.built_in == "replaced_tokens":
        generator = generator_architecture(architecture, config.generator)
        for name in ("num_layers", "hidden_size"):
            own, other = getattr(generator, name), getattr(architecture, name)
            if own > other:
                yield (
                    f"generator.{name}={own} is more than model.{name}={other}, of the discriminator: the generator is "
                    f"meant to be the smaller model; leave generator.{name} out for one that fits"
                )
        other = {name: value for name, value in V3_MASKING.items() if getattr(config.data, name) != value}
        if other:
            yield (
                f"train.objective={config.train.objective} with "
                f"{', '.join(f'data.{name}={getattr(config.data, name)}' for name in other)} masks for its generator "
                "as masked_lm does, which is not how DeBERTaV3 was pretrained; for that set "
                f"{' '.join(f'data.{name}={value}' for name, value in other.items())}"
            )
    if config.train.objective in ("causal", "prefix"):
        idle = [name for name in OF_MASKING if getattr(config.data, name) != getattr(DataSection, name)]
        if idle:
            yield f"train.objective={config.train.objective} masks nothing: data.{', data.'.join(idle)} has no effect"
    if inputs.built_in == "mixed" and config.train.global_batch_size == config.train.micro_batch_size:
        yield (
            f"train.objective={config.train.objective} draws what each micro-batch predicts, and a step is one "
            f"micro-batch of {config.train.micro_batch_size} sequences: with a smaller train.micro_batch_size a step "
            "has both kinds"
        )
