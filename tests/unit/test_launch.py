"""Which rank this process is, by whatever launcher."""

from __future__ import annotations

import socket

import pytest

from deberta_xl.errors import ConfigError
from deberta_xl.launch import Launch, address_of_interface, device_number, export_launch, interface_towards, read_launch

SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "123"}


def test_alone_without_a_launcher():
    assert read_launch({}) == Launch(0, 1, 0)


def test_deepspeed_and_torchrun_set_three_variables():
    assert read_launch({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Launch(5, 8, 1)


def test_srun_is_recognised_by_its_step():
    assert read_launch(SRUN) == Launch(3, 4, 1)


def test_a_batch_script_without_srun_is_one_rank_although_slurm_counts_more():
    assert read_launch({key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}) == Launch()


@pytest.mark.parametrize("rank", ["8", "x"])
def test_variables_that_contradict_each_other_are_shown(rank):
    with pytest.raises(ConfigError, match="RANK"):
        read_launch({"RANK": rank, "WORLD_SIZE": "8", "LOCAL_RANK": "0"})


def test_a_rank_takes_its_own_device_or_the_only_one_it_sees():
    assert [device_number(local_rank, 4) for local_rank in range(4)] == [0, 1, 2, 3]
    assert device_number(3, 1) == 0
    with pytest.raises(ConfigError, match="rank 2 of this node has no device: only 2 are visible"):
        device_number(2, 2)


def test_what_the_launcher_left_out_is_filled_in():
    environment = dict(SRUN, SLURM_NNODES="1")
    export_launch(read_launch(environment), environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("3", "4", "1")
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert environment["MASTER_PORT"] == "20123"


def test_what_the_launcher_said_is_kept():
    environment = {"MASTER_ADDR": "node1", "MASTER_PORT": "5"}
    export_launch(Launch(1, 2, 1), environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("node1", "5")


def test_several_nodes_need_an_address_to_meet_at():
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        export_launch(Launch(3, 4, 1), dict(SRUN, SLURM_NNODES="2"))


def test_gloo_is_told_the_interface_that_leads_to_the_first_node():
    assert interface_towards("127.0.0.1", 5) is None  # this machine alone: gloo's own choice is right
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    with socket.socket() as probe:
        addresses = {name: address for name in names if (address := address_of_interface(probe, name))}
    for name, address in addresses.items():
        assert interface_towards(address, 5) in (None, name)
    environment = {"MASTER_ADDR": "n1", "MASTER_PORT": "5", "GLOO_SOCKET_IFNAME": "ib0"}
    export_launch(Launch(1, 2, 1), environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "ib0"
    assert interface_towards("no.such.name.invalid", 5) is None
