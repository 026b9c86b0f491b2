"""Guide pictures made from photographs without any model: edges, lines, blurs and the like.

Each function takes a picture (height, width, 3) uint8, RGB, and the numbers of `settings.preprocessing`, and returns
one of the same shape and type; `inpaint` returns int16.
"""

from collections.abc import Callable

import numpy as np

from library.settings.preprocessing import Preprocess

Pixels = np.ndarray
_USUAL_SIDE_PX = 512  # what widths of lines in pixels are for; they grow with the picture
# A difference of Gaussians: how much wider the second is, and the share of a step's height that the difference peaks at
_WIDER, _PEAK = 1.6, 0.11
_NARROWEST_PX = 0.8  # of a Gaussian; one that is narrower falls between the pixels


def preprocessed(pixels: Pixels, chosen: Preprocess, *further: int | Pixels) -> Pixels:
    """A picture preprocessed; `further` is the seed, or the mask (height, width) uint8, for those that take it."""
    return _FUNCTIONS[chosen.name](pixels, *chosen.numbers, *further)


def canny(pixels: Pixels, low: int, high: int) -> Pixels:
    """Edges by Canny's detector (1986), with its hysteresis thresholds."""
    import cv2  # 25 MB that only some runs need

    return _three(cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), low, high))


def scribble(pixels: Pixels, contrast: int) -> Pixels:
    """Broad strokes, white on black, on the dark side of steps of `contrast` levels and more."""
    return _three(np.where(_ink(pixels, 2.0, contrast, softness=1.0) > 0.5, 255, 0).astype(np.uint8))


def lineart(pixels: Pixels, contrast: int) -> Pixels:
    """Fine soft lines, white on black, on the dark side of steps of `contrast` levels and more."""
    return _three((_ink(pixels, 0.8, contrast, softness=20.0) * 255).round().astype(np.uint8))


def _ink(pixels: Pixels, sigma: float, contrast: float, softness: float) -> Pixels:
    """Ink (height, width) from 0 to 1 by XDoG, extended differences of Gaussians
    (Winnemöller, Kyprianidis and Olsen 2012, https://doi.org/10.1016/j.cag.2012.03.004).

    The paper sharpens by p and takes 1 + tanh(φ(S - ε)) below ε for paper. This is its limit of a large p, which inks
    edges and leaves dark grounds alone; of the three colours the darkest ink counts.

    Args:
        pixels: the picture.
        sigma: of the narrower Gaussian, in pixels of a usual picture.
        contrast: the step, in levels of 255, where ink begins.
        softness: how many levels further on it is three quarters black: 1 / φ.
    """
    import cv2

    sigma = max(_NARROWEST_PX, sigma * min(pixels.shape[:2]) / _USUAL_SIDE_PX)
    narrow, wide = (cv2.GaussianBlur(pixels.astype(np.float32), (0, 0), s) for s in (sigma, sigma * _WIDER))
    step = (wide - narrow).max(axis=-1) / _PEAK
    return np.tanh(np.maximum(step - contrast, 0) / softness)


def softedge(pixels: Pixels) -> Pixels:
    """Soft edges: Canny's of the picture at several sizes and several thresholds, averaged and blurred. The more of
    them find an edge, the brighter it is.
    """
    import cv2

    height, width = pixels.shape[:2]
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    total = np.zeros((height, width), np.float32)
    for smaller in (1, 2, 4):
        size = (max(1, width // smaller), max(1, height // smaller))
        reduced = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
        for low, high in ((50, 150), (100, 250), (150, 350)):
            edges = cv2.Canny(reduced, low, high)
            total += cv2.resize(edges, (width, height), interpolation=cv2.INTER_LINEAR)
    blurred = cv2.GaussianBlur(total / 9, (0, 0), max(0.5, min(height, width) / _USUAL_SIDE_PX))
    # fine edges lose most by the blur: those that all find would else be half bright
    return _three(np.clip(blurred * 1.7, 0, 255).round().astype(np.uint8))


def mlsd(pixels: Pixels, length: int) -> Pixels:
    """Straight lines of `length` pixels and more, white on black, by OpenCV's line segment detector
    (von Gioi et al. 2012, https://doi.org/10.5201/ipol.2012.gjmr-lsd).
    """
    import cv2

    lines = cv2.createLineSegmentDetector().detect(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0]
    drawn = np.zeros(pixels.shape[:2], np.uint8)
    for x1, y1, x2, y2 in () if lines is None else lines[:, 0]:
        if np.hypot(x2 - x1, y2 - y1) >= length:
            cv2.line(drawn, (round(x1), round(y1)), (round(x2), round(y2)), 255, 1)
    return _three(drawn)


def tile(pixels: Pixels, factor: int) -> Pixels:
    """The picture without its details: shrunk by a factor and enlarged again."""
    import cv2

    height, width = pixels.shape[:2]
    small = cv2.resize(pixels, (max(1, width // factor), max(1, height // factor)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def blur(pixels: Pixels, sigma: int) -> Pixels:
    """The picture blurred by a Gaussian of `sigma` pixels."""
    import cv2

    return cv2.GaussianBlur(pixels, (0, 0), sigma)


def gray(pixels: Pixels) -> Pixels:
    """The picture without its colours."""
    import cv2

    return _three(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))


def invert(pixels: Pixels) -> Pixels:
    """The picture's negative: black lines on white become white ones on black."""
    return 255 - pixels


def threshold(pixels: Pixels, level: int) -> Pixels:
    """White where the picture is brighter than `level`, else black."""
    return np.where(gray(pixels) > level, 255, 0).astype(np.uint8)


def shuffle(pixels: Pixels, cells: int, seed: int) -> Pixels:
    """The picture's content in disorder: each pixel is taken from where smooth noise of so many cells along the
    shorter side says.
    """
    import cv2

    height, width = pixels.shape[:2]
    draw = np.random.default_rng(seed).random
    cell_px = min(height, width) / cells
    rows, columns = (max(1, round(side / cell_px)) for side in (height, width))

    def places(side: int) -> Pixels:
        # a cell more all round, so that the border is as smooth as the middle
        noise = cv2.resize(
            draw((rows + 2, columns + 2), dtype=np.float32),
            (round(width * (columns + 2) / columns), round(height * (rows + 2) / rows)),
            interpolation=cv2.INTER_CUBIC,
        )
        top, left = (noise.shape[0] - height) // 2, (noise.shape[1] - width) // 2
        noise = noise[top : top + height, left : left + width]
        return (noise - noise.min()) / max(float(np.ptp(noise)), 1e-6) * (side - 1)

    return cv2.remap(pixels, places(width), places(height), cv2.INTER_LINEAR)


def inpaint(pixels: Pixels, mask: Pixels) -> Pixels:
    """The picture with its masked pixels at -1 on a scale from 0 to 1, as ControlNet 1.1's inpaint model reads them
    (https://github.com/lllyasviel/ControlNet-v1-1-nightly): int16, so -255. A mask counts where it is half white.
    """
    return np.where((mask > 127)[..., None], np.int16(-255), pixels.astype(np.int16))


def _three(grays: Pixels) -> Pixels:
    """Grey values (height, width) as a picture of three equal channels."""
    return np.stack([grays] * 3, axis=-1)


_FUNCTIONS: dict[str, Callable[..., Pixels]] = {
    **{"canny": canny, "scribble": scribble, "softedge": softedge, "lineart": lineart, "mlsd": mlsd},
    **{"tile": tile, "blur": blur, "gray": gray, "invert": invert, "threshold": threshold},
    **{"shuffle": shuffle, "inpaint": inpaint},
}
