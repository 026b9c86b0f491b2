"""Pictures that a run starts from: finding, checking, reading and resizing them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import InputError
from library.values import MAX_SIZE_PX, PIXELS_PER_CELL

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def find_pictures(given: str, option: str) -> list[Path]:
    """The picture that a path names, or the pictures of the folder that it names, sorted as strings.

    Raises:
        InputError: when there is none.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{option} {given}", "no such file or folder; check the path")
    pictures = sorted((entry for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES), key=str)
    if not pictures:
        raise InputError(f"{option} {given}", f"holds no pictures ({' '.join(SUFFIXES)}); give another folder")
    return pictures


def check_picture(path: Path, option: str, *, any_size: bool = False) -> tuple[int, int]:
    """Check that a picture is whole and of a usable size; returns its upright (width, height) in pixels.

    Args:
        path: the picture.
        option: where it was given.
        any_size: take one that is larger than pictures should be, too.

    Raises:
        InputError: when it is no picture, cut short, too small or too large.
    """
    subject = f"{option} {path}"
    with opened(path, subject) as picture:
        width, height = picture.size
        if max(width, height) > MAX_SIZE_PX and not any_size:
            raise InputError(
                subject,
                f"is {width} x {height} pixels, more than {MAX_SIZE_PX} a side; "
                "shrink it, or give --allow_large_pictures and have the memory",
            )
        if min(width, height) < PIXELS_PER_CELL:
            raise InputError(subject, f"is {width} x {height} pixels; it needs {PIXELS_PER_CELL} a side at least")
        picture.draft(None, (1, 1))  # JPEGs are decoded small: enough to see that they are whole
        picture.load()
        turned = picture.getexif().get(0x0112, 1) >= 5  # Exif orientations that swap the sides
    return (height, width) if turned else (width, height)


@contextmanager
def opened(path: Path, subject: str) -> Iterator["Image"]:
    """Open a picture; whatever goes wrong with it is an `InputError`."""
    from PIL import Image, UnidentifiedImageError

    if path.exists() and not path.is_file():  # reading a pipe would wait for a writer
        raise InputError(subject, "is no ordinary file; give a picture on a disk")
    # Pillow's own bound would stand in the way; `check_picture` has one, by the sides, before anything is decoded
    bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as picture:
            yield picture
    except UnidentifiedImageError:
        raise InputError(subject, "is no picture that can be read; save it as PNG, JPEG or WebP") from None
    except (OSError, SyntaxError, ValueError) as problem:
        raise InputError(subject, f"is damaged or cannot be read ({problem}); save it again") from None
    finally:
        Image.MAX_IMAGE_PIXELS = bound


def read_picture(path: Path, option: str) -> "Image":
    """Read a picture upright, as 8-bit RGB, transparency on white; of an animation, the first frame."""
    import numpy as np
    from PIL import Image, ImageOps

    with opened(path, f"{option} {path}") as stored:
        picture = ImageOps.exif_transpose(stored)
        if picture.mode.startswith("I"):  # 16 bits of grey
            picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def load_source(path: Path, size: tuple[int, int]) -> "Image":
    """Read an img2img picture at a size of (width, height) pixels."""
    from PIL import Image

    picture = read_picture(path, "--image_path")
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def load_guide(path: Path) -> "Image":
    """Read a guide picture, in its own size."""
    return read_picture(path, "--guide_image_path")


def region_color(part: int) -> tuple[int, int, int]:
    """The pure colour that marks a part's region in a map of colours: the part's number, from 1, in binary, red lowest.

    Red, green, yellow, blue, magenta, cyan, white.
    """
    red, green, blue = (255 * (part + 1 >> bit & 1) for bit in range(3))
    return red, green, blue


def load_mask(path: Path, size: tuple[int, int]) -> "Image":
    """Read an inpainting mask as grey at a size of (width, height); white is repainted."""
    from PIL import Image

    return read_picture(path, "--mask_path").convert("L").resize(size, Image.Resampling.BILINEAR)
