"""Pictures that a run starts from: finding, checking, reading and resizing them."""

import importlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import InputError, InputErrors
from library.files.globs import advice_on, is_glob, matching
from library.files.picture_texts import ORIENTATION, exif_value
from library.files.png_chunks import SIGNATURE, take_apart
from library.files.text_files import LINE_END, read_text
from library.values import MAX_SIZE_PX, PIXELS_PER_CELL

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".heic", ".heif")
LIST_SUFFIX = ".txt"


@dataclass(frozen=True)
class Found:
    """A picture, and the file and line that name it, where a list does."""

    path: Path
    where: str = ""


def find_pictures(given: str, option: str, *, natural: bool = False) -> list[Found]:
    """The picture that a path names, those of the folder or the list (`.txt`) that it names, or those that fit it as a
    glob; a file or folder of that very name comes first.

    Args:
        given: what the user wrote.
        option: where.
        natural: sort folders and globs with 2 before 10, not as strings; lists keep their order.

    Raises:
        InputError: when there is none.
    """
    subject = f"{option} {given}"
    try:
        path = Path(given).expanduser()
        if path.is_file():
            return _listed(path, option, given) if path.suffix.lower() == LIST_SUFFIX else [Found(path)]
        if path.is_dir():
            pictures = list(filter(_is_listed, path.iterdir()))
            problem = f"holds no pictures ({' '.join(SUFFIXES)}); give another folder"
        elif is_glob(given):
            pictures = [Path(match) for match in matching(path, recursive=True) if not Path(match).is_dir()]
            hint = ", in which [[] stands for a bracket" if "[" in given else ""
            problem = f"matches no files; check the pattern{hint}"
        else:
            raise InputError(subject, f"no such file or folder; {advice_on(path)}")
    except (OSError, RuntimeError, ValueError) as fault:  # RuntimeError: ~ of somebody without a home
        reason = getattr(fault, "strerror", None) or fault
        raise InputError(subject, f"cannot be read: {reason}; check the path") from None
    if not pictures:
        raise InputError(subject, problem)
    return [Found(picture) for picture in sorted(pictures, key=_natural_key if natural else str)]


def _natural_key(path: Path) -> list[tuple[int, str]]:
    """What sorts paths by the numbers in them: text and number in turn."""
    parts = re.split("([0-9]+)", str(path))
    return [(int(part) if place % 2 else 0, part) for place, part in enumerate(parts)]


def _listed(file: Path, option: str, given: str) -> list[Found]:
    """The pictures of a list: a path a line, relative to the list's folder; blank lines and comments (#) are skipped.

    Raises:
        InputError: for paths that are no files, each with its line, and for a list without any.
    """
    found: list[Found] = []
    faults: list[InputError] = []
    for number, line in enumerate(LINE_END.split(read_text(str(file), f"{option} {given}")), start=1):
        if not (text := line.strip()) or text.startswith("#"):
            continue
        where, subject = f"{file}:{number}", f"{option} {text}"
        try:
            path = file.parent / Path(text).expanduser()
            if path.is_file():
                found.append(Found(path, where))
            elif path.is_dir():
                faults.append(InputError(subject, "is a folder; write the path of a picture", where))
            else:
                faults.append(InputError(subject, f"no such file; {advice_on(path)}", where))
        except (OSError, RuntimeError) as fault:
            reason = getattr(fault, "strerror", None) or fault
            faults.append(InputError(subject, f"cannot be read: {reason}; check the path", where))
    if faults:
        raise faults[0] if len(faults) == 1 else InputErrors(faults)
    if not found:
        raise InputError(f"{option} {given}", "names no picture; write a path a line")
    return found


def _is_listed(entry: Path) -> bool:
    """Whether an entry of a folder is a picture by its name; macOS keeps files' attributes under `._` and the name."""
    return entry.suffix.lower() in SUFFIXES and not entry.name.startswith("._") and not entry.is_dir()


def check_picture(path: Path, option: str, *, where: str = "", any_size: bool = False) -> tuple[int, int]:
    """Check that a picture is whole and of a usable size; returns its upright (width, height) in pixels.

    Args:
        path: the picture.
        option: where it was given.
        where: the file and line that name it, if any.
        any_size: take one that is larger than pictures should be, too.

    Raises:
        InputError: when it is no picture, cut short, too small or too large.
    """
    subject = f"{option} {path} ({where})" if where else f"{option} {path}"
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
        turned = _orientation(picture) in _SIDES_SWAPPED
    return (height, width) if turned else (width, height)


def picture_size(path: Path) -> tuple[int, int]:
    """The upright (width, height) in pixels of a picture that was checked; only its header is read."""
    with opened(path, str(path)) as picture:
        width, height = picture.size
        return (height, width) if _orientation(picture) in _SIDES_SWAPPED else (width, height)


@contextmanager
def opened(path: Path, subject: str) -> Iterator["Image"]:
    """Open a picture, of which only the pixels have to be whole; whatever goes wrong with them is an `InputError`."""
    from PIL import Image, UnidentifiedImageError

    if path.exists() and not path.is_file():  # reading a pipe would wait for a writer
        raise InputError(subject, "is no ordinary file; give a picture on a disk")
    # Pillow's own bound would stand in the way; `check_picture` has one, by the sides, before anything is decoded
    bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        # warnings are of what lies beside the pixels
        with warnings.catch_warnings(action="ignore"), _open(path, subject) as picture:
            yield picture
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise InputError(subject, "is no picture that can be read; save it as PNG, JPEG or WebP") from None
    except Exception as problem:  # each of Pillow's readers raises what it likes
        raise InputError(subject, f"is damaged or cannot be read ({problem}); save it again") from None
    finally:
        Image.MAX_IMAGE_PIXELS = bound


def _open(path: Path, subject: str) -> "Image":
    """A picture whose header has been read; a PNG's texts are in its `info`."""
    from PIL import Image

    with path.open("rb") as file:
        head = file.read(_BRANDS_BYTES)
        if not head.startswith(SIGNATURE):
            if _is_heic(head):
                _learn_heic(subject)
            return Image.open(path)
        file.seek(0)
        pixels, texts = take_apart(file.read())
    picture = Image.open(io.BytesIO(pixels))
    picture.info.update(texts | _clear_colour(picture, depth=pixels[_DEPTH_AT]))
    return picture


# HEIF (ISO/IEC 23008-12) names its brands in the first box: the major one, a version, and those that it fits as well.
# `mif1` and `msf1` are any codec's, AVIF's too, which Pillow reads by itself.
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_BRANDS_BYTES = 64


def _is_heic(head: bytes) -> bool:
    """Whether a file that begins so is a HEIC picture."""
    size = min(int.from_bytes(head[:4]), len(head))
    brands = {head[at : at + 4] for at in range(8, size, 4) if at != 12}
    return head[4:8] == b"ftyp" and not brands.isdisjoint(_HEIC_BRANDS)


def _learn_heic(subject: str) -> None:
    """Make Pillow read HEIC, which it needs a package for that is not everywhere."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        problem = "is HEIC, which needs a package; pip install pillow-heif, or save it as PNG"
        raise InputError(subject, problem) from None


_DEPTH_AT = len(SIGNATURE) + 16  # where PNG's header says how many bits a channel has


def _clear_colour(picture: "Image", depth: int) -> dict[str, object]:
    """The colour that a PNG means by clear, as 8 bits where Pillow makes the pixels such and leaves this as it was."""
    clear = picture.info.get("transparency")
    if picture.mode == "L" and depth in (2, 4) and isinstance(clear, int):
        return {"transparency": clear * 255 // ((1 << depth) - 1)}
    if picture.mode == "RGB" and depth == 16 and isinstance(clear, tuple):
        return {"transparency": tuple(channel >> 8 for channel in clear)}
    return {}


# Exif's orientations: what makes a picture upright, by the names of Pillow's operations
_UPRIGHT = {
    **{2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"},
    **{5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"},
}
_SIDES_SWAPPED = (5, 6, 7, 8)


def _orientation(picture: "Image") -> int:
    """An open picture's orientation, 1 to 8; 1, upright, where what it says is none."""
    said = exif_value(picture, ORIENTATION)
    return said if isinstance(said, int) and said in _UPRIGHT else 1


def read_picture(path: Path, option: str) -> "Image":
    """Read a picture upright, as 8-bit RGB, transparency on white; of an animation, the first frame."""
    from PIL import Image

    picture = _read_upright(path, option)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def read_drawn(path: Path, option: str) -> "Image":
    """Read a mask or map upright, as 8-bit RGBA: what is clear in it is not drawn."""
    return _read_upright(path, option).convert("RGBA")


def _read_upright(path: Path, option: str) -> "Image":
    """Read a picture upright, with 8 bits a channel."""
    import numpy as np
    from PIL import Image

    with opened(path, f"{option} {path}") as picture:
        picture.load()
        turn = _UPRIGHT.get(_orientation(picture))
        clear = picture.info.get("transparency")
        if picture.mode.startswith("I"):  # 16 bits of grey
            deep = np.asarray(picture)
            picture = Image.fromarray((deep // 257).astype(np.uint8))
            if isinstance(clear, int):
                alpha = Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8))
                picture = Image.merge("LA", (picture, alpha))
        return picture.transpose(Image.Transpose[turn]) if turn else picture.copy()


def load_guide(path: Path) -> "Image":
    """Read a guide picture, in its own size."""
    return read_picture(path, "--guide_image_path")


def region_color(part: int) -> tuple[int, int, int]:
    """The pure colour that marks a part's region in a map of colours: the part's number, from 1, in binary, red lowest.

    Red, green, yellow, blue, magenta, cyan, white.
    """
    red, green, blue = (255 * (part + 1 >> bit & 1) for bit in range(3))
    return red, green, blue


def read_mask(path: Path) -> "Image":
    """Read an inpainting mask as grey, in its own size: its brightness, as far as it is opaque."""
    from PIL import ImageChops

    drawn = read_drawn(path, "--mask_path")
    return ImageChops.multiply(drawn.convert("RGB").convert("L"), drawn.getchannel("A"))
