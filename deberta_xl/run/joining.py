"""How the ranks of a tool meet, without an engine (`start_engine_runtime` of training/engine.py is a command's way)."""

from __future__ import annotations

import atexit

import torch
import torch.distributed as dist

from deberta_xl.base.launch import Launch, device_number
from deberta_xl.run.rendezvous import export_launch
from deberta_xl.run.roll_call import all_ranks_here


def join_ranks(launch: Launch) -> torch.device:
    """This rank's device; with several ranks, after meeting the others."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", device_number(launch.local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)  # before the ranks meet: nccl takes the current one
    if launch.world_size > 1:
        export_launch(launch)
        with all_ranks_here(launch):
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        # Left to the interpreter's end, its threads now and then abort a process that has done its work.
        atexit.register(dist.destroy_process_group)
    return device
