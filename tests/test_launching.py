"""How many processes a launcher was asked for, and the command that starts them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sa_lens import cli, launching
from sa_lens.launching import Launch, check_processes, unfinished_launch

TRAIN = ["-m", "sa_lens", "train", "--out", "launch", "--train.steps", "3"]


@pytest.fixture
def accelerate_started(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment in which `accelerate launch --cpu --num_processes 2` starts its only process."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"ACCELERATE_DYNAMO_BACKEND": "NO", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize(
    ("command", "launch"),
    [
        (["python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "2", *TRAIN], Launch(2, 1, 0, True)),
        (["/bin/accelerate-launch", "--num_processes=3", "--cpu", *TRAIN], Launch(3, 1, 0, True)),
        (["python", "-m", "accelerate.commands.launch", "--num_processes", "4", *TRAIN], Launch(4, 1, 0, False)),
        (
            [
                "accelerate",
                "launch",
                "--cpu",
                "--num_processes",
                "6",
                "--num_machines",
                "3",
                "--machine_rank",
                "2",
                *TRAIN,
            ],
            Launch(6, 3, 2, True),
        ),
    ],
)
def test_the_number_asked_for_is_read_from_the_command_line(command, launch, accelerate_started):
    accelerate_started.setattr(launching, "_parent", lambda: command)
    assert unfinished_launch() == launch


def test_the_number_asked_for_is_read_from_a_configuration_file(accelerate_started, tmp_path):
    file = tmp_path / "accelerate.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 5\nuse_cpu: true\n"
        "num_machines: 1\nmachine_rank: 0\nmixed_precision: 'no'\ndebug: false\n"
    )
    command = ["python", "/bin/accelerate", "launch", "--config_file", str(file), *TRAIN]
    accelerate_started.setattr(launching, "_parent", lambda: command)
    assert unfinished_launch() == Launch(5, 1, 0, True)


def test_nothing_is_unfinished_where_one_was_asked_for_or_all_are_there(accelerate_started):
    accelerate_started.setattr(launching, "_parent", lambda: ["accelerate", "launch", "--num_processes", "1", *TRAIN])
    assert unfinished_launch() is None
    accelerate_started.setattr(launching, "_parent", lambda: pytest.fail("the parent is of no interest"))
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        with accelerate_started.context() as patch:
            patch.setenv(name, "2")
            assert unfinished_launch() is None
    accelerate_started.delenv("ACCELERATE_DYNAMO_BACKEND")
    assert unfinished_launch() is None, "a cluster may set MASTER_ADDR for everybody"


def test_a_parent_that_is_no_launcher_is_an_error(accelerate_started):
    accelerate_started.setattr(launching, "_parent", lambda: ["bash", "-c", "launch"])
    with pytest.raises(RuntimeError, match=r"one process of several .* torchrun --nproc_per_node N"):
        unfinished_launch()


def test_the_command_starts_the_processes_of_this_machine(accelerate_started):
    assert Launch(2, 1, 0, True).command(["sa_lens", "train"]) == [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "sa_lens", "train")
    ]
    command = Launch(6, 3, 2, True).command(["sa_lens", "train"])
    assert {"--nproc_per_node=2", "--nnodes=3", "--node_rank=2", "--master_addr=10.0.0.1"} <= {*command}


def test_the_command_line_starts_the_processes_that_accelerate_left_out(accelerate_started, tmp_path: Path):
    """`accelerate launch --cpu --num_processes 2` must train with two processes."""
    arguments = ["train", "--out", str(tmp_path / "run"), "--train.steps", "3", "--device", "cpu"]
    command = ["python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "sa_lens", *arguments]
    accelerate_started.setattr(launching, "_parent", lambda: command)

    class Replaced(BaseException):
        pass

    started = []

    def execv(path: str, command: list[str]) -> None:
        started.append(command)
        raise Replaced

    accelerate_started.setattr(os, "execv", execv)
    with pytest.raises(Replaced):
        cli.main(arguments)
    assert started == [Launch(2, 1, 0, True).command(["sa_lens", *arguments])]


def test_fewer_processes_than_asked_for_are_an_error(accelerate_started):
    accelerate_started.setattr(launching, "_parent", lambda: ["accelerate", "launch", "--num_processes", "2", *TRAIN])
    with pytest.raises(RuntimeError, match="2 processes were asked for, but 1 would train"):
        check_processes(1)
    accelerate_started.setenv("WORLD_SIZE", "4")
    check_processes(4)
    with pytest.raises(RuntimeError, match="4 processes were asked for, but 1 would train"):
        check_processes(1)
