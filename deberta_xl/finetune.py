"""Fine-tune a DeBERTa on a task. Started by `deepspeed`, `torchrun`, `srun` (one Python per rank) or plain `python`.

deepspeed deberta_xl/finetune.py --config finetune_sift --deepspeed_config deepspeed_configs/zero1_bf16.json \\
    --task sst2 --data glue/SST-2 --init runs/base run.folder=runs/sst2
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, Python searches this file's folder first and would find our `data` and `model` as top-level names.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from deberta_xl.base.interruption import be_quick_while_importing

    be_quick_while_importing()

from deberta_xl.commands import finetuning
from deberta_xl.commands.training_command import run_command

if __name__ == "__main__":
    run_command(finetuning)
