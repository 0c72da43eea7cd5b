"""What the pre-flight makes of the ranks' reports, and that it runs through on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import free_port, rank_environment
from torch import Tensor

from deberta_xl.base.launch import Launch
from deberta_xl.run import preflight
from deberta_xl.run.preflight import judge, look, multiply, sum_over_all


def report(rank: int, **changes: Any) -> dict[str, Any]:
    """A good report."""
    good = {"complaints": [], "uuid": f"GPU-{rank}", "flops": 1e12, "time": 50.0, "arrived": 50.1}
    return {"node": f"n{rank // 2 + 1}", "rank": rank, **good, **changes}


def test_good_reports_give_no_verdict():
    assert judge([report(rank) for rank in range(4)], []) == {}


def test_a_complaint_is_put_down_to_its_node_once():
    same = {"complaints": ["/dev/shm has 1 MiB free; needed: 64"]}
    assert judge([report(0), report(2, **same), report(3, **same)], []) == {"n2": same["complaints"]}


def test_silent_ranks_are_counted_by_node():
    (node,) = verdict = judge([report(0), report(1)], ["n2", "n2"])
    assert node == "n2"
    assert verdict["n2"][0].startswith("2 ranks did not report within")


def test_two_ranks_with_the_same_gpu_and_a_wrong_clock_are_named():
    verdict = judge([report(0), report(1, uuid="GPU-0"), report(2, time=3650.0), report(3)], [])
    assert verdict["n1"] == ["ranks 0 and 1 were given the same GPU GPU-0"]
    assert "its clock differs by -3600 s" in verdict["n2"][0]


def test_gpus_that_torch_does_not_see_and_too_little_memory_are_complaints(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(preflight.torch.version, "cuda", None)
    monkeypatch.setenv("SLURM_STEP_GPUS", "0,1")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage(2**20))
    complaints = look(Launch(), tmp_path)["complaints"]
    assert complaints[0].startswith("2 GPUs are allotted, but torch")
    assert "it is a build for CPUs" in complaints[0]
    assert [text.split(" has ")[0] for text in complaints[1:]] == ["the run folder", "/dev/shm"]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert len(look(Launch(), tmp_path)["complaints"]) == 2


def test_more_ranks_than_gpus_are_a_complaint(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(preflight.torch.cuda, "device_count", lambda: 2)
    (complaint,) = look(Launch(2, 3, 2), tmp_path)["complaints"]
    assert complaint.startswith("rank 2 of this node has no device: only 2 are visible")


def test_a_wrong_product_is_noticed(monkeypatch):
    assert multiply("cpu") > 0
    monkeypatch.setattr(preflight.torch, "ones", lambda *size, device: preflight.torch.torch.full(size, 1.5))
    with pytest.raises(ArithmeticError, match="wrong"):
        multiply("cpu")


@pytest.mark.parametrize("world_size", [2, 6144])
def test_a_right_sum_over_thousands_of_ranks_is_taken_for_right_and_a_wrong_one_for_wrong(monkeypatch, world_size):
    def all_reduce(values: Tensor) -> None:
        own, total = values.clone(), torch.zeros_like(values)
        for rank in range(world_size):
            total += own.new_full(own.shape, rank)
        values.copy_(total + lost)

    monkeypatch.setattr(preflight, "SUMMED", 2)
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(preflight.dist, name, lambda *_, **__: None)
    monkeypatch.setattr(preflight.dist, "all_reduce", all_reduce)
    lost = 0
    sum_over_all(dist.HashStore(), Launch(world_size - 1, world_size, 0))
    lost = -1
    with pytest.raises(ArithmeticError, match="a sum over all ranks is wrong"):
        sum_over_all(dist.HashStore(), Launch(world_size - 1, world_size, 0))


def test_two_ranks_pass(tmp_path):
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"NODE_NAMES": "n1 n2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "deberta_xl.run.preflight", str(tmp_path)],
            env=environment | rank_environment(rank, 2, (port - 1024) % 30000 + 20000) | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "pre-flight passed" in outputs[0]
