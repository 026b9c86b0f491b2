"""What img2img draws over: a picture with its mask and new borders, and which part of it is drawn at which size."""

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from library.errors import InputError
from library.files.pictures import picture_size, read_drawn, read_mask, read_picture
from library.settings.masks import NO_MARGINS, Margins, MaskSettings
from library.values import MAX_SIZE_PX

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Size = tuple[int, int]  # width and height in pixels
MAX_REGIONS = 100  # of one mask, each drawn by itself; beyond that it is noise
_KEPT_BOXES = 4096  # masks whose boxes are kept while a run is planned


class Box(NamedTuple):
    """A part of a picture, in its pixels; it may reach beyond the picture."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> Size:
        """Its width and height."""
        return self.right - self.left, self.bottom - self.top

    def scaled(self, before: Size, after: Size) -> tuple[float, float, float, float]:
        """The same part of a picture of another size."""
        across, down = after[0] / before[0], after[1] / before[1]
        return self.left * across, self.top * down, self.right * across, self.bottom * down


@dataclass(frozen=True)
class Canvas:
    """A picture that is drawn over.

    Args:
        source: its file.
        mask_file: where it is redrawn; None with new borders alone, or to redraw all of it.
        extend: how far it grows; None for not.
        settings: how masks are read.
    """

    source: Path
    mask_file: Path | None
    extend: Margins | None
    settings: MaskSettings

    @cached_property
    def picture(self) -> "Image":
        """RGB; new borders repeat the outermost pixels."""
        picture = read_picture(self.source, "--image_path")
        return grown(picture, self.extend) if self.extend else picture

    @cached_property
    def mask(self) -> "Image | None":
        """Grey, 255 where it is redrawn; of any size, but for the whole picture. None to redraw all of it."""
        from PIL import Image

        if self.mask_file is None and self.extend is None:
            return None
        settings, mask = self.settings, None
        if self.mask_file is not None:
            mask = oriented_mask(self.mask_file, settings)
        if self.extend or settings.blur_px or settings.masked_area:  # what counts the picture's pixels
            mask = self._at_source_size(mask)
        if self.extend:
            mask = grown(mask or Image.new("L", picture_size(self.source)), self.extend, 255)
        return mask and blurred(mask, settings)

    @property
    def marks(self) -> tuple[tuple[int, int], ...] | None:
        """What tells its files as they are now, which may be changed between two prompts of the loop; None if one is
        gone.
        """
        try:
            stats = [file.stat() for file in (self.source, self.mask_file) if file]
        except OSError:
            return None
        return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)

    @property
    def size(self) -> Size:
        """Of the picture; only its header is read for it."""
        width, height = picture_size(self.source)
        by = self.extend or NO_MARGINS
        return width + by.left + by.right, height + by.top + by.bottom

    def _at_source_size(self, mask: "Image | None") -> "Image | None":
        from PIL import Image

        return mask and mask.resize(picture_size(self.source), Image.Resampling.BILINEAR)

    @cached_property
    def regions(self) -> "Regions":
        """The regions of the mask that are drawn one after another; a single one where they are drawn together."""
        import numpy as np

        mask = None if self.mask is None else np.asarray(self.mask)
        if mask is None or not mask.any():
            return Regions(())
        if not self.settings.each_region:
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            box = Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            return Regions((box,))
        import cv2

        count, labels, found, _ = cv2.connectedComponentsWithStats((mask > 0).astype(np.uint8), connectivity=8)
        boxes = (map(int, found[label, : cv2.CC_STAT_AREA]) for label in range(1, count))
        return Regions(tuple(Box(x, y, x + width, y + height) for x, y, width, height in boxes), labels)

    def mask_of(self, region: int) -> "Image | None":
        """The mask of one of the regions alone."""
        import numpy as np
        from PIL import Image

        if self.mask is None or self.regions.labels is None:
            return self.mask
        inside = self.regions.labels == region + 1
        return Image.fromarray(np.asarray(self.mask) * inside.astype(np.uint8))


@dataclass(frozen=True)
class Regions:
    """Separate regions of a mask: the box about each, and which region each pixel is in, from 1 (None: all in one)."""

    boxes: tuple[Box, ...]
    labels: "np.ndarray | None" = None


def oriented_mask(file: Path, settings: MaskSettings) -> "Image":
    """A mask as its file has it, grey, 255 where the picture is redrawn."""
    from PIL import ImageChops

    if settings.from_alpha:
        mask = ImageChops.invert(read_drawn(file, "--image_path").getchannel("A"))
    else:
        mask = read_mask(file)
    return ImageChops.invert(mask) if settings.invert else mask


def blurred(mask: "Image", settings: MaskSettings) -> "Image":
    """A mask with soft edges, where they are asked for."""
    from PIL import ImageFilter

    return mask.filter(ImageFilter.GaussianBlur(settings.blur_px)) if settings.blur_px else mask


def grown(picture: "Image", by: Margins, fill: int | None = None) -> "Image":
    """A picture with borders; without a fill they repeat its outermost pixels."""
    import numpy as np
    from PIL import Image

    pixels = np.asarray(picture)
    sides = [(by.top, by.bottom), (by.left, by.right), (0, 0)][: pixels.ndim]
    if fill is None:
        return Image.fromarray(np.pad(pixels, sides, mode="edge"))
    return Image.fromarray(np.pad(pixels, sides, constant_values=fill))


def cut(picture: "Image", part: tuple[float, float, float, float], size: Size, resampling: int) -> "Image":
    """A part of a picture, in its pixels, at a size; beyond the picture its outermost pixels go on."""
    from PIL import Image

    left, top, right, bottom = part
    beyond = (-left, -top, right - picture.width, bottom - picture.height)
    margins = Margins(*(max(0, math.ceil(each)) for each in beyond))
    if any(margins):
        picture = grown(picture, margins)
        part = (left + margins.left, top + margins.top, right + margins.left, bottom + margins.top)
    return picture.resize(size, Image.Resampling(resampling), box=part)


@dataclass(frozen=True)
class View:
    """What of a canvas is drawn at once.

    Args:
        canvas: what is drawn over.
        size: the width and height that it is drawn at.
        box: the part that is drawn; None for all of it.
        region: which of the mask's regions it is drawn for, where there is a box.
    """

    canvas: Canvas
    size: Size
    box: Box | None = None
    region: int = 0

    @cached_property
    def mask(self) -> "Image | None":
        """Grey, of its size; 255 is redrawn. None to redraw all."""
        return self.mask_at(self.size)

    def mask_at(self, size: Size) -> "Image | None":
        """The mask at another (width, height)."""
        from PIL import Image

        return self.own_mask and self.own_mask.resize(size, Image.Resampling.BILINEAR)

    @cached_property
    def own_mask(self) -> "Image | None":
        """The mask at the box's size, or for all of the canvas at its own."""
        from PIL import Image

        if self.box is None:
            return self.canvas.mask
        mask = self.canvas.mask_of(self.region)
        return mask and cut(mask, self.box, self.box.size, Image.Resampling.BILINEAR)

    def of(self, picture: "Image") -> "Image":
        """This part of a picture, that may be of another size than the canvas, at the size that is drawn."""
        from PIL import Image

        if self.box is None:
            return picture if picture.size == self.size else picture.resize(self.size, Image.Resampling.LANCZOS)
        part = self.box.scaled(self.canvas.size, picture.size)
        return cut(picture, part, self.size, Image.Resampling.LANCZOS)


# ---------------------------------------------------------------------------------------------------------------------
# Masked areas


def find_boxes(canvas: Canvas, within: Size, size: Size, where: str) -> tuple[Box, ...]:
    """The parts of a canvas that are drawn one after another.

    Args:
        canvas: what is drawn over.
        within: its width and height.
        size: the width and height that a part is drawn at, which are its shape.
        where: the place of the line that it is for.

    Raises:
        InputError: when the mask redraws nothing, or holds more regions than are drawn.
    """
    areas = _masked_areas(canvas, canvas.marks)
    subject = "--image_path" if canvas.settings.from_alpha else "--mask_path"
    subject = f"{subject} {canvas.mask_file or canvas.source}"
    if not areas:
        raise InputError(subject, "redraws nothing, so that there is no area to draw; paint white what is to go", where)
    if len(areas) > MAX_REGIONS:
        problem = f"has {len(areas)} separate regions, more than {MAX_REGIONS}; clean it, or leave out"
        raise InputError(subject, f"{problem} --inpaint_regions each", where)
    boxes = tuple(_in_shape(area, canvas.settings.padding_px, size, within) for area in areas)
    if (longest := max(side for box in boxes for side in box.size)) > MAX_SIZE_PX:
        problem = f"the area in the shape of {size[0]} x {size[1]} would be {longest} pixels long"
        raise InputError("--inpaint_area mask", f"{problem}; give a --W and --H nearer to the mask's shape", where)
    return boxes


@lru_cache(_KEPT_BOXES)
def _masked_areas(canvas: Canvas, marks: object) -> tuple[Box, ...]:
    """The boxes of what a mask redraws, for files of these marks."""
    return replace(canvas).regions.boxes  # of a copy, as what is kept shall hold no pictures


def _in_shape(area: Box, padding_px: int, size: Size, within: Size) -> Box:
    """An area with a padding, grown to the shape of (width, height), and moved into the canvas where it fits in."""
    # no more padding than there is picture
    width, height = (max(side, min(side + 2 * padding_px, whole)) for side, whole in zip(area.size, within))
    width, height = max(width, math.ceil(height * size[0] / size[1])), max(height, math.ceil(width * size[1] / size[0]))
    left = _placed((area.left + area.right - width) // 2, width, within[0])
    top = _placed((area.top + area.bottom - height) // 2, height, within[1])
    return Box(left, top, left + width, top + height)


def _placed(start: int, length: int, within: int) -> int:
    """Where a stretch begins that is to lie within another, or in its middle."""
    return min(max(start, 0), within - length) if length <= within else (within - length) // 2
