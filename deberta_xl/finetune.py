"""Fine-tune a DeBERTa on a task. Started by `deepspeed`, `torchrun`, `srun` (one Python per rank) or plain `python`.

deepspeed deberta_xl/finetune.py --config finetune_sift --deepspeed_config deepspeed_configs/zero1_bf16.json \\
    --task sst2 --data glue/SST-2 --init runs/base run.folder=runs/sst2
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Run as a script, Python searches this file's folder first and would find our `data` and `config` as top-level names.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from deberta_xl.interruption import be_quick_while_importing

    be_quick_while_importing()

from deberta_xl.commands.finetuning import parse_arguments, read_config, read_inputs
from deberta_xl.commands.training_command import run_command

if TYPE_CHECKING:
    from deberta_xl.training.loop import Training


def keep_best_weights(run: Training) -> None:
    """Write the best weights alone, without the optimizer's state, into the run folder's `best`. Collective."""
    from deberta_xl.checkpoint.agreement import on_rank_zero
    from deberta_xl.checkpoint.finetuned_folder import replace_best
    from deberta_xl.training.heartbeat import Heartbeat

    # Reading and writing a model takes a while, which the run's own heartbeat has not lived to see.
    heartbeat = Heartbeat(run.folder.heartbeat, run.launch.rank, run.ownership)
    heartbeat.mark(run.state.step, "best weights")
    on_rank_zero(lambda: replace_best(run.folder.path, run.state.best_step))
    heartbeat.mark(run.state.step, "done")
    heartbeat.close()


def main() -> None:
    """The command."""
    run_command(
        parse_arguments(),
        read_config=read_config,
        read_inputs=read_inputs,
        conclude=keep_best_weights,
    )


if __name__ == "__main__":
    main()
