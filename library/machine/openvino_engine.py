"""OpenVINO at work: graphs compiled for the sizes that come, and called with PyTorch's tensors."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from threading import Event, Thread
from typing import Generic, TypeVar

import torch
from diffusers import AutoencoderKL

from library.machine import malloc
from library.machine.openvino_graph import ANY, TYPES, Graph, Module, ValuesOf, decoder_model, shared_tensor
from library.machine.openvino_itself import openvino
from library.machine.openvino_unet import UnetGraph, UnetShape, cross_attentions, shares_beginning

Shape = TypeVar("Shape", bound=Hashable)


@cache
def _core() -> openvino.Core:
    return openvino.Core()


class Compiled(Generic[Shape]):
    """A model's graph, compiled.

    It is compiled for the first sizes that come, which is the fastest. When others come, it is compiled once more, for
    all sizes, which holds no more memory and takes some percent longer a step.

    Args:
        write: makes the graph for sizes, with the memory that its constants lie in.
        any_size: tells the sizes that stand for all like these.
        dtype: what it computes in.
        let_go: lets the system have the memory that the constants were read into.
    """

    def __init__(
        self,
        write: Callable[[Shape], tuple[openvino.Model, list[torch.Tensor]]],
        any_size: Callable[[Shape], Shape],
        dtype: torch.dtype,
        let_go: Callable[[], None] | None = None,
    ) -> None:
        self._write, self._any_size, self._dtype, self._let_go = write, any_size, dtype, let_go
        self._shape: Shape | None = None  # that the request is for
        self._first: Shape | None = None
        self._request: openvino.InferRequest | None = None
        self._memory: list[torch.Tensor] = []

    def __call__(self, shape: Shape, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Compute; the next call may write over what it gives, float32.

        Args:
            shape: the inputs' sizes.
            inputs: in the graph's order.
        """
        inputs = [each.contiguous() for each in inputs]
        shape = self._compiled_for(shape)
        with ExitStack() as stack:
            if shape != self._shape:
                stack.enter_context(malloc.blocks_from_system())
            if self._let_go and shape != self._shape:
                stack.enter_context(_again_and_again(self._let_go))
            try:
                return self._run(self._request_for(shape), inputs)
            except (RuntimeError, MemoryError):  # after too little memory it keeps what it got, and fails at all else
                self.forget()
                raise

    def rest(self) -> None:
        """Let the system have the memory that is needed again at the next call alone."""
        if self._request is not None:
            self._request.get_compiled_model().release_memory()
        if self._let_go:
            self._let_go()

    def forget(self) -> None:
        """Let go of what was compiled, as the model is another one now."""
        self._request = self._shape = None
        self._memory = []

    def _compiled_for(self, shape: Shape) -> Shape:
        """The sizes that a graph for these has."""
        self._first = self._first or shape
        return shape if shape == self._first and self._shape in (None, shape) else self._any_size(shape)

    def _run(self, request: openvino.InferRequest, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        for number, each in enumerate(inputs):
            request.set_input_tensor(number, shared_tensor(each))
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    def _request_for(self, shape: Shape) -> openvino.InferRequest:
        if self._request is None or shape != self._shape:
            self.forget()
            self._request, self._shape = self._compile(shape), shape
        return self._request

    def _compile(self, shape: Shape) -> openvino.InferRequest:
        model, self._memory = self._write(shape)
        settings = {
            "INFERENCE_PRECISION_HINT": TYPES[self._dtype].get_type_name(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        return _core().compile_model(model, "CPU", settings).create_infer_request()


@contextmanager
def _again_and_again(work: Callable[[], None]) -> Iterator[None]:
    """A block during which something short is done every tenth of a second, and once more at the end."""
    ended = Event()

    def run() -> None:
        while not ended.wait(0.1):
            work()

    thread = Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        work()


class OpenVinoUnet:
    """A U-Net that OpenVINO computes.

    What is small stays with PyTorch: the time's embedding, and what cross-attention makes of the text.

    Args:
        unet: the model, on the CPU.
        values_of: tells its layers' weights, whatever networks do to them.
        let_go: see `Compiled`.
        steered: whether there are ControlNets.
    """

    def __init__(
        self,
        unet: Module,
        values_of: ValuesOf,
        let_go: Callable[[], None] | None = None,
        *,
        steered: bool,
    ) -> None:
        self._unet, self._values_of, self._steered = unet, values_of, steered
        self.layers = cross_attentions(unet)
        # ControlNets add to each skip connection, the first convolution's among them, and to the middle
        self._places = 2 + sum(len(block.resnets) + bool(block.downsamplers) for block in unet.down_blocks)
        self._shares_beginning = shares_beginning(unet)
        self._all_even = True  # whether all sizes so far are halved evenly
        self._compiled = Compiled(self._write, self._any_size, unet.dtype, let_go)
        self._version: Hashable = None

    def use(self, version: Hashable) -> None:
        """Take up what networks do to the weights by now, which has this version."""
        if version != self._version:
            self._compiled.forget()
        self._version = version

    def rest(self) -> None:
        """See `Compiled.rest`."""
        self._compiled.rest()

    def forget(self) -> None:
        """See `Compiled.forget`."""
        self._compiled.forget()

    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        kept: Sequence[tuple[torch.Tensor, torch.Tensor]],
        told: dict[str, torch.Tensor] | None,
        added: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """What the U-Net predicts, (R, C, h, w) float32, which the next call may write over.

        Args:
            sample: (R, C, h, w).
            timestep: ().
            kept: for each of `cross_attentions` its keys and values, (R, S, heads, size).
            told: diffusers' `added_cond_kwargs`.
            added: what ControlNets add to each skip connection, and to the middle; nothing where none works.
        """
        rows, own = len(sample), _period(sample) if self._shares_beginning else len(sample)
        inputs = [sample[:own], self._time(sample[:own], timestep, told)]
        if self._shares_beginning:
            inputs.append(torch.arange(rows, dtype=torch.int32) % own)
        inputs += [each for pair in kept for each in pair]
        if self._steered:
            inputs += added or [sample.new_zeros(1, 1, 1, 1)] * self._places
        levels = 2 ** (len(self._unet.up_blocks) - 1)
        height, width = sample.shape[-2:]
        even = not (height % levels or width % levels)
        self._all_even &= even
        shape = UnetShape(own, rows, height, width, kept[0][0].shape[1], halves_evenly=even)
        return self._compiled(shape, inputs)

    def _any_size(self, shape: UnetShape) -> UnetShape:
        """What holds all sizes that have come; what is for uneven ones holds the others, too."""
        return replace(shape.any_size, halves_evenly=self._all_even)

    def _time(self, sample: torch.Tensor, timestep: torch.Tensor, told: dict[str, torch.Tensor] | None) -> torch.Tensor:
        unet = self._unet
        embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), None)
        added = unet.get_aug_embed(emb=embedding, encoder_hidden_states=sample, added_cond_kwargs=told)
        return embedding if added is None else embedding + added

    def _write(self, shape: UnetShape) -> tuple[openvino.Model, list[torch.Tensor]]:
        graph = Graph(self._unet.dtype, self._values_of)
        return UnetGraph(self._unet, graph, shape, self._steered).model(), graph.memory


def _period(sample: torch.Tensor) -> int:
    """After how many rows a sample begins again, to its end."""
    rows = len(sample)
    for period in range(1, rows):
        if rows % period == 0 and torch.equal(sample[period:], sample[:-period]):
            return period
    return rows


class OpenVinoDecoder:
    """A VAE's decoder that OpenVINO computes, in place of the decoder's `forward`.

    Args:
        vae: the model, on the CPU.
        let_go: see `Compiled`.
    """

    def __init__(self, vae: AutoencoderKL, let_go: Callable[[], None] | None = None) -> None:
        self._decoder, self._dtype = vae.decoder, vae.dtype
        self._compiled: Compiled[tuple[int, ...]] = Compiled(self._write, _any_size, vae.dtype, let_go)

    def __call__(self, latents: torch.Tensor, *arguments: object) -> torch.Tensor:
        """(B, C, h, w) → pixels (B, 3, 8h, 8w), float32; of another type than the VAE had, as PyTorch does it."""
        if latents.dtype != self._dtype:
            return type(self._decoder).forward(self._decoder, latents, *arguments)
        pixels = self._compiled(tuple(latents.shape), [latents]).clone()
        self._compiled.rest()
        return pixels

    def _write(self, shape: tuple[int, ...]) -> tuple[openvino.Model, list[torch.Tensor]]:
        graph = Graph(self._dtype, _own_values)
        return decoder_model(self._decoder, graph, shape), graph.memory


def _any_size(latents: tuple[int, ...]) -> tuple[int, ...]:
    return ANY, latents[1], ANY, ANY


def _own_values(layer: Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    return layer.weight, layer.bias


def decode_by_openvino(vae: AutoencoderKL, let_go: Callable[[], None] | None = None) -> None:
    """Let OpenVINO compute a VAE's decoder; see `OpenVinoDecoder`."""
    vars(vae.decoder)["forward"] = OpenVinoDecoder(vae, let_go)
