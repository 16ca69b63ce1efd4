"""The 24 types of distortion of TID2013 at 5 levels, for any photograph.

Each type has a strength. For most types, the strength of a level is chosen by the PSNR of the distorted image against
the photograph: 33, 30, 27, 24 and 21 dB for levels 1 to 5, as in TID2013. Some photographs cannot reach all these
values; for example, a grey photograph has no colour to lose. The PSNRs of the five levels are then evenly spaced, in
dB, from level 1 to level 5. Level 5 has the lowest PSNR that the photograph can reach, but at least 21 dB. Level 1 has
33 dB or 6 dB more than level 5, whichever is higher, but at most the PSNR at the lowest strength. A type that cannot
change a photograph returns the photograph unchanged. Some types differ from these rules:

- Blur, denoising and JPEG (types 8, 9 and 10) use the same parameters for all photographs at a level, so the PSNR
  depends on the photograph. Averaged over the Kodak photographs, the PSNRs of levels 1 to 5 are 33, 30, 27, 24 and
  21 dB. A PSNR that is the same for all photographs would not match TID2013: the same blur lowers the PSNR more on a
  photograph with much texture, so this photograph would have to be blurred less than others to reach the same PSNR.
  But the opinion scores of TID2013 show that its photographs with much texture were not blurred less than others.
- All levels of type 15 have the same PSNR. The levels differ in the number of blocks.
- Type 17 lowers the contrast at levels 1, 3 and 5, and raises the contrast at levels 2 and 4.

The types follow the descriptions in TID2013's paper (Ponomarenko et al., "Image database TID2013: Peculiarities,
results and perspectives", Signal Processing: Image Communication 30, 2015). TID2013's own programs are not public, so
each type is an approximation, which its docstring describes. To check the approximations, `python -m bench.opinions`
correlates metrics of the distorted images with TID2013's opinion scores.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.fft
from PIL import Image
from scipy import ndimage

Pixels = npt.NDArray[np.uint8]
Planes = npt.NDArray[np.float32]
Apply = Callable[[Planes, int, np.random.Generator], Pixels]
Render = Callable[[float], npt.NDArray]

LEVEL_PSNR = (33.0, 30.0, 27.0, 24.0, 21.0)
"""PSNR of levels 1 to 5 in dB, as in TID2013."""

MIN_SIDE = 64
"""Smallest side of a photograph in pixels; below it, blocks and patches have no meaning."""

BLOCKS = (32, 16, 8, 6, 4)
BLOCK_PSNR = 24.0
"""Number of blocks of type 15 at levels 1 to 5, and the PSNR of all levels in dB."""

BLUR = (0.64, 0.85, 1.33, 2.81, 8.66)
"""Standard deviation of the blur of type 8 at levels 1 to 5, in pixels."""

DENOISING = (10.2, 17.9, 32.9, 61.3, 109.7)
"""Standard deviation of the noise of type 9 at levels 1 to 5, for values from 0 to 255."""

JPEG_QUALITY = (65, 30, 12, 5, 1)
"""libjpeg's quality of type 10 at levels 1 to 5."""

DEFINITION = 2
"""Version of these definitions. A dataset that was started with another version cannot be resumed."""

_TOLERANCE = 0.1  # dB
_GRIDS = ((0, 0), (4, 4), (0, 4), (4, 0), (2, 2), (6, 6), (2, 6), (6, 2))  # offsets of the blocks of type 9
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_YCBCR_TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]], np.float32)


class Distortion(NamedTuple):
    """One of the 24 types. Call it to distort a photograph."""

    name: str
    apply: Apply

    def __call__(self, image: Pixels, level: int, rng: np.random.Generator) -> Pixels:
        """Return a distorted copy of a photograph; the same arguments and the same state of `rng` give the same copy.

        Args:
            image: RGB photograph, uint8 of shape (H, W, 3).
            level: 1 (weak) to 5 (strong).
            rng: Generator of the random numbers.

        Raises:
            ValueError: The dtype, the shape or the level is not as described in Args, or a side is shorter than
                `MIN_SIDE`.
        """
        if (
            image.dtype != np.uint8
            or image.ndim != 3
            or image.shape[2] != 3
            or min(image.shape[:2]) < MIN_SIDE
        ):
            raise ValueError(
                f"a photograph of {image.dtype} with shape {image.shape}: expected uint8 of shape (H, W, 3) "
                f"with sides of at least {MIN_SIDE}"
            )
        if level not in range(1, 6):
            raise ValueError(f"distortion level {level!r}: expected 1 to 5")
        return self.apply(image.astype(np.float32), level, rng)


def psnr(reference: npt.NDArray, distorted: npt.NDArray) -> float:
    """Return the PSNR in dB over all pixels and channels, for values from 0 to 255; infinity for equal images."""
    error = np.mean(np.square(np.subtract(reference, distorted, dtype=np.float32)), dtype=np.float64)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _family(prepare: Callable[[Planes, int, np.random.Generator], Render]) -> Apply:
    """Make a type of distortion from `prepare`, which draws random numbers and returns a `Render` function.

    The `Render` function returns the distorted image for a strength from 0 to 1.
    """

    @functools.wraps(prepare)
    def apply(image: Planes, level: int, rng: np.random.Generator) -> Pixels:
        return _at_level(image, prepare(image, level, rng), level)

    return apply


def _at_level(reference: Planes, render: Render, level: int) -> Pixels:
    """Return the image of `render` whose PSNR is nearest to the target PSNR of the level."""
    return _at_psnr(reference, render, lambda weakest, strongest: _target(level, weakest, strongest))


def _at_psnr(reference: Planes, render: Render, target_of: Callable[[float, float], float]) -> Pixels:
    """Search for the strength whose image has the PSNR nearest to a target (regula falsi), and return this image.

    Args:
        reference: The photograph.
        render: Function that returns the distorted image for a strength from 0 to 1.
        target_of: Function that returns the target. Its two arguments are the PSNRs of the images with strength 0 and
            with strength 1. All PSNRs are in dB.
    """

    def member(strength: float) -> tuple[float, Pixels]:
        pixels = _pixels(render(strength))
        return psnr(reference, pixels), pixels

    low, high = 0.0, 1.0
    (low_psnr, weakest), (high_psnr, strongest) = member(low), member(high)
    target = target_of(low_psnr, high_psnr)
    best = min(((low_psnr, weakest), (high_psnr, strongest)), key=lambda m: abs(m[0] - target))
    for _ in range(8):
        if abs(best[0] - target) <= _TOLERANCE or low_psnr <= target or high_psnr >= target:
            break
        share = 0.5 if math.isinf(low_psnr) else (low_psnr - target) / (low_psnr - high_psnr)
        middle = low + (high - low) * min(max(share, 0.15), 0.85)
        now = member(middle)
        best = min(best, now, key=lambda m: abs(m[0] - target))
        if now[0] > target:
            low, low_psnr = middle, now[0]
        else:
            high, high_psnr = middle, now[0]
    return best[1]


def _target(level: int, weakest: float, strongest: float) -> float:
    first, last = LEVEL_PSNR[0], LEVEL_PSNR[-1]
    if math.isinf(strongest):
        return strongest
    bottom = max(last, strongest)
    top = first if bottom == last else max(first, bottom + 6)  # keeps the five levels apart
    top = min(top, weakest)
    return top + (bottom - top) * (level - 1) / (len(LEVEL_PSNR) - 1)


def _pixels(image: npt.NDArray) -> Pixels:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _between(weakest: float, strongest: float, strength: float) -> float:
    """Interpolate geometrically from `weakest` to `strongest`, so that the PSNR is roughly linear in `strength`."""
    return weakest * (strongest / weakest) ** strength


def _normal(shape: tuple[int, ...], rng: np.random.Generator) -> Planes:
    return rng.standard_normal(shape, dtype=np.float32)


def _unit(noise: npt.NDArray) -> npt.NDArray:
    return noise / noise.std()


def _smooth(image: npt.NDArray, sigma: float) -> npt.NDArray:
    return ndimage.gaussian_filter(image, sigma, axes=(0, 1), mode="nearest", truncate=3)


def _additive(image: Planes, noise: npt.NDArray) -> Render:
    return lambda strength: image + np.float32(_between(0.5, 160, strength)) * noise


@_family
def _gaussian_noise(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Add white Gaussian noise, independent in R, G and B."""
    return _additive(image, _normal(image.shape, rng))


@_family
def _colour_noise(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Add white Gaussian noise in YCbCr, four times as strong in Cb and Cr as in Y."""
    noise = _normal(image.shape, rng) * np.array([1, 4, 4], np.float32)
    return _additive(image, _unit(noise @ _YCBCR_TO_RGB.T))


@_family
def _correlated_noise(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Add Gaussian noise that is smoothed over about three pixels."""
    return _additive(image, _unit(_smooth(_normal(image.shape, rng), 1.0)))


@_family
def _masked_noise(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Add white Gaussian noise in proportion to the local contrast of luminance, so that texture masks the noise."""
    luma = image @ _LUMA
    variance = _smooth(luma**2, 2.0) - _smooth(luma, 2.0) ** 2
    contrast = np.sqrt(np.maximum(variance, 0))
    contrast = np.clip(
        contrast, 0.25 * contrast.mean() + 1, 2 * contrast.mean() + 1
    )  # else edges get too much
    return _additive(image, _unit(_normal(image.shape, rng) * contrast[..., None]))


@_family
def _high_frequency_noise(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Add Gaussian noise without low frequencies, equal in R, G and B."""
    noise = _normal((*image.shape[:2], 1), rng)
    return _additive(image, _unit(noise - _smooth(noise, 0.8)))


@_family
def _impulse_noise(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Replace samples of R, G and B by 0 or 255 at random places."""
    places = rng.random(image.shape, dtype=np.float32)
    impulses = 255 * rng.integers(0, 2, image.shape).astype(np.float32)
    return lambda strength: np.where(places < _between(1e-4, 0.5, strength), impulses, image)


@_family
def _quantisation_noise(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Quantise R, G and B uniformly, with the same step."""

    def render(strength: float) -> npt.NDArray:
        step = _between(2, 160, strength)
        return (np.floor(image / step) + 0.5) * step

    return render


def _gaussian_blur(image: Planes, level: int, rng: np.random.Generator) -> Pixels:
    """Blur with a Gaussian filter."""
    return _pixels(_smooth(image, BLUR[level - 1]))


def _denoising(image: Planes, level: int, rng: np.random.Generator) -> Pixels:
    """Add white Gaussian noise, then denoise with a sliding 8×8 cosine transform that drops weak coefficients."""
    deviation = np.float32(DENOISING[level - 1])
    noisy = image + deviation * _normal(image.shape, rng)
    height, width = image.shape[:2]
    total = np.zeros_like(image)
    for top, left in _GRIDS:
        margins = ((top, -(height + top) % 8), (left, -(width + left) % 8), (0, 0))
        padded = np.pad(noisy, margins, mode="symmetric")
        blocks = padded.reshape(padded.shape[0] // 8, 8, padded.shape[1] // 8, 8, 3)
        spectrum = scipy.fft.dctn(blocks, axes=(1, 3), norm="ortho")
        kept = np.abs(spectrum) > np.float32(2.7) * deviation
        kept[:, 0, :, 0] = True  # the mean of a block
        filtered = scipy.fft.idctn(spectrum * kept, axes=(1, 3), norm="ortho").reshape(padded.shape)
        total += filtered[top : top + height, left : left + width]
    return _pixels(total / len(_GRIDS))


def _jpeg(image: Planes, level: int, rng: np.random.Generator) -> Pixels:
    """Compress with baseline JPEG, 4:2:0. The JPEG quality depends only on the level, not on the photograph."""
    return _decode(_jpeg_bytes(_pixels(image), JPEG_QUALITY[level - 1]))


@_family
def _jpeg2000(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Compress with JPEG2000 and the irreversible wavelet."""
    pixels = _pixels(image)
    return lambda strength: _decode(_jpeg2000_bytes(pixels, 48 - 36 * strength))


def _jpeg_transmission(image: Planes, level: int, rng: np.random.Generator) -> Pixels:
    """Write a JPEG file of high quality, change random bytes of its entropy-coded data, and decode the file.

    Restart markers after every four blocks keep each error local.
    """
    data = _jpeg_bytes(_pixels(image), 92, subsampling=0, restart_marker_blocks=4)
    start = data.rfind(b"\xff\xda") + 14  # after the header of the only scan
    stream = np.frombuffer(data, np.uint8)
    marker = (stream == 0xFF) | (np.roll(stream, 1) == 0xFF)  # markers and stuffing stay intact
    return _damaged(image, data, start + np.flatnonzero(~marker[start:-2]), level, rng)


def _jpeg2000_transmission(image: Planes, level: int, rng: np.random.Generator) -> Pixels:
    """Write JPEG2000 of high quality, change random bytes in the packets of the middle scales, and decode.

    The first packets have the coarsest scales. They stay intact, because one changed byte there distorts the image more
    than level 5 allows. The last packets have the finest scales. They stay intact, because changes there are hardly
    visible.
    """
    data = _jpeg2000_bytes(_pixels(image), 40, codeblock_size=(16, 16))
    start = data.find(b"\xff\x93") + 2  # start of data
    length = len(data) - start
    return _damaged(image, data, np.arange(start + length // 16, start + length // 4), level, rng)


@_family
def _pattern_noise(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Replace small patches by patches a few pixels away. The change is hard to see, because the texture is similar."""
    height, width = image.shape[:2]
    side = max(5, round(min(height, width) / 25))
    reach = max(2, side // 3)
    count = 3 * height * width // side**2
    tops = rng.integers(reach, height - side - reach, count)
    lefts = rng.integers(reach, width - side - reach, count)
    moves = rng.integers(-reach, reach + 1, (count, 2))

    def render(strength: float) -> npt.NDArray:
        result = image.copy()
        for top, left, (down, right) in zip(
            tops, lefts, moves[: round(_between(1, count, strength))], strict=False
        ):
            source = image[top + down : top + down + side, left + right : left + right + side]
            result[top : top + side, left : left + side] = source
        return result

    return render


def _block_distortions(image: Planes, level: int, rng: np.random.Generator) -> Pixels:
    """Replace square blocks by one colour each. Higher levels have fewer and stronger blocks, at the same PSNR.

    In TID2013, the opinion scores of this type rise with the level, because few strong blocks disturb people less than
    many weak blocks at the same PSNR. The colour of a block is the mean colour of the photograph in the block plus an
    offset. If the mean colours alone already give a PSNR below `BLOCK_PSNR`, the blocks keep some of the photograph's
    texture, so that the PSNR rises to `BLOCK_PSNR`.
    """
    height, width = image.shape[:2]
    side = round(min(height, width) / 12)
    plain, offsets = image.copy(), np.zeros_like(image)
    for place in rng.permutation((height // side) * (width // side))[: BLOCKS[level - 1]]:
        top, left = (side * int(index) for index in divmod(place, width // side))
        block = np.s_[top : top + side, left : left + side]
        plain[block] = image[block].mean((0, 1))
        offsets[block] = rng.uniform(0.5, 1, 3) * rng.choice([-1, 1], 3)
    return _at_psnr(
        image,
        lambda strength: (
            image + min(2 * strength, 1) * (plain - image) + np.float32(_between(1, 600, strength)) * offsets
        ),
        lambda *_: BLOCK_PSNR,
    )


@_family
def _mean_shift(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Make all samples brighter, or all samples darker, by the same amount."""
    sign = rng.choice([-1, 1])
    return lambda strength: image + np.float32(sign * _between(0.5, 128, strength))


@_family
def _contrast(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Change the contrast about the mean luminance: lower at levels 1, 3 and 5, higher at 2 and 4, as in TID2013."""
    mean = np.float32((image @ _LUMA).mean())

    def render(strength: float) -> npt.NDArray:
        change = -_between(0.01, 1, strength) if level % 2 else _between(0.01, 8, strength)
        return mean + np.float32(1 + change) * (image - mean)

    return render


@_family
def _saturation(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Move colours towards the grey of the same luminance. High strengths go past grey, to complementary colours."""
    grey = (image @ _LUMA)[..., None]
    return lambda strength: grey + np.float32(1 - _between(0.01, 3, strength)) * (image - grey)


@_family
def _multiplicative_noise(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Add white Gaussian noise in proportion to each sample."""
    return _additive(image, _normal(image.shape, rng) * image / 128)


@_family
def _comfort_noise(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Compress with JPEG2000, then add noise in proportion to the local error of the compression."""
    pixels = _pixels(image)
    noise = _normal((*image.shape[:2], 1), rng)

    def render(strength: float) -> npt.NDArray:
        coded = _decode(_jpeg2000_bytes(pixels, 48 - 36 * strength)).astype(np.float32)
        lost = np.sqrt(_smooth(np.square(image - coded).mean(-1, keepdims=True), 2.0))
        return coded + 0.7 * lost * noise

    return render


@_family
def _compressed_noise(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Add white Gaussian noise, then compress with JPEG. Both become stronger with the level."""
    noise = _normal(image.shape, rng)

    def render(strength: float) -> npt.NDArray:
        noisy = _pixels(image + np.float32(_between(0.5, 100, strength)) * noise)
        return _decode(_jpeg_bytes(noisy, round(_between(95, 3, strength))))

    return render


@_family
def _colour_quantisation(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Reduce the photograph to a palette, chosen by median cut, with Floyd-Steinberg dither."""
    picture = Image.fromarray(_pixels(image))

    @functools.cache
    def quantised(colours: int) -> Pixels:
        palette = picture.quantize(colours, method=Image.Quantize.MEDIANCUT)
        dithered = picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        return np.asarray(dithered.convert("RGB"))

    return lambda strength: quantised(round(_between(256, 2, strength)))


@_family
def _chromatic_aberration(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Shift red and blue in opposite directions, and blur both."""
    angle = rng.uniform(0, 2 * math.pi)
    direction = np.array([math.sin(angle), math.cos(angle)])
    side = min(image.shape[:2])

    def render(strength: float) -> npt.NDArray:
        distance = _between(0.05, side / 12, strength)
        result = image.copy()
        for channel, sign in ((0, 1), (2, -1)):
            moved = ndimage.shift(image[..., channel], sign * distance * direction, order=1, mode="nearest")
            result[..., channel] = _smooth(moved, 0.3 * distance)
        return result

    return render


@_family
def _sparse_sampling(image: Planes, level: int, rng: np.random.Generator) -> Render:
    """Drop random pixels and recover them by iterative soft thresholding of the cosine transform."""
    order = rng.random((*image.shape[:2], 1), dtype=np.float32)
    thresholds = np.geomspace(300, 3, 10, dtype=np.float32)

    def render(strength: float) -> npt.NDArray:
        lost = order < _between(0.01, 0.99, strength)
        estimate = np.where(lost, image.mean((0, 1)), image)
        for threshold in thresholds:
            spectrum = scipy.fft.dctn(estimate, axes=(0, 1), norm="ortho")
            spectrum = np.sign(spectrum) * np.maximum(np.abs(spectrum) - threshold, 0)
            recovered = scipy.fft.idctn(spectrum, axes=(0, 1), norm="ortho")
            estimate = np.where(lost, recovered, image)
        return recovered

    return render


def _jpeg_bytes(pixels: Pixels, quality: int, **options: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality, **options)
    return stream.getvalue()


def _jpeg2000_bytes(pixels: Pixels, decibels: float, **options: tuple[int, int]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(
        stream,
        "JPEG2000",
        quality_mode="dB",
        quality_layers=[decibels],
        irreversible=True,
        no_jp2=True,
        **options,
    )
    return stream.getvalue()


def _decode(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _damaged(image: Planes, data: bytes, places: npt.NDArray, level: int, rng: np.random.Generator) -> Pixels:
    """Change random bytes of `data` until the decoded image has the PSNR of the level, in at most 60 steps.

    A step changes bytes at some of the indices `places` and decodes the data. A step is undone if the data cannot be
    decoded, or if the PSNR is more than 1.5 dB below the PSNR of the level. The next step then changes fewer bytes.
    """
    target = LEVEL_PSNR[level - 1]
    stream = np.frombuffer(data, np.uint8).copy()
    best, pixels = math.inf, _decode(data)
    step = 4
    for _ in range(60):
        if best <= target + 0.5:
            break
        chosen = rng.choice(places, step)
        before = stream[chosen]
        stream[chosen] = rng.integers(0, 0xFF, step)
        try:
            now = _decode(stream.tobytes())
            quality = psnr(image, now)
        except OSError:
            quality = -math.inf
        if quality >= target - 1.5:
            best, pixels = quality, now
            step *= 2
        else:
            stream[chosen] = before
            step = max(1, step // 4)
    return pixels


DISTORTIONS: dict[int, Distortion] = {
    1: Distortion("additive Gaussian noise", _gaussian_noise),
    2: Distortion("additive noise, stronger in colour than in luminance", _colour_noise),
    3: Distortion("spatially correlated noise", _correlated_noise),
    4: Distortion("masked noise", _masked_noise),
    5: Distortion("high-frequency noise", _high_frequency_noise),
    6: Distortion("impulse noise", _impulse_noise),
    7: Distortion("quantisation noise", _quantisation_noise),
    8: Distortion("Gaussian blur", _gaussian_blur),
    9: Distortion("image denoising", _denoising),
    10: Distortion("JPEG compression", _jpeg),
    11: Distortion("JPEG2000 compression", _jpeg2000),
    12: Distortion("JPEG transmission errors", _jpeg_transmission),
    13: Distortion("JPEG2000 transmission errors", _jpeg2000_transmission),
    14: Distortion("non-eccentricity pattern noise", _pattern_noise),
    15: Distortion("local block-wise distortions of different intensity", _block_distortions),
    16: Distortion("mean shift", _mean_shift),
    17: Distortion("contrast change", _contrast),
    18: Distortion("change of colour saturation", _saturation),
    19: Distortion("multiplicative Gaussian noise", _multiplicative_noise),
    20: Distortion("comfort noise", _comfort_noise),
    21: Distortion("lossy compression of noisy images", _compressed_noise),
    22: Distortion("image colour quantisation with dither", _colour_quantisation),
    23: Distortion("chromatic aberrations", _chromatic_aberration),
    24: Distortion("sparse sampling and reconstruction", _sparse_sampling),
}
"""The types of TID2013 by number."""
