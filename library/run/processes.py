"""Several processes that share a run, as `accelerate launch`, `torchrun` and `srun` start them.

The first one plans the run and hands the plan on through the launcher's key-value store; each draws every N-th batch
and leaves the first one notes of what it has made. When one dies the launcher stops the rest.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from library.errors import EnvironmentFault
from library.plan.run_plan import RunPlan

if TYPE_CHECKING:  # torch is imported where there are several processes
    from torch.distributed import Store

_PLANNING_LIMIT = timedelta(hours=2)  # how long the others wait for the plan; thousands of pictures may be checked
_PATIENCE = timedelta(minutes=1)  # how long the first one, once it is done, waits for one that has not taken the plan
_POLL_S = 0.3


@dataclass(frozen=True)
class Team:
    """The processes of a run, seen from one of them; by itself a process is the first of one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Team":
        """What the launcher says in the variables that PyTorch defined for this."""
        try:
            return cls(*(int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        except (KeyError, ValueError):
            return cls()

    @property
    def is_first(self) -> bool:
        """Whether this process plans, shows progress and sums up."""
        return self.rank == 0

    @cached_property
    def _store(self) -> "Store":
        from torch.distributed import PrefixStore, rendezvous

        try:
            store, _, _ = next(rendezvous("env://", self.rank, self.size))
        except (RuntimeError, ValueError) as problem:  # nobody is reached; a variable is not set
            reason = str(problem).splitlines()[0][-160:]
            advice = "set MASTER_ADDR and MASTER_PORT as torchrun does, or unset RANK and WORLD_SIZE"
            raise EnvironmentFault(f"process {self.rank}", f"does not find the others ({reason}); {advice}") from None
        return PrefixStore(f"gen_img_diffusers/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def _keys(self, name: str) -> list[str]:
        return [f"{name}/{rank}" for rank in range(1, self.size)] if self.is_first else []

    def send_plan(self, plan: RunPlan | None) -> None:
        """Hand the plan to the other processes; None when there is nothing for them to do. Later calls do nothing."""
        if self.size > 1 and self.is_first and not self._store.check(["plan"]):
            self._store.set("plan", json.dumps(plan and plan.to_share()))

    def receive_plan(self) -> Mapping[str, object] | None:
        """Wait for the plan of the first process.

        Raises:
            EnvironmentFault: when it does not come.
        """
        try:
            self._store.wait(["plan"], _PLANNING_LIMIT)
            plan = json.loads(self._store.get("plan"))
        except RuntimeError as problem:  # also the type of lost connections
            reason = str(problem).splitlines()[0][:160]
            raise EnvironmentFault(f"process {self.rank}", f"got no plan from process 0 ({reason})") from None
        self.tell("received", True)
        return plan

    def tell(self, name: str, value: object) -> None:
        """Leave a note for the first process, in place of this one's last of that name."""
        if not self.is_first:
            with suppress(RuntimeError):  # the store went away with the launcher
                self._store.set(f"{name}/{self.rank}", json.dumps(value))

    def told(self, name: str) -> list[Any]:
        """The notes of that name that the other processes have left so far."""
        with suppress(RuntimeError):  # likewise
            return [json.loads(self._store.get(key)) for key in self._keys(name) if self._store.check([key])]
        return []

    def wait(self, pause: Callable[[], None]) -> None:
        """Wait in the first process until the others have left, calling `pause` every now and then."""
        while len(self.told("left")) < len(self._keys("left")):
            pause()
            time.sleep(_POLL_S)

    def leave(self) -> None:
        """End what the processes have to do with each other; where the store is the first one's, all have its plan."""
        with suppress(RuntimeError, EnvironmentFault):  # it is not there, which has been said
            if self.is_first:
                self.send_plan(None)  # whatever happened, nobody waits for one
            elif "_store" in vars(self):  # else it was looked for in vain, for minutes
                self.tell("left", True)
            if keys := self._keys("received"):
                self._store.wait(keys, _PATIENCE)
