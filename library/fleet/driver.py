"""The driver of a fleet: hands batches to workers, takes their pictures, and what befalls the workers meanwhile."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from library import console
from library.errors import EnvironmentFault, InputError, ProgramError
from library.files.picture_files import save_whole
from library.fleet import inputs, nodes
from library.fleet.inputs import Place
from library.fleet.nodes import Losses, Nodes
from library.fleet.worker import Answer, Look, Order, Outcome, Worker, look
from library.plan.job import Job
from library.plan.run_plan import RunPlan
from library.plan.stages import stages
from library.run.runs import Drawn, Interruptions
from library.settings.fleet import HERE, Fleet

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

_CALLS_AHEAD = 2  # that a worker has, so that it need not wait for the driver
_MOST_DEATHS = 3  # of workers that drew a batch
_MOST_LOSSES = 9  # of workers that had it, those whose whole node was lost among them
_MOST_STARTS = 3  # of a worker that ends before it can draw
_MOST_FULL = 3  # times in a row that an object store did not take what a worker drew
_POLL_S = 0.5
_LONG_S = 120  # without a worker


@dataclass(eq=False)
class Batch:
    """A batch of the run."""

    number: int
    jobs: Sequence[Job]
    lost_on: list[str] = field(default_factory=list)  # nodes whose worker ended while it had the batch
    alone: bool = False  # it is drawn by a worker that has nothing else, so that it shows what ends workers


@dataclass(eq=False)
class Hand:
    """A worker, as the driver knows it."""

    number: int
    actor: "ActorHandle[Worker]"
    node: str = ""  # Ray's id of the last one that it was found on
    ready: bool = False
    calls: "dict[ObjectRef, Callable[[Any], None]]" = field(default_factory=dict)  # what takes the answer of each
    batches: dict[int, Batch] = field(default_factory=dict)  # that it has
    failed_on: list[str] = field(default_factory=list)  # nodes that it ended on before it could draw
    found_full: int = 0  # times in a row that it could not hand over what it drew


class Driver:
    """Draws batches by workers of Ray.

    Args:
        plan: of the run.
        fleet: what the user said.
        order: that workers are given.
        fail: is told of a job whose picture failed, and why.
        unfit: ids of nodes that cannot draw.
    """

    def __init__(
        self, plan: RunPlan, fleet: Fleet, order: Order, fail: Callable[[Job, str], None], unfit: set[str]
    ) -> None:
        self._plan, self._fleet, self._fail = plan, fleet, fail
        self._order_ref = ray.put(order)
        self._nodes = Nodes(unfit)
        self._share = nodes.share_of(fleet, self._nodes.fit)
        self._losses = Losses(self._nodes)
        self._ready_at = time.monotonic()
        self._hands: list[Hand] = []
        self._hired = 0
        self._dismissed: list[str] = []  # ids of nodes that a worker could not draw on
        self._fresh: deque[Batch] = deque()
        self._again: deque[Batch] = deque()
        self._numbers = 0
        self._sent: dict[Place, list[ObjectRef]] = {}
        self._drawn: list[tuple[Batch, Outcome]] = []
        self.node_of: dict[Path, str] = {}  # that drew a picture, until it is told

    # -- the loop -----------------------------------------------------------------------------------------------------

    def draw(self, batches: Sequence[Sequence[Job]], interruptions: Interruptions, progress: console.Progress) -> Drawn:
        """Draw batches until an interruption is asked for; gives their pictures as they come.

        Raises:
            EnvironmentFault: when no worker can draw.
        """
        self._fresh.extend(map(self._numbered, batches))
        while self._working or (not interruptions.asked and (self._fresh or self._again)):
            self._look_around()
            if not interruptions.asked:
                self._hire()
            for hand in self._hands:
                self._hand_out(hand, stopping=interruptions.asked)
            self._take_answers()
            progress.beside = self._counts()
            for batch, outcome in self._drawn:
                yield pictures_of(self._plan, batch.jobs, outcome, self._fail)
            self._drawn = []
        self._losses.say(at_end=True)

    def _look_around(self) -> None:
        """Look at the nodes now and then, and say what is known by then."""
        if not self._nodes.look():
            return
        self._losses.say()
        if any(hand.ready for hand in self._hands):
            self._ready_at = time.monotonic()
        elif time.monotonic() - self._ready_at > _LONG_S:
            self._ready_at = time.monotonic()
            console.say("no worker is ready; they load, or wait for room in the cluster: `ray status` tells")

    @property
    def _working(self) -> int:
        return sum(len(hand.batches) for hand in self._hands)

    def _numbered(self, jobs: Sequence[Job]) -> Batch:
        self._numbers += 1
        return Batch(self._numbers, jobs)

    def _counts(self) -> str:
        ready = sum(hand.ready for hand in self._hands)
        waiting = len(self._hands) - ready
        return f"{ready} worker{'s' * (ready != 1)}" + (f", {waiting} not ready" if waiting else "")

    def _hand_out(self, hand: Hand, *, stopping: bool) -> None:
        """Give a worker what it can take, and else have it finish what it has begun."""
        ahead = _CALLS_AHEAD if len(self._fresh) >= len(self._hands) else 1  # the last ones are for whoever is free
        while hand.ready and len(hand.calls) < ahead:
            batch = None if stopping else self._next_for(hand)
            if batch is not None:
                hand.batches[batch.number] = batch
                self._call(hand, hand.actor.draw, self._take_drawn, batch.number, inputs.pack(batch.jobs))
            elif hand.batches and not hand.calls:
                self._call(hand, hand.actor.draw, self._take_drawn, None)
            else:
                return

    def _next_for(self, hand: Hand) -> Batch | None:
        if any(batch.alone for batch in hand.batches.values()):
            return None
        if self._again:
            return None if self._again[0].alone and hand.batches else self._again.popleft()
        return self._fresh.popleft() if self._fresh else None

    def _call(self, hand: Hand, method: Any, take: "Callable[[Hand, Any], None]", *arguments: object) -> None:
        hand.calls[method.remote(*arguments)] = lambda answer: take(hand, answer)

    def _take_answers(self) -> None:
        """Wait a moment for answers, and take those that are there."""
        callers = {ref: hand for hand in self._hands for ref in hand.calls}
        if not callers:
            time.sleep(_POLL_S)
            return
        if ray.wait(list(callers), timeout=_POLL_S)[0]:
            for ref in ray.wait(list(callers), num_returns=len(callers), timeout=0)[0]:
                hand = callers[ref]
                if (take := hand.calls.pop(ref, None)) is not None:  # None: the worker was lost with an earlier one
                    self._take(hand, ref, take)

    def _take(self, hand: Hand, ref: "ObjectRef", take: Callable[[Any], None]) -> None:
        try:
            answer = ray.get(ref)
        except RayTaskError as problem:
            self._take_problem(hand, problem)
        except RayError as problem:
            self._lose(hand, problem)
        else:
            take(answer)

    # -- workers ------------------------------------------------------------------------------------------------------

    def _hire(self) -> None:
        """Ask Ray for workers that are wanted and not there."""
        if self._fleet.workers is None:  # what was given up on a node that has gone leaves its successor free
            wanted = max(self._share.room(self._nodes.fit) - self._nodes.count(self._dismissed), len(self._hands))
        else:
            wanted = self._fleet.workers[1] - len(self._dismissed)
        # where the last one was given up the run has ended; else there is always one that something can come of
        wanted = min(max(wanted, 1), len(self._fresh) + len(self._again) + self._working)
        while len(self._hands) < wanted:
            self._hired += 1
            options = self._share.options(self._nodes.unfit)
            actor: Any = ray.remote(Worker).options(max_restarts=-1, **options).remote()
            self._hands.append(hand := Hand(self._hired, actor))
            self._call(hand, actor.look, self._take_look, self._order_ref)

    def _take_look(self, hand: Hand, found: Look) -> None:
        hand.node = found.node
        if found.wrong and not self._fleet.ships:
            problem = next(iter(found.wrong.values()))
            self._nodes.leave_out(found.node, problem)
            self._dismiss(hand)
            if not self._nodes.fit and not any(other.ready for other in self._hands):
                raise EnvironmentFault("--ray", f"no node can draw any more; {problem}; put it there, then --resume")
            return
        _warn_of_versions(self._nodes.name(found.node), found, self._plan)
        for place in found.wrong:
            if place not in self._sent:
                self._sent[place] = inputs.put(place)
        self._call(hand, hand.actor.load, self._take_loaded, {place: self._sent[place] for place in found.wrong})

    def _take_loaded(self, hand: Hand, answer: Answer) -> None:
        _say(answer)
        hand.ready, hand.failed_on = True, []

    def _take_drawn(self, hand: Hand, answer: Answer) -> None:
        _say(answer)
        hand.found_full = 0
        for number, outcome in answer.done.items():
            self._drawn.append((hand.batches.pop(number), outcome))
            for name, _ in outcome.pictures if self._plan.output.as_json else ():
                self.node_of[self._plan.output.folder / name] = self._nodes.name(hand.node)

    def _take_problem(self, hand: Hand, problem: RayTaskError) -> None:
        """A call of a worker raised something."""
        cause, node = problem.cause, self._nodes.name(hand.node)
        full = isinstance(cause, ObjectStoreFullError | OutOfDiskError)
        hand.found_full += full
        if full and hand.found_full < _MOST_FULL:
            logger.warning("the object store of node %s is full; its pictures are drawn again", node)
            ray.kill(hand.actor, no_restart=False)
            time.sleep(_POLL_S)
            self._begin_again(hand)
        elif hand.ready and not full and not isinstance(cause, ProgramError):
            raise cause from problem
        else:
            logger.warning("worker %d on node %s ends: %s", hand.number, node, nodes.short(cause))
            self._give_up(hand, f"no worker can draw: {nodes.short(cause)}", problem)

    def _lose(self, hand: Hand, problem: RayError) -> None:
        """A worker's process or its node is gone; Ray starts another one in its place."""
        count = sum(len(batch.jobs) for batch in hand.batches.values())
        self._losses.note(f"worker {hand.number}", hand.node, count, problem)
        if not hand.ready:
            hand.failed_on.append(hand.node)
        for batch in hand.batches.values():
            batch.lost_on.append(hand.node)
            batch.alone = True
        if self._nodes.count(hand.failed_on) >= _MOST_STARTS:
            self._give_up(hand, f"no worker could begin ({nodes.short(problem)})", problem)
        else:
            self._begin_again(hand)

    def _give_up(self, hand: Hand, reason: str, problem: RayError) -> None:
        """Go on without a worker; without the last one the run ends."""
        self._put_back(hand)
        self._dismissed.append(hand.node)
        self._dismiss(hand)
        if not self._hands:
            raise EnvironmentFault("--ray", reason) from problem

    def _begin_again(self, hand: Hand) -> None:
        """Look at a worker that Ray starts anew; what it had goes to whoever is free."""
        self._put_back(hand)
        hand.ready, hand.calls = False, {}
        self._call(hand, hand.actor.look, self._take_look, self._order_ref)

    def _put_back(self, hand: Hand) -> None:
        """Have a worker's batches drawn again; what has ended several workers is halved, then given up."""
        for batch in hand.batches.values():
            deaths, losses = self._nodes.count(batch.lost_on), len(batch.lost_on)
            if deaths < _MOST_DEATHS and losses < _MOST_LOSSES:
                self._again.append(batch)
            elif (half := (len(batch.jobs) + 1) // 2) < len(batch.jobs):
                logger.warning(
                    "a batch of %d pictures ended %d workers; drawing %d at a time", len(batch.jobs), losses, half
                )
                for jobs in (batch.jobs[:half], batch.jobs[half:]):
                    self._again.append(part := self._numbered(jobs))
                    part.alone = True
            else:
                self._fail(batch.jobs[0], f"ended {losses} workers that drew it; draw it without --ray to see why")
        hand.batches = {}

    def _dismiss(self, hand: Hand) -> None:
        self._hands.remove(hand)
        hand.calls = {}  # what else has come of them by now is of no use
        ray.kill(hand.actor)


def pictures_of(
    plan: RunPlan, jobs: Sequence[Job], outcome: Outcome, fail: Callable[[Job, str], None]
) -> list[tuple[Job, bytes]]:
    """What became of a batch: its jobs with their files' content, once what failed is told and what is beside saved."""
    every = {stage.file.name: stage for job in jobs for stage in stages(job, plan.highres)}
    every |= {job.file.name: job for job in jobs}
    for name, problem in outcome.failed:
        fail(every[name], problem)
    for name, content in outcome.beside:
        file = plan.output.folder / name
        if not file.exists():
            save_whole(content, file)
    return [(every[name], content) for name, content in outcome.pictures]


def _say(answer: Answer) -> None:
    for level, message in answer.messages:
        logger.log(level, "%s", message)


def _warn_of_versions(node: str, found: Look, plan: RunPlan) -> None:
    for package, version in plan.record.versions.items():
        if (there := found.versions.get(package)) != version:
            logger.warning("node %s has %s %s, here it is %s: pictures may differ", node, package, there, version)


@contextmanager
def opened(plan: RunPlan, fleet: Fleet, program: Path, load: str, fail: Callable[[Job, str], None]) -> Iterator[Driver]:
    """A block in which a cluster draws.

    Args:
        plan: of the run.
        fleet: what the user said of the cluster.
        program: the script's file.
        load: the name of its function that loads the pipeline.
        fail: is told of a job whose picture failed, and why.

    Raises:
        EnvironmentFault: when the cluster cannot be reached.
        InputError: when none of its nodes has what the run reads.
    """
    order = order_for(plan, program, load)
    with nodes.connected(fleet, program):
        unfit = _unfit_nodes(fleet, order)
        try:
            yield Driver(plan, fleet, order, fail, unfit)
        finally:
            if fleet.ships:
                with suppress(RayError):
                    nodes.on_each(inputs.forget, nodes.alive(), order.run)


def order_for(plan: RunPlan, program: Path, load: str) -> Order:
    """What the workers of a run are told."""
    packed, files = inputs.pack_plan(plan)
    return Order(plan.record.run, program.stem, load, packed, inputs.marks(files), str(Path.cwd()))


def _unfit_nodes(fleet: Fleet, order: Order) -> set[str]:
    """The nodes that lack what the run reads, once they have been named."""
    if fleet.address == HERE:  # the files are those that were planned with
        return set()
    there = nodes.alive()
    names = nodes.names(there)
    wrong = {}
    for node, found in nodes.on_each(look, there, order.files).items():
        if isinstance(found, str):
            wrong[node] = found
        elif found.wrong and not fleet.ships:
            wrong[node] = next(iter(found.wrong.values()))
    if len(wrong) == len(there):
        node, problem = next(iter(wrong.items()))
        raise InputError("--ray", f"no node can draw; node {names[node]}: {problem}; put it there, or give --ray_ship")
    for node, problem in wrong.items():
        nodes.say_unfit(names[node], problem)
    return set(wrong)
