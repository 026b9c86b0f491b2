"""Several processes that share a run: `accelerate launch` or `torchrun` starts them, this keeps them apart.

The first process plans the run and hands the plan to the others through the launcher's key-value store. After that no
process waits for another, so that one that dies takes nothing with it. Pictures, names and seeds come from the plan,
whatever the number of processes.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from library.errors import EnvironmentFault
from library.plan.run_plan import RunPlan
from library.run.manifest import ended, jobs_noted

if TYPE_CHECKING:  # torch is imported where there are several processes
    from torch.distributed import Store

Thing = TypeVar("Thing")

_PLANNING_LIMIT = timedelta(hours=2)  # how long the others wait for the plan; thousands of pictures may be checked
_PATIENCE_S = 60  # how long the first process waits, once it is done, for one that it has not heard of
_POLL_S = 0.3
_COUNT_EVERY_S = 2


@dataclass(frozen=True)
class Team:
    """The processes of a run, seen from one of them; by itself a process is the first of one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    launched_in: Path | None = None  # a folder of the launcher's, the same for all processes of this machine
    _sent: list[str] = field(default_factory=list)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Team":
        """What the launcher says in the variables that PyTorch defined for this."""
        try:
            rank, size, local_rank = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        except (KeyError, ValueError):
            return cls()
        error_file = environment.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/LOCAL_RANK/error.json
        return cls(rank, size, local_rank, Path(error_file).parent.parent if error_file else None)

    @property
    def is_first(self) -> bool:
        """Whether this process plans, shows progress and sums up."""
        return self.rank == 0

    def share(self, things: Sequence[Thing]) -> Sequence[Thing]:
        """This process's share: every `size`-th, so that expensive neighbours are spread."""
        return things[self.rank :: self.size]

    # -- messages, each sent once -------------------------------------------------------------------------------------

    @cached_property
    def _store(self) -> "Store":
        import torch.distributed

        store, _, _ = next(torch.distributed.rendezvous("env://", self.rank, self.size))
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return torch.distributed.PrefixStore(f"gen_img_diffusers/{restarts}", store)

    def send_plan(self, plan: RunPlan | None) -> None:
        """Hand the plan to the other processes; None when there is nothing for them to do. Later calls do nothing."""
        if self.size > 1 and self.is_first and "plan" not in self._sent:
            self._sent.append("plan")
            self._store.set("plan", json.dumps(plan and plan.to_share()))

    def receive_plan(self) -> Mapping[str, object] | None:
        """Wait for the plan of the first process.

        Raises:
            EnvironmentFault: when it does not come.
        """
        try:
            self._store.wait(["plan"], _PLANNING_LIMIT)
            plan = json.loads(self._store.get("plan"))
            self._store.add("received", 1)
            return plan
        except RuntimeError as problem:  # also the type of lost connections
            reason = str(problem).splitlines()[0][:160]
            raise EnvironmentFault(f"process {self.rank}", f"got no plan from process 0 ({reason})") from None

    def leave(self) -> None:
        """End what the processes have to do with each other; where the store is the first one's, all have its plan."""
        self.send_plan(None)  # whatever happened, nobody waits for one
        if self.size > 1 and self.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            deadline = time.monotonic() + _PATIENCE_S
            while self._store.add("received", 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(_POLL_S)

    def tell(self, name: str, value: object) -> None:
        """Leave a note of this process for the first one."""
        if self.size > 1:
            with suppress(RuntimeError):  # the store went away with the launcher
                self._store.set(f"{name}/{self.rank}", json.dumps(value))

    def ask(self, name: str, rank: int) -> Any:
        """The note of another process; None as long as there is none."""
        with suppress(RuntimeError):  # the store went away with the launcher
            if self._store.check([f"{name}/{rank}"]):
                return json.loads(self._store.get(f"{name}/{rank}"))
        return None


class Others:
    """The other processes of a run, as far as their manifests tell of them."""

    def __init__(self, team: Team, folder: Path) -> None:
        self._team, self._folder = team, folder
        self._at_work = set(range(1, team.size)) if team.is_first else set()
        self._manifests: dict[int, tuple[Path, int]] = {}  # each with the number of pictures that were in it before
        self._counted = 0
        self._counted_at = -_COUNT_EVERY_S

    def count_made(self) -> int:
        """About how many pictures they have made so far; their manifests are read only now and then."""
        if self._at_work and time.monotonic() - self._counted_at >= _COUNT_EVERY_S:
            self._counted, self._counted_at = len(self.jobs_made()), time.monotonic()
        return self._counted

    def jobs_made(self) -> list[str]:
        """The ids of the jobs that they have made so far."""
        for rank in self._at_work - self._manifests.keys():
            if note := self._team.ask("manifest", rank):
                name, pictures_before = note
                self._manifests[rank] = self._folder / name, pictures_before
        return [job for file, skip in self._manifests.values() for job in jobs_noted(file, skip)]

    def wait(self, pause: Callable[[], None]) -> None:
        """Wait until they have ended, or show no sign of life, calling `pause` every now and then."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            pause()
            self.jobs_made()  # looks for manifests that have been begun
            for rank in list(self._at_work):
                begun = rank in self._manifests
                if ended(self._manifests[rank][0]) if begun else time.monotonic() > deadline:
                    self._at_work.discard(rank)
            if not self._at_work:
                return
            time.sleep(_POLL_S)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers that stop all processes when one ends


def outlive_others(team: Team) -> None:
    """Go on in a child process, so that this process's work survives the end of another one.

    torchrun, which `accelerate launch` uses, stops all its processes once one of them ends with an error. So the
    process that was launched only watches a child, in which the program goes on after this call. When that ends with
    an error, the launched process waits for the other children of this machine before it says so; and when the
    launcher stops it because the launched process of another one was lost, the child is left at work.
    """
    if team.size == 1 or team.launched_in is None or not hasattr(os, "fork"):
        return
    import fcntl

    at_work = os.open(team.launched_in, os.O_RDONLY)  # locked as long as any child of this machine lives
    fcntl.flock(at_work, fcntl.LOCK_SH)
    note = team.launched_in / str(team.local_rank) / "watching"
    note.parent.mkdir(exist_ok=True)
    note.write_text(str(os.getpid()))
    if (child := os.fork()) == 0:
        os.setsid()
        return
    os.close(at_work)
    _pass_on_signals(child, team.launched_in)
    _, ended = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(ended)
    if status < 0:
        who = f"process {team.rank} of {team.size}"
        print(
            f"error: {who}: was ended by signal {-status}; the others go on, --resume makes what it leaves",
            file=sys.stderr,
            flush=True,
        )
        status = 128 - status
    if status:
        fcntl.flock(os.open(team.launched_in, os.O_RDONLY), fcntl.LOCK_EX)
    note.unlink(missing_ok=True)
    os._exit(status)


def _pass_on_signals(child: int, folder: Path) -> None:
    """Pass signals of the user on to the child, but not the launcher's tidying up after a process that was lost."""

    def pass_on(number: int, frame: object) -> None:
        if number != signal.SIGTERM or not _any_lost(folder):
            with suppress(ProcessLookupError):  # it has ended, and this process waits for the others'
                os.kill(child, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)


def _any_lost(folder: Path) -> bool:
    """Whether a watching process of this machine is gone without having ended by itself."""
    for note in folder.glob("*/watching"):
        with suppress(FileNotFoundError, ValueError):  # it is being written, or taken away
            try:
                os.kill(int(note.read_text()), 0)
            except ProcessLookupError:
                return True
    return False
