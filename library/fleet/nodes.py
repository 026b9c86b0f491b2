"""The nodes of a cluster: how they are reached, what they are called, and how many workers they have room for."""

import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import ray
from ray._private import utils as ray_utils
from ray._private import worker as ray_worker
from ray._private.node import Node as RayNode
from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
from ray.exceptions import AuthenticationError, RayError, RayTaskError, RuntimeEnvSetupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from library import console
from library.errors import EnvironmentFault, Interrupted, ProgramError
from library.settings.fleet import HERE, USUAL_CPUS, Fleet

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_NODE_ID = "ray.io/node-id"  # the label that Ray gives each node
_KNOCK_S = 10
_LOOK_EVERY_S = 2
_NOTICED_AFTER_S = 10  # Ray has noticed by then that a node is gone
_MOST_SHARES = 64  # workers that one core or GPU is shared out among
# calls that change nothing and want the token, with their requests: of a cluster's own port, and Ray Client's (a ping)
_NODE_CALL = "/ray.rpc.NodeInfoGcsService/GetClusterId", b""
_CLIENT_CALL = "/ray.rpc.RayletDriver/ClusterInfo", b"\x08\x06"
_TOKEN_ADVICE = "export RAY_AUTH_MODE=token, and copy the token, ~/.ray/auth_token, from the cluster's first machine"
_CLIENT_PORT = 10001  # where Ray Client is served by default, which `ray://` is for
# Ray's own account of tasks and resources, which nobody reads of a cluster that ends with the run
_NO_ACCOUNT = {
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
}
# what such a cluster has no use for, and what stands for it: dashboard, autoscaler, reader of logs, and what the node's
# agent does for a dashboard. They take seconds to begin and to end, and a share of the cores; no public name leaves
# them out
_UNUSED: list[tuple[Any, str, Callable[..., Any]]] = [
    (RayNode, "start_api_server", lambda self, **_: None),
    (RayNode, "start_monitor", lambda self, **_: None),
    (RayNode, "start_log_monitor", lambda self, **_: None),
    (ray_utils, "get_dashboard_dependency_error", lambda: ImportError("not wanted")),
]


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    id: str
    host: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Share:
    """What a worker takes of a node: a GPU or a part of one, else processor cores."""

    cpus: float = 0
    gpus: float = 0

    def room(self, nodes: Sequence[Node]) -> int:
        """How many workers nodes have room for."""
        return sum(int((node.gpus / self.gpus if self.gpus else node.cpus / self.cpus) + 1e-6) for node in nodes)

    def options(self, unfit: Collection[str]) -> dict[str, Any]:
        """What Ray is asked for, of nodes other than the unfit ones."""
        avoided = {_NODE_ID: f"!in({','.join(sorted(unfit))})"} if unfit else None
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "label_selector": avoided}


@contextmanager
def connected(fleet: Fleet, program: Path) -> Iterator[None]:
    """A block in which Ray's cluster is there.

    Args:
        fleet: says where it is.
        program: the script's file, which is sent to the nodes with what lies beside it.

    Raises:
        EnvironmentFault: when the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    settings: dict[str, Any] = {}
    if fleet.address == HERE:
        settings = {"include_dashboard": False}
        for name, value in _NO_ACCOUNT.items():
            os.environ.setdefault(name, value)
    else:  # nodes of this machine find the program where it is
        parts = [program, *(program.parent / name for name in ("library", "networks", "tools"))]
        threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
        settings = {"runtime_env": {"py_modules": [str(part) for part in parts], "env_vars": threads}}
    # Ray's own account of lost workers, pages long, would go to standard output among the results; no public name
    # switches it off
    vars(ray_worker)["_worker_logs_enabled"] = False
    if fleet.address != HERE:
        _knock(fleet.address)
        logging.getLogger("ray").setLevel(logging.CRITICAL)
    with _interrupted_by_sigterm() as listen:
        try:
            with warnings.catch_warnings(action="ignore"), _without_unused(fleet):
                ray.init(address=fleet.address, log_to_driver=False, logging_level=logging.CRITICAL, **settings)
        except (ConnectionError, RuntimeError, TimeoutError, ValueError, OSError, RayError) as problem:
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]
            advice = "start one, or check address, its port (ray:// has one of its own) and RAY_AUTH_MODE"
            raise EnvironmentFault(f"--ray {fleet.address}", f"no cluster there ({reason}); {advice}") from None
        except SystemExit:  # Ray has its own handler of SIGTERM, which leaves with status 15
            raise Interrupted(signal.SIGTERM) from None
        listen()
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _without_unused(fleet: Fleet) -> Iterator[None]:
    """A block in which Ray starts a cluster of this machine without what it has no use for."""
    unused = [each for each in _UNUSED if fleet.address == HERE and hasattr(each[0], each[1])]
    kept = [(place, name, getattr(place, name)) for place, name, _ in unused]
    for place, name, instead in unused:
        setattr(place, name, instead)
    try:
        yield
    finally:
        for place, name, method in kept:
            setattr(place, name, method)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[Callable[[], None]]:
    """A block that SIGTERM interrupts as Ctrl-C does; gives what begins this anew, once Ray has put its own handler."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    def listen() -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before if before is signal.SIG_IGN else interrupt)

    before = signal.getsignal(signal.SIGTERM)
    listen()
    try:
        yield listen
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _knock(address: str) -> None:
    """Find out at once whether Ray may answer at HOST:PORT and lets one in, which it tries itself for minutes.

    Raises:
        EnvironmentFault: when nothing answers, what does not speak gRPC, as Ray does, or what wants a token.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    if int(port) == _CLIENT_PORT and not address.startswith("ray://"):  # Ray tries it in vain, and at length
        raise EnvironmentFault(f"--ray {address}", f"this port is Ray Client's; write ray://{address}")
    reason = ""
    try:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_S).close()
    except OSError as problem:
        reason = problem.strerror or str(problem)
    except UnicodeError:
        reason = "no machine has such a name"
    encrypted = os.environ.get("RAY_USE_TLS", "").lower() in ("1", "true")
    if not reason and not encrypted:
        reason = _refusal(f"{host}:{port}", address)
    if reason:
        problem = f"no cluster answers there ({reason}); start a cluster, or check the address"
        raise EnvironmentFault(f"--ray {address}", problem)


def _refusal(place: str, address: str) -> str:
    """Why what answers at HOST:PORT is no cluster, reached past the proxies that Ray passes by; "" where none can tell.

    Raises:
        EnvironmentFault: when it is one that wants a token.
    """
    try:
        import grpc
        from ray._private.grpc_utils import init_grpc_channel
    except ImportError:  # `ray` without its extras does not bring gRPC
        return ""
    with init_grpc_channel(place, GLOBAL_GRPC_OPTIONS) as channel:
        try:
            grpc.channel_ready_future(channel).result(_KNOCK_S)
            method, request = _CLIENT_CALL if address.startswith("ray://") else _NODE_CALL
            channel.unary_unary(method)(request, timeout=_KNOCK_S)
        except grpc.FutureTimeoutError:
            return "what does is not Ray"
        except AuthenticationError as lacking:
            reason = lacking.message.split(". ")[0]  # what else it says is Ray's advice, at length
            problem = f"no token is found here ({reason}); {_TOKEN_ADVICE}"
            raise EnvironmentFault(f"--ray {address}", problem) from None
        except grpc.RpcError as refused:  # whatever else is wrong, Ray tells itself
            if isinstance(refused, grpc.Call) and refused.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise EnvironmentFault(f"--ray {address}", f"the cluster wants a token; {_TOKEN_ADVICE}") from None
    return ""


def alive() -> list[Node]:
    """The nodes that are alive."""
    there = [(node["NodeID"], node["NodeManagerHostname"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    return [Node(id_, host, resources.get("CPU", 0), resources.get("GPU", 0)) for id_, host, resources in there]


def names(nodes: Sequence[Node]) -> dict[str, str]:
    """What nodes are called, by their ids: by their host, and where that has several, by their ids as well."""
    hosts = [node.host for node in nodes]
    return {node.id: node.host if hosts.count(node.host) == 1 else f"{node.host} ({node.id[:8]})" for node in nodes}


def share_of(fleet: Fleet, nodes: Sequence[Node]) -> Share:
    """What each worker takes, so that those that are asked for, at least, are all started."""
    least, most = fleet.workers or (1, 1)
    if any(node.gpus for node in nodes):
        shares = (Share(gpus=1 / parts) for parts in range(1, _MOST_SHARES + 1))
        return next((share for share in shares if share.room(nodes) >= least), Share(gpus=1 / _MOST_SHARES))
    largest = int(max((node.cpus for node in nodes), default=1)) or 1
    if fleet.cpus:
        largest = min(fleet.cpus, largest)
    elif fleet.workers is None or least < most:
        largest = min(USUAL_CPUS, largest)
    shares = [Share(cpus=whole) for whole in range(largest, 0, -1)]
    shares += [Share(cpus=1 / parts) for parts in range(2, _MOST_SHARES + 1)]
    return next((share for share in shares if share.room(nodes) >= least), shares[-1])


def on_each(function: Callable[..., Result], nodes: Sequence[Node], *arguments: object) -> dict[str, Result | str]:
    """What a function gives on each node, or why it does not, by the node's id; one that is lost is left out."""
    remote = ray.remote(num_cpus=0, max_retries=0)(function)
    refs = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        refs[node.id] = remote.options(scheduling_strategy=there).remote(*arguments)
    found: dict[str, Result | str] = {}
    for node_id, ref in refs.items():
        try:
            found[node_id] = ray.get(ref)
        except RayTaskError as problem:
            found[node_id] = short(problem.cause)
        except RuntimeEnvSetupError as problem:
            found[node_id] = short(problem)
        except RayError:  # it went away
            continue
    return found


def short(problem: BaseException) -> str:
    """An exception of a node in one line; what is wrong there comes last in Ray's own."""
    text = str(problem) if isinstance(problem, ProgramError) else f"{type(problem).__name__}: {problem}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if len(lines) == 1 else f"{lines[0][:100]} … {lines[-1][:100]}"


# ---------------------------------------------------------------------------------------------------------------------
# Followed through a run


class Nodes:
    """The nodes as they were when they were last looked at.

    Args:
        unfit: the ids of those that cannot draw.
    """

    def __init__(self, unfit: set[str]) -> None:
        self.unfit = unfit
        self._names: dict[str, str] = {}  # of those that have gone, too
        self._read()

    def _read(self) -> None:
        self._alive, self._looked = alive(), time.monotonic()
        self._names |= names(self._alive)

    def look(self) -> bool:
        """Look at them if it is time to; gives whether it was."""
        due = time.monotonic() - self._looked >= _LOOK_EVERY_S
        if due:
            self._read()
        return due

    @property
    def fit(self) -> list[Node]:
        """Those that can draw."""
        return [node for node in self._alive if node.id not in self.unfit]

    def lives(self, node: str) -> bool:
        """Whether a node is there."""
        return any(each.id == node for each in self._alive)

    def count(self, ids: Sequence[str]) -> int:
        """How many of nodes are there or not known; what happened on others came of their going away."""
        return sum(not node or self.lives(node) for node in ids)

    def name(self, node: str) -> str:
        """What a node is called."""
        return self._names.get(node, node[:8] or "unknown")

    def leave_out(self, node: str, problem: str) -> None:
        """From now on leave a node out, and say why."""
        if node not in self.unfit:
            self.unfit.add(node)
            say_unfit(self.name(node), problem)


def say_unfit(node: str, problem: str) -> None:
    """Say that a node is left out, and why."""
    logger.warning("node %s is left out: %s; put the same there, or give --ray_ship", node, problem)


@dataclass(frozen=True)
class _Loss:
    """A worker that was lost."""

    who: str
    node: str
    pictures: int  # that it had
    when: float
    low_memory: bool


class Losses:
    """The workers that were lost and not yet told of: Ray notices later whether it was their node.

    Args:
        nodes: of the cluster.
    """

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._losses: list[_Loss] = []

    def note(self, who: str, node: str, pictures: int, problem: RayError) -> None:
        """Note that a worker was lost, with so many pictures."""
        self._losses.append(_Loss(who, node, pictures, time.monotonic(), "low on memory" in str(problem)))

    def say(self, *, at_end: bool = False) -> None:
        """Say which were lost, and why, as far as that is known; `at_end` all."""
        for loss in list(self._losses):
            if reason := self._reason(loss, at_end=at_end):
                self._losses.remove(loss)
                again = f"; {loss.pictures} picture{'s' * (loss.pictures != 1)} drawn again" if loss.pictures else ""
                console.warn(f"{loss.who} lost on node {self._nodes.name(loss.node)}: {reason}{again}")

    def _reason(self, loss: _Loss, *, at_end: bool) -> str | None:
        if not self._nodes.lives(loss.node):
            return "its node is gone"
        if loss.low_memory:
            return "its node ran out of memory"
        if time.monotonic() - loss.when >= _NOTICED_AFTER_S:
            return "its process ended"
        return "its process or its node ended" if at_end else None
