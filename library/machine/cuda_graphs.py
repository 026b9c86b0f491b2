"""CUDA graphs: a function's kernels recorded once for each shape of its inputs, and started all together from then on.

A U-Net is some thousand kernels, of which many take a GPU less time than Python takes to ask for them. No compiler is
needed (https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

import gc
import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from library.settings.computing import Computing

logger = logging.getLogger(__name__)

_CALLS_BEFORE = 40  # of one shape, two or three pictures: recording takes as long as some steps, and memory
_SPARE = 4  # so many times what a graph took has to be left: decoding takes more than a step

_all: "weakref.WeakSet[CudaGraphs]" = weakref.WeakSet()


@dataclass
class _Graph:
    """A function's kernels, with the memory that they read and write."""

    graph: torch.cuda.CUDAGraph
    inputs: Sequence[torch.Tensor]
    output: torch.Tensor
    # what the inputs were copied from: what is the same object is not copied again
    sources: list[torch.Tensor] = field(default_factory=list)

    def replay(self, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        before = self.sources or [None] * len(sources)
        for own, source, last in zip(self.inputs, sources, before):
            if source is not last:
                own.copy_(source, non_blocking=True)
        self.sources = list(sources)
        self.graph.replay()
        return self.output


class CudaGraphs:
    """The graphs of a run, by the shapes of what they are called with.

    Args:
        always: record at the second call, whatever memory is left; else only what is called often, where there is room.
    """

    def __init__(self, *, always: bool = False) -> None:
        self._always = always
        self._graphs: dict[Hashable, _Graph] = {}
        self._calls: dict[Hashable, int] = {}
        self._version: Hashable = None
        self._pool = None  # memory that all graphs take turns with
        self._given_up = False
        _all.add(self)

    def call(
        self,
        function: Callable[[Sequence[torch.Tensor]], torch.Tensor],
        inputs: Sequence[torch.Tensor],
        *,
        kind: Hashable = None,
        version: Hashable = None,
    ) -> torch.Tensor:
        """What a function gives, from its graph where there is one; a result that the next call may write over.

        Args:
            function: does nothing but start kernels, the same ones for inputs of the same shapes.
            inputs: all tensors that change from call to call. None is written into after it was handed over.
            kind: what else decides which kernels there are.
            version: of what the function knows beside its inputs; when it changes, all graphs are made anew.
        """
        if self._given_up:
            return function(inputs)
        if version != self._version:
            self.forget()
            self._version = version
        key = (kind, *((each.shape, each.stride(), each.dtype) for each in inputs))
        if key not in self._graphs:
            self._calls[key] = calls = self._calls.get(key, 0) + 1
            if calls <= (1 if self._always else _CALLS_BEFORE) or not self._record(key, function, inputs):
                return function(inputs)
        return self._graphs[key].replay(inputs)

    def forget(self) -> None:
        """Give up all graphs, with their memory."""
        self._graphs.clear()
        self._calls.clear()
        self._pool = None

    def give_up(self, reason: str) -> None:
        """Do without graphs from now on."""
        if not self._given_up:
            logger.info("CUDA graphs: %s; going on without them", reason)
        self._given_up = True
        self.forget()

    def _record(
        self, key: Hashable, function: Callable[[Sequence[torch.Tensor]], torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> bool:
        """Record a graph; False where that cannot be, with nothing left of it."""
        try:
            graph, taken, left = self._recorded(function, inputs)
        except RuntimeError as problem:  # lack of memory among them
            reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:160]
        else:
            if self._always or left >= _SPARE * taken:
                self._graphs[key] = graph
                return True
            del graph
            reason = f"one takes {taken / 2**20:.0f} MiB of the device's memory, and {left / 2**20:.0f} are left"
        self.give_up(reason)
        gc.collect()
        torch.cuda.empty_cache()
        return False

    def _recorded(
        self, function: Callable[[Sequence[torch.Tensor]], torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> tuple[_Graph, int, int]:
        """A graph, the bytes that it took, and those that are left."""
        own = [each.clone() for each in inputs]
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # kernels choose their ways once, which is not to be recorded
            function(own)
        current.wait_stream(stream)
        torch.cuda.empty_cache()
        before, _ = torch.cuda.mem_get_info()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, which write pictures, may do as they like meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = function(own)
        finally:
            # PyTorch stays on its recording's stream where that fails, and nothing there waits for what went before
            torch.cuda.set_stream(current)
        left, _ = torch.cuda.mem_get_info()
        return _Graph(graph, own, output), before - left, left


def make_cuda_graphs(computing: Computing, device: torch.device) -> CudaGraphs | None:
    """What keeps the graphs of a run; None where there are to be none."""
    if computing.cuda_graphs == "on" and device.type != "cuda":
        logger.warning("--cuda_graphs: there is no GPU of NVIDIA here, it changes nothing")
    if computing.cuda_graphs == "off" or device.type != "cuda" or computing.compile:
        return None
    if computing.cuda_graphs == "auto" and computing.low_vram:
        return None
    return CudaGraphs(always=computing.cuda_graphs == "on")


def give_up_all(reason: str) -> None:
    """Give up all graphs of this process, as where their memory is wanted for something else."""
    for graphs in list(_all):
        graphs.give_up(reason)
