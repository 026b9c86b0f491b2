"""Parts of runs that Ray draws, without a cluster: what is said of it, what nodes have, and what befalls workers."""

import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import ray
from ray._private import grpc_utils
from ray.exceptions import ActorDiedError, AuthenticationError, ObjectStoreFullError, RayTaskError

import gen_img_diffusers
from library import console
from library.errors import EnvironmentFault, InputError
from library.fleet import driver, inputs, nodes, worker
from library.plan.planning import make_plan
from library.results.metadata import run_facts
from library.run.runs import BatchDrawer, Interruptions
from library.settings.fleet import Fleet
from library.version import versions

DEMO = Path(__file__).resolve().parent.parent / "examples" / "shapes"
HERE = nodes.Node("n1", "host", cpus=1, gpus=0)


def fleet(workers: tuple[int, int] | None = None, cpus: int | None = None, *, ships: bool = False) -> Fleet:
    return Fleet("auto", workers, cpus, ships)


# ---------------------------------------------------------------------------------------------------------------------
# What is said of it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ray", "somewhere"), "--ray somewhere: no place of a cluster; write local, auto, HOST:PORT or ray://HOST:"),
        (("--ray", "host:65536"), "--ray host:65536: no place of a cluster; "),
        (("--ray_workers", 2), "--ray_workers: is for Ray's workers; give --ray, too"),
        (("--ray", "--ray_workers", "3,2"), "--ray_workers 3,2: more at least than at most; write MIN,MAX"),
        (("--ray", "--interactive"), "--ray and --interactive: do not go together; give one"),
    ],
)
def test_what_cannot_be_meant_is_refused(generate, options, message):
    result = generate(DEMO, *options)
    assert (result.status, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def test_without_ray_the_requirements_are_named(generate, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = generate(DEMO, "--prompt", "red", "--ray")
    assert result.status == 2
    assert result.stderr == "error: --ray: needs the package ray; run `pip install -r requirements-ray.txt`\n"


def test_where_nothing_answers_that_is_said_at_once(generate):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"ray://127.0.0.1:{free.getsockname()[1]}"
    result = generate(DEMO, "--prompt", "red", "--ray", address)
    assert result.status == 4
    assert f"error: --ray {address}: no cluster answers there (Connection refused); start" in result.stderr


def test_the_clients_port_without_its_scheme_is_told_at_once(generate):
    result = generate(DEMO, "--prompt", "red", "--ray", "127.0.0.1:10001")
    assert result.status == 4
    message = "--ray 127.0.0.1:10001: this port is Ray Client's; write ray://127.0.0.1:10001"
    assert result.stderr.splitlines() == [f"error: {message}"]


def test_what_answers_and_is_not_ray_is_told_before_ray_tries_it_for_minutes(generate, monkeypatch):
    monkeypatch.setattr(nodes, "_KNOCK_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        result = generate(DEMO, "--prompt", "red", "--ray", address)
    assert result.status == 4
    assert f"error: --ray {address}: no cluster answers there (what does is not Ray); start" in result.stderr


def test_a_port_of_another_of_rays_services_is_thought_of(generate, monkeypatch):
    def init(**_: object) -> None:
        raise ConnectionError("ray client connection timeout")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(nodes, "_knock", lambda address: None)
    result = generate(DEMO, "--prompt", "red", "--ray", "ray://localhost:6379")
    assert result.status == 4
    assert "no cluster there (ray client connection timeout); start one, or check address, its port (" in result.stderr


def test_a_cluster_is_found_past_a_proxy_and_without_grpc(monkeypatch):
    """Ray itself passes proxies by, and its core alone does without grpcio."""
    with ThreadPoolExecutor(1) as pool, socket.create_server(("127.0.0.1", 0)) as dead:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        monkeypatch.setattr(nodes, "_KNOCK_S", 5)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{dead.getsockname()[1]}")
        nodes._knock(f"127.0.0.1:{port}")
        server.stop(None)
        monkeypatch.setitem(sys.modules, "grpc", None)
        nodes._knock(f"127.0.0.1:{dead.getsockname()[1]}")


class Refusing(grpc.ServerInterceptor):
    """Refuses each call, as a cluster that wants another token does."""

    def intercept_service(self, continuation, details):
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        )


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_cluster_that_wants_another_token_says_so_at_once(generate, address):
    """Ray itself asks again for 20 seconds, writing a line each time."""
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, interceptors=[Refusing()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        result = generate(DEMO, "--prompt", "red", "--ray", place := address.format(port))
        server.stop(None)
    assert result.status == 4
    assert f"error: --ray {place}: the cluster wants a token; export RAY_AUTH_MODE=token" in result.stderr


class Tokenless(grpc.UnaryUnaryClientInterceptor):
    """Finds no token, as Ray's own does where there is none."""

    def intercept_unary_unary(self, continuation, details, request):
        raise AuthenticationError("none in /home/me/.ray/auth_token")


def test_a_token_that_is_missing_here_is_named(monkeypatch):
    def channel(place: str, options: object) -> grpc.Channel:
        return grpc.intercept_channel(grpc.insecure_channel(place), Tokenless())

    monkeypatch.setattr(grpc_utils, "init_grpc_channel", channel)
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with pytest.raises(
            EnvironmentFault, match=r"here \(.*none in /home/me/.ray/auth_token\); export RAY_AUTH_MODE"
        ):
            nodes._knock(f"127.0.0.1:{port}")
        server.stop(None)


def test_the_cluster_of_this_machine_is_left_to_ray_which_finds_its_token(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://nowhere:10001")
    monkeypatch.setattr(nodes.socket, "create_connection", lambda *_: pytest.fail("it was asked"))
    nodes._knock("auto")


def test_a_name_that_no_machine_can_have(generate):
    result = generate(DEMO, "--prompt", "red", "--ray", "a..b:6379")
    assert result.status == 4
    assert (
        "error: --ray a..b:6379: no cluster answers there (no machine has such a name); start a cluster"
        in result.stderr
    )


# ---------------------------------------------------------------------------------------------------------------------
# Nodes


@pytest.mark.parametrize(
    ("asked", "cores", "gpus", "share", "room"),
    [
        (fleet(), (4, 4), (0, 0), nodes.Share(cpus=2), 4),
        (fleet(), (1,), (0,), nodes.Share(cpus=1), 1),
        (fleet(cpus=3), (4, 8), (0, 0), nodes.Share(cpus=3), 3),
        (fleet((3, 3)), (4, 8), (0, 0), nodes.Share(cpus=4), 3),
        (fleet((8, 8)), (2,), (0,), nodes.Share(cpus=1 / 4), 8),
        (fleet(), (8, 8), (1, 2), nodes.Share(gpus=1), 3),
        (fleet((4, 4)), (8, 8), (1, 2), nodes.Share(gpus=1 / 2), 6),
    ],
)
def test_cores_and_gpus_are_shared_out(asked, cores, gpus, share, room):
    there = [nodes.Node(str(n), "host", *each) for n, each in enumerate(zip(cores, gpus, strict=True))]
    assert nodes.share_of(asked, there) == share
    assert share.room(there) == room


def test_a_node_that_lacks_a_file_or_has_another_says_which(tmp_path):
    same, other, gone = (tmp_path / f"{name}.safetensors" for name in ("same", "other", "gone"))
    for file in (same, other, gone):
        shutil.copy(DEMO / "unet" / "diffusion_pytorch_model.safetensors", file)
    wanted = inputs.marks([same, other, gone])
    other.write_bytes(b"")
    gone.unlink()
    assert sorted(inputs.lacking(wanted).values()) == [f"{gone} is not there", f"{other} is another file there"]


def test_models_below_the_programs_folder_are_looked_for_where_they_are():
    """Nodes are sent the program, not what lies beside it."""
    model = DEMO / "unet" / "diffusion_pytorch_model.safetensors"
    (place,) = inputs.marks([model])
    assert inputs.path_at(place) == model


def test_where_no_node_is_fit_the_run_ends_before_anything_is_drawn(monkeypatch):
    order = worker.Order("run", "module", "load", b"", {}, "/")
    wrong = worker.Look("n1", {("files", "m"): "/m is not there"}, {})
    monkeypatch.setattr(nodes, "alive", lambda: [HERE])
    monkeypatch.setattr(nodes, "on_each", lambda function, there, *arguments: {"n1": wrong})
    with pytest.raises(InputError, match="--ray: no node can draw; node host: /m is not there; put it there, or give"):
        driver._unfit_nodes(fleet(), order)
    assert driver._unfit_nodes(fleet(ships=True), order) == set()


# ---------------------------------------------------------------------------------------------------------------------
# Workers


class Method:
    """A method of a worker, called as Ray's are: gives a reference, which here is what comes of it or is raised."""

    def __init__(self, work) -> None:
        self.remote = work


class Actor:
    """A worker that draws grey pictures, but for what it is told to raise, by its method, one for each call.

    The picture of one seed ends it always.
    """

    def __init__(self, raises: dict[str, list[object]], poison: int | None) -> None:
        self._raises, self._poison = raises, poison
        self.look = Method(lambda order: self._come("look", worker.Look("n1", {}, versions())))
        self.load = Method(lambda sent: self._come("load", worker.Answer([])))
        self.draw = Method(self._draw)

    def _come(self, method: str, answer: object) -> list[object]:
        return [self._raises[method].pop(0) if self._raises.get(method) else answer]

    def _draw(self, number: int, jobs: bytes) -> list[object]:
        grey, jobs = np.zeros((64, 64, 3), np.uint8), inputs.unpack(jobs, None)
        if any(job.seed == self._poison for job in jobs):
            return [ActorDiedError()]
        outcome = worker.Outcome(0, [(job.file.name, grey) for job in jobs])
        return self._come("draw", worker.Answer([], {number: outcome}))


class Ref(list):
    """A list that can be a key."""

    __hash__ = object.__hash__


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draws four pictures by one worker that raises what it is given; gives their seeds, and what failed."""

    def get(ref: Ref) -> object:
        if isinstance(ref[0], Exception):
            raise ref[0]
        return ref[0]

    def run(
        raises: dict[str, list[object]], poison: int | None = None, workers: tuple[int, int] | None = None
    ) -> tuple[list[int], list[str]]:
        actor = Actor(raises, poison)
        for method in (actor.look, actor.load, actor.draw):
            method.remote = lambda *arguments, work=method.remote: Ref(work(*arguments))
        made = type("Made", (), {"options": lambda self, **_: self, "remote": lambda self: actor})
        monkeypatch.setattr(ray, "put", lambda thing: thing)
        monkeypatch.setattr(ray, "remote", lambda kind: made())
        monkeypatch.setattr(ray, "wait", lambda refs, num_returns=1, timeout=0: (refs[:num_returns], []))
        monkeypatch.setattr(ray, "get", get)
        monkeypatch.setattr(ray, "kill", lambda actor, no_restart=True: None)
        monkeypatch.setattr(nodes, "alive", lambda: [HERE])
        argv = ("--ckpt", DEMO, "--prompt", "red --d 1-4", "--W", 64, "--H", 64, "--outdir", tmp_path / "out")
        plan = make_plan(gen_img_diffusers.parse_options([str(word) for word in argv]), None)
        failed: list[str] = []
        ours = driver.Driver(
            *(plan, fleet(workers), worker.Order("run", "module", "load", b"", {}, "/")),
            fail=lambda job, problem: failed.append(f"{job.seed}: {problem}"),
            unfit=set(),
        )
        with console.messages(0), Interruptions() as interruptions:
            made_pictures = list(ours.draw(plan.batches(plan.to_do), interruptions, console.Progress(None)))
        return sorted(job.seed for pictures in made_pictures for job, _ in pictures), failed

    return run


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("draw", "its traceback", cause)


def test_pictures_that_a_full_object_store_did_not_take_are_drawn_again(draw, capsys):
    assert draw({"draw": [task_error(ObjectStoreFullError("full"))]}) == ([1, 2, 3, 4], [])
    assert "warning: the object store of node host is full; its pictures are drawn again" in capsys.readouterr().err


def test_a_store_that_stays_full_ends_the_run(draw):
    with pytest.raises(EnvironmentFault, match="--ray: no worker can draw: ObjectStoreFullError"):
        draw({"draw": [task_error(ObjectStoreFullError("full")) for _ in range(8)]})


def test_what_a_worker_that_was_given_up_answers_later_is_left(draw):
    """It had two batches: it cannot draw any more after the first, and the answer to the second is there as well."""
    assert draw({"draw": [task_error(EnvironmentFault("/models", "broke"))]}, workers=(2, 2)) == ([1, 2, 3, 4], [])


def test_where_the_last_node_is_found_to_lack_a_file_the_run_ends(draw):
    """A worker was lost, and meanwhile the model was taken away: no other worker will ever be ready."""
    lacks = worker.Look("n1", {("files", "m"): "/m is not there"}, {})
    with pytest.raises(EnvironmentFault, match="--ray: no node can draw any more; /m is not there; put it there"):
        draw({"look": [worker.Look("n1", {}, versions()), lacks], "draw": [ActorDiedError()]})


def test_a_worker_that_ends_while_it_loads_may_try_three_times(draw, capsys):
    assert draw({"load": [ActorDiedError(), ActorDiedError()]}) == ([1, 2, 3, 4], [])
    assert "warning: worker 1 lost on node host: " in capsys.readouterr().err
    with pytest.raises(EnvironmentFault, match="--ray: no worker could begin"):
        draw({"load": [ActorDiedError() for _ in range(3)]})


def test_a_worker_that_cannot_load_ends_the_run_with_its_reason(draw, capsys):
    with pytest.raises(EnvironmentFault, match="--ray: no worker can draw: /models: is a mess"):
        draw({"load": [task_error(EnvironmentFault("/models", "is a mess"))]})
    assert "warning: worker 1 on node host ends: /models: is a mess" in capsys.readouterr().err


def test_nodes_that_go_away_while_workers_load_on_them_cost_no_worker(draw, monkeypatch):
    """Each start is on a node that is gone by the next, as spot machines go."""
    looks = [worker.Look(f"gone{number}", {}, versions()) for number in range(6)]
    assert draw({"look": looks, "load": [ActorDiedError() for _ in looks]}) == ([1, 2, 3, 4], [])


def test_a_picture_that_takes_whole_nodes_down_is_listed(draw):
    looks = [worker.Look(f"gone{number}", {}, versions()) for number in range(30)]
    seeds, failed = draw({"look": looks}, poison=2)
    assert seeds == [1, 3, 4]
    assert failed == ["2: ended 9 workers that drew it; draw it without --ray to see why"]


def test_a_picture_that_ends_three_workers_is_listed(draw):
    seeds, failed = draw({}, poison=2)
    assert seeds == [1, 3, 4]
    assert failed == ["2: ended 3 workers that drew it; draw it without --ray to see why"]


def test_a_worker_out_of_memory_halves_its_batch_and_says_so(tmp_path):
    """As one process does; the driver is sent all four pictures of the batch, and the warning."""

    class Painter:
        works_ahead = False

        def begin(self, jobs, make_bar):
            if len(jobs) > 2:
                raise MemoryError
            return lambda: [(job, np.zeros((64, 64, 3), np.uint8)) for job in jobs]

    argv = ("--ckpt", DEMO, "--prompt", "red --d 1-4", "--W", 64, "--H", 64, "--outdir", tmp_path / "out")
    plan = make_plan(gen_img_diffusers.parse_options([str(word) for word in argv]), None)
    ours = worker.Worker()
    ours._drawer = BatchDrawer(Painter(), plan.batch_key, ours._fail, iter)
    ours._highres, ours._facts, ours._quality = plan.highres, run_facts(plan), plan.output.quality
    answer = ours.draw(7, inputs.pack(plan.to_do))
    assert [name for name, _ in answer.done[7].pictures] == [job.file.name for job in plan.to_do]
    assert [text for _, text in answer.messages] == ["out of memory; drawing 2 at a time instead of 4"]
