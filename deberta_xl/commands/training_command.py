"""What stands around every training command: read and check, train, and report a failure so that no peer waits for it.

Imports no torch: what can be checked without it is checked before the first expensive second.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from deberta_xl.base.allocator import let_segments_grow
from deberta_xl.base.errors import ConfigError, Diverged, HopelessRunError, PeerError, UserError
from deberta_xl.base.launch import read_launch
from deberta_xl.base.log import configure_logging, logger, rank_zero
from deberta_xl.base.screen import screen
from deberta_xl.base.stop_request import StopRequest
from deberta_xl.commands.inputs import Inputs, print_description
from deberta_xl.run.rendezvous import meeting_point
from deberta_xl.settings.finetuning import FinetuneConfig
from deberta_xl.settings.presets import to_toml
from deberta_xl.settings.pretraining import RunConfig

if TYPE_CHECKING:
    from deberta_xl.training.loop import Training

REFUSED = 4
"""Exit status of ranks that a user's error ends before the first step, or whose run is hopeless (it has diverged, or no
labels): another start would end there, too.

Not 2, which Python gives when it cannot open a script; `slurm/lib/launch.sh` knows this number."""


class TrainingCommand(Protocol):
    """What distinguishes a training command from another: the functions of a module (pretraining.py, finetuning.py)."""

    def parse_arguments(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Its command line."""

    def read_config(self, name: str, overrides: Sequence[str]) -> RunConfig | FinetuneConfig:
        """The configuration of --config and the overrides. Raises UserError."""

    def read_inputs(self, arguments: argparse.Namespace) -> Inputs:
        """Everything that a run is assembled from. Raises UserError for what cannot be."""


def run_command(command: TrainingCommand) -> None:
    """A training command from its arguments on.

    With `--check` the run is only described, after a look at its folder, which may refuse it as well.
    """
    arguments = command.parse_arguments()
    configure_logging()
    let_segments_grow()
    stop = None if arguments.print_config else StopRequest()
    try:
        if arguments.print_config:
            text = to_toml(command.read_config(arguments.config, arguments.overrides))
            sys.stdout.write(text if read_launch().rank == 0 else "")
            return
        if arguments.ranks is None:
            meeting_point(read_launch())
        inputs = command.read_inputs(arguments)
        if arguments.check:
            look_ahead(inputs)
    except UserError as error:
        complain_once_per_node(error)
        sys.exit(2)
    except OSError as error:  # a file that may not be read, or a name that no system has
        complain_once_per_node(UserError(f"{error.filename}: {error.strerror}" if error.filename else str(error)))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if arguments.check:
        print_description(inputs)
    else:
        train_and_report(lambda: assemble(inputs, stop))
        part_from_peers()


def part_from_peers() -> None:
    """Leave the process groups: left to the interpreter's end, their threads now and then abort a run that is done."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def look_ahead(inputs: Inputs) -> None:
    """Refuse what the start would refuse for its run folder's sake."""
    from deberta_xl.commands.look_ahead import check_run_folder

    check_run_folder(inputs.config.run.folder, lambda: inputs.objective().fingerprints, inputs.total_steps)


def assemble(inputs: Inputs, stop: StopRequest) -> Training:
    """Everything the loop works with. Collective."""
    from deberta_xl.training.assembly import assemble_training

    return assemble_training(inputs, inputs.objective(), stop, describe=lambda: print_description(inputs))


def train_and_report(assemble: Callable[[], Any]) -> None:
    """Train. A failure is reported with rank, step and phase and ends the process."""
    run, rank = None, read_launch().rank
    try:
        choose_accelerator()
        run = assemble()
        if rank == 0:
            run.folder.write_state("running")
        ended = run.train()
        rank_zero("%s at step %d; results in %s", ended, run.state.step, run.folder.path)
    except HopelessRunError as error:
        report_hopeless(run, rank, error)
        leave(REFUSED)
    except UserError as error:
        logger.error("rank %d, %s: %s", rank, place(run), error)
        # Later ones may pass, as a full disk does: such a run has crashed, and may be started again.
        leave(REFUSED if run is None else 2)
    except PeerError as error:
        logger.error("rank %d, %s: %s", rank, place(run), error)
        leave(1)
    except KeyboardInterrupt:
        logger.error("rank %d, %s: interrupted; start the same command again to go on", rank, place(run))
        leave(130)
    except BaseException as error:
        traceback.print_exc()
        logger.error("rank %d failed at %s: %s: %s", rank, place(run), type(error).__name__, error)
        leave(1)


def report_hopeless(run: Any, rank: int, error: HopelessRunError) -> None:
    """Say once what all ranks have found, with the way out, and note in the run folder that nothing else will help."""
    from deberta_xl.checkpoint.together import on_rank_zero

    def note() -> None:
        if isinstance(error, Diverged):
            logger.error("%s: %s. %s", place(run), error, run.safeguard.way_out())
            run.folder.write_state("diverged")
        else:
            logger.error("%s: %s", place(run), error)

    try:
        on_rank_zero(note)  # no rank leaves before it is done: a launcher kills the others then
    except UserError as problem:
        logger.error("rank %d: %s", rank, problem)
    run.heartbeat.mark(run.state.step, "stopped")
    run.heartbeat.close()


def choose_accelerator() -> None:
    """Tell DeepSpeed what to run on before it is imported: it warns at length when it has to guess.

    Raises ConfigError when DS_ACCELERATOR asks for what is not here, and for GPUs that torch cannot use.
    """
    import torch

    from deberta_xl.run.devices import refuse_unusable_gpus

    refuse_unusable_gpus()
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    chosen = os.environ.setdefault("DS_ACCELERATOR", here[-1])
    if chosen not in here:
        raise ConfigError(f"DS_ACCELERATOR={chosen}, but there is {' and '.join(here)} here: env -u DS_ACCELERATOR ...")


def place(run: Any) -> str:
    """Where a run is, for an error message."""
    return "start" if run is None else f"step {run.heartbeat.step}, phase {run.heartbeat.phase}"


def leave(status: int) -> NoReturn:
    """End this process at once: threads and collectives of a broken run are not waited for."""
    screen.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def complain_once_per_node(error: UserError) -> None:
    """Log an error of the start, which every rank finds: what is wrong with a file may be wrong on one node only."""
    try:
        is_first = read_launch().local_rank == 0
    except ConfigError:  # nobody knows who is the first: each says it
        is_first = True
    if is_first:
        logger.error("%s", error)
