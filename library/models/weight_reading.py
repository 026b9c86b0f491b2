"""Reading a model's tensors in the type and on the device they are used in, ahead of the models that they are for.

Building the models waits for libraries to be imported, which takes longer than reading the weights.
"""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import torch

from library.errors import InputError
from library.files import checkpoint_layout as layout
from library.files.model_files import Component, ModelFiles
from library.files.weight_files import WeightFile, scale_of
from library.models.kept_weights import KeptWeights

_THREADS = min(4, max(1, (os.cpu_count() or 1) - 1))  # beside the one that imports


class CastWeights:
    """The tensors of a weight file, each a copy of its own in one type on one device.

    Args:
        weights: the file.
        device: where the tensors go.
        dtype: their type.
        channels_last: put the channels of convolutions' weights last in memory.
    """

    def __init__(
        self, weights: WeightFile, device: torch.device, dtype: torch.dtype, *, channels_last: bool = False
    ) -> None:
        self.path, self.shapes = weights.path, weights.shapes
        self.device = device
        self._weights, self._dtype = weights, dtype
        # of all of the file, which other components may be read from as well
        self._scales = {name: scale for name in weights.types if (scale := scale_of(name, weights)) is not None}
        self._channels_last = channels_last
        self._begun: dict[str, Future[torch.Tensor]] = {}

    def begin(self, names: Iterable[str], pool: ThreadPoolExecutor, *, but: int = 0) -> None:
        """Begin to read tensors, the largest first: those keep the threads from waiting for one another.

        Args:
            names: of the tensors.
            pool: reads.
            but: so many bytes are left until they are asked for.
        """
        names = sorted(names, key=lambda name: -torch.Size(self.shapes[name]).numel())
        room = self._nbytes(names) - but
        for name in names:
            room -= self._nbytes([name])
            if room < 0:
                break
            self._begun[name] = pool.submit(self._read, name)

    @property
    def begun_bytes(self) -> int:
        """What the tensors take that were begun and not released yet."""
        return self._nbytes(self._begun)

    def _nbytes(self, names: Iterable[str]) -> int:
        return sum(torch.Size(self.shapes[name]).numel() for name in names) * self._dtype.itemsize

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            InputError: when it holds NaN or infinite values.
        """
        if name not in self._begun or self._begun[name].cancel():  # not begun: whoever waits can as well read
            self._begun[name] = Future()
            self._begun[name].set_result(self._read(name))
        return self._begun[name].result()

    def release(self, name: str) -> None:
        """Let go of a tensor that is not asked for again."""
        self._begun.pop(name, None)

    def close(self) -> None:
        """Let go of the file and of all tensors."""
        for reading in self._begun.values():
            reading.cancel()
        self._begun.clear()
        self._weights.close()

    def _read(self, name: str) -> torch.Tensor:
        value = self._weights.tensor(name)
        if name in self._scales:
            value = value.float() * self._weights.tensor(self._scales[name]).float()
        value = self._own_copy(value)
        flat = value.as_strided((value.numel(),), (1,))  # as it lies in memory, which is many times as fast to search
        if value.numel() and not torch.stack(flat.aminmax()).isfinite().all():  # NaN if any value is
            problem = f"{name!r} holds NaN or infinite values; download it again or use float32"
            raise InputError(str(self.path), problem)
        if name not in self._scales.values():
            self._weights.release(name)
        return value

    def _own_copy(self, value: torch.Tensor) -> torch.Tensor:
        last = self._channels_last and value.dim() == 4
        order = torch.channels_last if last else torch.contiguous_format
        return value.to(device=self.device, dtype=self._dtype, memory_format=order, copy=True)


@dataclass(frozen=True)
class ModelWeights:
    """The tensors of a model's components, on their way."""

    unet: CastWeights | KeptWeights
    vae: CastWeights | KeptWeights
    texts: tuple[CastWeights | KeptWeights, ...]


def read_ahead(
    files: ModelFiles,
    device: torch.device,
    dtype: torch.dtype,
    *,
    vae_dtype: torch.dtype | None = None,
    channels_last: bool,
    kept: Mapping[str, KeptWeights] = MappingProxyType({}),
    texts_go: bool = False,
) -> ModelWeights:
    """Begin to read all weights of a model in the background.

    Args:
        files: the model.
        device: where it runs.
        dtype: in what it runs.
        vae_dtype: the VAE's type, where that is another one.
        channels_last: see `CastWeights`.
        kept: components' weights that need not be read, by the names in `ModelFiles.parts`.
        texts_go: the text encoders are gone before the U-Net is filled; as much of it as they take is left until then.
    """
    pool = ThreadPoolExecutor(_THREADS)

    def begin(component: Component, *prefixes: str, dtype: torch.dtype = dtype, but: int = 0) -> CastWeights:
        weights = CastWeights(component.weights, device, dtype, channels_last=channels_last)
        own = [name for name in weights.shapes if name.startswith(prefixes)]  # a checkpoint holds several components
        weights.begin(own or weights.shapes, pool, but=but)
        return weights

    texts = tuple(
        kept.get(text.kind.part) or begin(text, *(text.names.prefix,) if text.names else ()) for text in files.texts
    )
    begun = sum(text.begun_bytes for text in texts if isinstance(text, CastWeights))
    unet = kept.get("unet") or begin(files.unet, layout.UNET_PREFIX, but=begun if texts_go else 0)
    vae = kept.get("vae") or begin(files.vae, layout.VAE_PREFIX, dtype=vae_dtype or dtype)
    pool.shutdown(wait=False)
    return ModelWeights(unet, vae, texts)
