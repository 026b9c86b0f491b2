"""A GPU that is not there: tensors that say they are on a CUDA device, and are computed on the CPU.

What a GPU would refuse or wait for is an error: tensors of two devices in one operation, random numbers of its own, and
while `Gpu.in_steps` also what makes the program wait for the device, tensors of two floating types in one operation,
and double precision. Where `Gpu.works_ahead`, a batch that is begun while another is drawn may not wait either. What a
GPU would do wrong without a word goes wrong here, too: a copy that is not waited for is empty until then; a CUDA graph
keeps nothing alive that it reads, and writes over the results of those that share its memory.
PyTorch's own `FakeTensorMode` knows devices, too, but no numbers, without which there is no picture to compare and no
CUDA graph to try; nor does it take gradients where PyTorch was built without CUDA.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import pytest
import torch
import torch.utils.checkpoint
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name

import gen_img_diffusers
from library.draw.denoiser import Denoiser
from library.models import models, weight_reading

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

# What reads a tensor's numbers, or gives something whose shape follows from them
_READING = {
    *("item", "tolist", "cpu", "nonzero", "argwhere", "masked_select", "unique", "equal", "allclose", "is_nonzero"),
    *("bincount", "flatnonzero", "unique_consecutive", "histc", "new_tensor"),
    *("solve", "inv", "pinv", "lstsq", "cholesky", "svd", "eigh", "quantile"),
    *("__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "__format__"),
    *("__repr__", "__str__"),
}
_COPYING = {"to", "copy_", "cuda", "cpu", "tensor", "as_tensor", "type"}  # to another device or type, as is said
_RANDOM = {  # draws numbers; the device's own would be others than the seed's on the CPU
    *("rand", "randn", "randint", "randperm", "normal", "rand_like", "randn_like", "randint_like", "multinomial"),
    *("normal_", "uniform_", "random_", "bernoulli", "bernoulli_", "exponential_"),
}
_JOINING = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}  # takes no number of another device either
_INDEXING = {"__getitem__", "__setitem__", "index_put_"}
_MIXING = {"concat"}  # diffusers' XL: a text's vector with the sizes' features, cast together right after
_SLOW_IN_HALF = {"conv2d", "linear", "group_norm", "layer_norm", "scaled_dot_product_attention", "interpolate"}
_NUMBERS = {int, float, bool, type(None), torch.dtype}
_NO_OPERATION = {"_parse_to", "_has_compatible_shallow_copy_type", "device"}
_OF_GPU = {torch.Tensor.device: CUDA, torch.Tensor.is_cuda: True, torch.Tensor.is_cpu: False}


class OnGpu(torch.Tensor):
    """A tensor that says it is on the GPU."""

    gpu: "Gpu"

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        return cls.gpu.call(func, args, kwargs or {})


class _AllCalls(TorchFunctionMode):
    """Hands calls without a tensor of the GPU on as well: they may make one."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        return OnGpu.gpu.call(func, args, kwargs or {})


class Gpu:
    """What the device does, and what is asked of it."""

    def __init__(self) -> None:
        self.in_steps = False
        self.works_ahead = False  # is expected of the program
        self.drawing = 0  # batches that were begun and are not finished
        self.begun_ahead = 0  # of them those that others were drawn beside
        self.beginning_ahead = False
        self.steps = 0  # that were watched
        self.kernels = 0  # that the program started one by one
        self.replays = 0  # of CUDA graphs
        self.recording: _Graph | None = None
        self.failing: Exception | None = None  # what ends the next recording
        self.graphs: WeakSet[_Graph] = WeakSet()  # that were recorded
        self.own_stream = self.stream = _Stream()  # and the one that kernels are started in
        self.arriving: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # copies on their way to the CPU, and what they bring
        self.free = [2**30]  # bytes of memory, each time that it is asked for; the last ones stay

    def memory(self) -> tuple[int, int]:
        """Free bytes, and all of them."""
        return (self.free.pop(0) if len(self.free) > 1 else self.free[0]), 2**34

    def call(self, func: Callable, args: Sequence, kwargs: dict) -> Any:
        """One of PyTorch's functions, as on a GPU."""
        with torch._C.DisableTorchFunctionSubclass():
            return self._call(func, args, kwargs)

    def _call(self, func: Callable, args: Sequence, kwargs: dict) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args[0]) if isinstance(args[0], OnGpu) else func(*args)
        if name in _NO_OPERATION:
            return func(*args, **kwargs)
        if name == "pin_memory":
            assert not isinstance(args[0], OnGpu), "what is on the GPU cannot be pinned"
            return args[0]
        tensors: list[torch.Tensor] = []
        devices: list[torch.device | str] = []
        _sort_out(args, tensors, devices)
        _sort_out(kwargs.values(), tensors, devices)
        if not any(isinstance(tensor, OnGpu) for tensor in tensors) and not any(map(_is_gpu, devices)):
            return func(*args, **kwargs)
        on_gpu = _goes_to_gpu(name, args, devices)
        if problem := self._problem(name, args, kwargs, tensors, on_gpu=on_gpu):
            raise RuntimeError(f"{problem}: {resolve_name(func) or name}({', '.join(map(_described, tensors))})")
        if devices:
            args, kwargs = _mapped(lambda leaf: CPU if _is_device(leaf) else leaf, (args, kwargs))
        if name in ("to", "cpu", "cuda") and isinstance(args[0], OnGpu) != on_gpu:
            func, args = torch.Tensor.to, args if name == "to" else (args[0], CPU)
            kwargs = kwargs | {"copy": True}  # another device's memory
        half = any(tensor.dtype is torch.float16 for tensor in tensors)
        if half and name in _SLOW_IN_HALF and not torch.is_grad_enabled():  # gradients remember what was computed
            func = partial(_by_float32, func)
        result = _mapped(lambda leaf: _placed(leaf, tensors, on_gpu=on_gpu), func(*args, **kwargs))
        self.kernels += 1
        if self.recording is not None:
            self.recording.add(func, args, kwargs, result)
        if name == "to" and isinstance(args[0], OnGpu) and not on_gpu and _not_blocking(args, kwargs):
            self.arriving.append((result, result.clone()))
            result.zero_()
        return result

    def _attribute(self, getter: Callable, tensor: torch.Tensor) -> Any:
        if getter.__self__ in _OF_GPU:
            return _OF_GPU[getter.__self__]
        return _placed(getter(tensor), [tensor], on_gpu=True)

    def _problem(
        self, name: str, args: Sequence, kwargs: dict, tensors: Sequence[torch.Tensor], *, on_gpu: bool
    ) -> str | None:
        # a number may come from the CPU
        sides = {
            isinstance(each, OnGpu) for each in tensors if each.dim() or isinstance(each, OnGpu) or name in _JOINING
        }
        if name in _RANDOM and on_gpu:
            return "random numbers of the device's own"
        if (len(sides) > 1 and name not in _COPYING | _INDEXING) or name in ("numpy", "__array__"):
            return "tensors of two devices"
        if not (self.in_steps or (self.works_ahead and self.beginning_ahead)):
            return None
        leaves = name == "to" and not on_gpu and _is_not_waited_for(args, kwargs)
        waits = _waits(name, args, kwargs, tensors, on_gpu=on_gpu)
        if not self.in_steps:
            return "the program waits for the device before another batch's steps" if waits and not leaves else None
        if waits:
            return "the program waits for the device between steps"
        types = {tensor.dtype for tensor in tensors if tensor.dim() and tensor.is_floating_point()}
        if (len(types) > 1 and name not in _COPYING | _MIXING) or torch.float64 in types:
            return "tensors of two types, or of double precision"
        return None


def _by_float32(func: Callable, *args: Any, **kwargs: Any) -> Any:
    """What a function gives of numbers in half precision, sooner: CPUs have no kernels for these."""

    def cast(leaf: Any, dtype: torch.dtype, other: torch.dtype) -> Any:
        return leaf.to(other) if isinstance(leaf, torch.Tensor) and leaf.dtype is dtype else leaf

    args, kwargs = _mapped(lambda leaf: cast(leaf, torch.float16, torch.float32), (args, kwargs))
    return _mapped(lambda leaf: cast(leaf, torch.float32, torch.float16), func(*args, **kwargs))


def _goes_to_gpu(name: str, args: Sequence, devices: Sequence[torch.device | str]) -> bool:
    """Whether a call's result is on the GPU."""
    if name == "cpu":
        return False
    if devices:
        return _is_gpu(devices[-1])
    if name in ("to", "type_as") and len(args) > 1 and isinstance(args[1], torch.Tensor):
        return isinstance(args[1], OnGpu)
    return True


def _waits(name: str, args: Sequence, kwargs: dict, tensors: Sequence[torch.Tensor], *, on_gpu: bool) -> bool:
    """Whether a GPU's call returns only when all that was asked for before is done."""
    if name in _READING:
        return True
    if name in _INDEXING:  # a list of places is copied to the device; a mask's shape follows from its numbers
        places = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(place, list) for place in places) or any(
            tensor.dtype is torch.bool or isinstance(tensor, OnGpu) != isinstance(args[0], OnGpu)
            for tensor in tensors[1:]
        )
    if name in ("tensor", "as_tensor"):
        return not isinstance(args[0], OnGpu)
    if name in ("where", "repeat_interleave", "tensor_split"):  # with a tensor that says how large the result is
        return (name == "where") == (len(tensors) == 1)
    other_device = {"to": lambda: isinstance(args[0], OnGpu) != on_gpu,
                    "copy_": lambda: isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu)}  # fmt: skip
    # what comes to the CPU without being waited for cannot be read there
    return name in other_device and other_device[name]() and not (on_gpu and _not_blocking(args, kwargs))


def _not_blocking(args: Sequence, kwargs: dict) -> bool:
    """Whether a copy is not waited for."""
    return bool(kwargs.get("non_blocking")) or any(each is True for each in args[2:])


def _is_not_waited_for(args: Sequence, kwargs: dict) -> bool:
    """Whether a tensor leaves the device meanwhile, or for good."""
    return _not_blocking(args, kwargs) or any(isinstance(each, torch.device) and each.type == "meta" for each in args)


def _is_device(leaf: object) -> bool:
    return isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf.split(":")[0] in ("cuda", "cpu"))


def _is_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == CUDA.type


def _sort_out(values: Iterable, tensors: list[torch.Tensor], devices: list[torch.device | str]) -> None:
    """Put the tensors and devices that arguments hold, however deep, into their lists; called for all that is done."""
    for each in values:
        if isinstance(each, torch.Tensor):
            tensors.append(each)
        elif type(each) in _NUMBERS:
            continue
        elif isinstance(each, (tuple, list)):
            _sort_out(each, tensors, devices)
        elif isinstance(each, dict):
            _sort_out(each.values(), tensors, devices)
        elif _is_device(each):
            devices.append(each)


def _leaves(value: object) -> Iterator[object]:
    """What arguments hold, however deep."""
    if isinstance(value, (tuple, list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Arguments or results with each of their leaves changed."""
    if isinstance(value, dict):
        return {key: _mapped(change, each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(change, each) for each in value])
    return change(value)


def _placed(result: Any, inputs: Sequence[torch.Tensor], *, on_gpu: bool) -> Any:
    """A tensor on its device; what was handed in is handed back as it is."""
    if not isinstance(result, torch.Tensor) or any(result is each for each in inputs):
        return result
    return result.as_subclass(OnGpu if on_gpu else torch.Tensor)


def _described(tensor: torch.Tensor) -> str:
    return f"{'cuda' if isinstance(tensor, OnGpu) else 'cpu'} {tensor.dtype} {[*tensor.shape]}"


# ---------------------------------------------------------------------------------------------------------------------
# What stands for the rest of PyTorch's CUDA


def _wait_for_all() -> None:
    if OnGpu.gpu.in_steps:
        raise RuntimeError("the program waits for the device between steps: for all of it")


class _Event:
    """Of a stream: what was asked for before it is done at once here, but copies arrive when they are waited for."""

    def __init__(self) -> None:
        self._arriving, OnGpu.gpu.arriving = OnGpu.gpu.arriving, []

    def synchronize(self) -> None:
        if OnGpu.gpu.in_steps:
            raise RuntimeError("the program waits for the device between steps: an event")
        with torch._C.DisableTorchFunction(), torch.inference_mode():
            for copy, brought in self._arriving:
                copy.copy_(brought)


class _Stream:
    def record_event(self) -> _Event:
        return _Event()

    def wait_stream(self, other: "_Stream") -> None:
        pass

    def synchronize(self) -> None:
        _wait_for_all()


@contextmanager
def _in_stream(stream: _Stream) -> Iterator[None]:
    gpu = OnGpu.gpu
    before, gpu.stream = gpu.stream, stream
    try:
        yield
    finally:
        gpu.stream = before


def _set_stream(stream: _Stream) -> None:
    OnGpu.gpu.stream = stream


class _Borrowed:
    """A tensor whose memory somebody else has to keep."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._memory, self._dtype = StorageWeakRef(tensor.untyped_storage()), tensor.dtype
        self._place = tensor.storage_offset(), tensor.size(), tensor.stride()

    def tensor(self) -> torch.Tensor:
        memory = torch.UntypedStorage._new_with_weak_ptr(self._memory.cdata)
        if memory is None:
            raise RuntimeError("a CUDA graph reads memory that was given back")
        return torch.empty(0, dtype=self._dtype).set_(memory, *self._place)


class _Graph:
    """A CUDA graph: what was asked for while it was recorded, to be done again in the same memory."""

    def __init__(self) -> None:
        self.pool: object = None  # the memory of what is computed in between, and of the result
        self._calls: list[tuple[Callable, Sequence, dict, Any]] = []
        self._own: set[int] = set()  # memory that the graph took while it was recorded

    def add(self, func: Callable, args: Sequence, kwargs: dict, result: Any) -> None:
        """Record a call; what it reads of the program's memory is not kept by that."""
        args, kwargs = _mapped(self._noted, (args, kwargs))
        read = {id(each): each for each in _leaves((args, kwargs)) if isinstance(each, _Borrowed)}
        borrowed = {each._memory.cdata for each in read.values()}
        for each in _leaves(result):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in borrowed:
                self._own.add(each.untyped_storage()._cdata)
        self._calls.append((func, args, kwargs, _mapped(self._noted, result)))

    def _noted(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.untyped_storage()._cdata in self._own:
            return leaf
        return _Borrowed(leaf)

    @property
    def output(self) -> torch.Tensor:
        return self._calls[-1][-1]

    def spoil(self) -> None:
        """What is in the result's memory is not the result."""
        with torch._C.DisableTorchFunction():
            self.output.fill_(torch.nan)

    def replay(self) -> None:
        OnGpu.gpu.replays += 1
        for other in OnGpu.gpu.graphs:
            if other is not self and other.pool is self.pool:
                other.spoil()
        with torch._C.DisableTorchFunction():
            for func, args, kwargs, result in self._calls:
                args, kwargs = _mapped(
                    lambda leaf: leaf.tensor() if isinstance(leaf, _Borrowed) else leaf, (args, kwargs)
                )
                again = func(*args, **kwargs)
                for own, new in zip(_leaves(result), _leaves(again)):
                    if isinstance(own, torch.Tensor) and own is not new:
                        own.copy_(new)


@contextmanager
def _recording(graph: _Graph, pool: object, capture_error_mode: str) -> Iterator[None]:
    gpu = OnGpu.gpu
    gpu.recording, graph.pool = graph, pool
    before, gpu.stream = gpu.stream, _Stream()  # where PyTorch stays when the recording fails
    try:
        yield
        if gpu.failing is not None:
            raise gpu.failing
    finally:
        gpu.recording = None
    gpu.stream = before
    gpu.graphs.add(graph)
    graph.spoil()  # what is recorded is not done yet


class _InThisThread:
    """A pool whose work is done at once: what watches PyTorch's functions watches one thread."""

    def __init__(self, max_workers: int) -> None:
        pass

    def submit(self, work: Callable, *arguments: object) -> Future:
        future: Future = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as problem:
            future.set_exception(problem)
        return future

    def shutdown(self, wait: bool) -> None:
        pass

    def __enter__(self) -> "_InThisThread":
        return self

    def __exit__(self, *problem: object) -> None:
        pass


@contextmanager
def pretended_gpu() -> Iterator[Gpu]:
    """A block in which this machine has a GPU, which watches all steps of pictures from the first one's start on."""
    gpu = OnGpu.gpu = Gpu()
    denoise, predict = gen_img_diffusers.Pipeline._denoise, Denoiser.__call__
    begin = gen_img_diffusers.Pipeline.begin

    def watched_begin(pipeline, jobs, make_bar):
        gpu.beginning_ahead = gpu.drawing > 0
        gpu.begun_ahead += gpu.beginning_ahead
        try:
            finish = begin(pipeline, jobs, make_bar)
        finally:
            gpu.beginning_ahead = False
        gpu.drawing += 1

        def finished():
            gpu.drawing -= 1
            return finish()

        return finished

    def watched_denoise(pipeline, jobs, originals, make_bar, starts=None):
        def steps(timesteps: torch.Tensor) -> Iterator[torch.Tensor]:
            gpu.in_steps = True
            yield from make_bar(timesteps)
            gpu.in_steps = False

        try:
            return denoise(pipeline, jobs, originals, steps, starts)
        finally:
            gpu.in_steps = False

    def watched_predict(denoiser, sample, timestep, index):
        prediction = predict(denoiser, sample, timestep, index)
        wanted = {"sample": (sample, denoiser._models[0].dtype), "prediction": (prediction, torch.float32)}
        for name, (tensor, dtype) in wanted.items():
            assert isinstance(tensor, OnGpu), f"{name}: {_described(tensor)}"
            assert tensor.dtype == dtype, f"{name}: {_described(tensor)}"
        sizes = denoiser._taken.sizes  # a type with fewer digits does not hold all of them
        assert sizes is None or sizes.dtype == torch.float32, f"sizes: {_described(sizes)}"
        assert gpu.stream is gpu.own_stream, "kernels are started in a stream that waits for none"
        gpu.steps += 1
        return prediction

    with pytest.MonkeyPatch.context() as patch, _AllCalls():
        patch.setattr(gen_img_diffusers.Pipeline, "_denoise", watched_denoise)
        patch.setattr(gen_img_diffusers.Pipeline, "begin", watched_begin)
        patch.setattr(Denoiser, "__call__", watched_predict)
        for module in (gen_img_diffusers, models, weight_reading):
            patch.setattr(module, "ThreadPoolExecutor", _InThisThread)
        for name, stand_in in {
            **{"is_available": lambda: True, "device_count": lambda: 1, "empty_cache": lambda: None},
            **{"is_bf16_supported": lambda including_emulation: True, "mem_get_info": gpu.memory},
            **{"current_stream": lambda device=None: gpu.stream, "Stream": _Stream, "stream": _in_stream},
            **{"set_stream": _set_stream, "set_device": lambda device: None, "synchronize": _wait_for_all},
            **{"CUDAGraph": _Graph, "graph": _recording, "graph_pool_handle": object},
        }.items():
            patch.setattr(torch.cuda, name, stand_in)
        # what is computed once more for gradients is computed by PyTorch's engine, which knows nothing of a GPU
        patch.setitem(torch.utils.checkpoint._allowed_determinism_checks_to_fns, "default", lambda tensor: None)
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a moved parameter is another object
        try:
            yield gpu
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
