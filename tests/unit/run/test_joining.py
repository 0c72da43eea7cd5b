"""How the ranks of a tool meet."""

from __future__ import annotations

import contextlib

import torch

from deberta_xl.base.launch import Launch
from deberta_xl.run import joining as module
from deberta_xl.run.joining import join_ranks


def test_a_rank_that_sees_only_its_own_gpu_takes_it_before_it_meets_the_others(monkeypatch):
    acts = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", acts.append)
    monkeypatch.setattr(module, "export_launch", lambda launch: None)
    monkeypatch.setattr(module, "all_ranks_here", lambda launch: contextlib.nullcontext())
    monkeypatch.setattr(module.dist, "init_process_group", acts.append)
    monkeypatch.setattr(module.atexit, "register", lambda action: None)
    assert join_ranks(Launch(rank=3, world_size=4, local_rank=3)) == torch.device("cuda", 0)
    assert acts == [torch.device("cuda", 0), "nccl"]
