"""Image files and arrays to uint8 squares.

Pillow only, though other decoders are faster: each decodes JPEG a little differently,
and the checksum of a data set should not depend on what else is installed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["as_bytes", "decode_files", "fit", "fit_to_set", "read_images"]


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """Cut the middle square out of uint8 [H, W, ch] and resize it to ``size``."""
    if image.shape[:2] == (size, size):
        return image
    squeezed = image[..., 0] if image.shape[-1] == 1 else image
    out = np.asarray(_fit(_pillow().fromarray(squeezed), size))
    return out.reshape(size, size, image.shape[-1])


def as_bytes(image: Any, where: str) -> np.ndarray:
    """Return an image [H, W, ch] as uint8, or a set of them, unless that alters it.

    Raises:
      ValueError: a value is not a whole number in [0, 255]; names ``where``.
    """
    image = np.asarray(image)
    if image.dtype == np.uint8:
        return image
    converted = None
    if image.dtype.kind in "buif":
        with np.errstate(invalid="ignore"):  # NaN: refused below
            converted = image.astype(np.uint8)
    if converted is None or not np.array_equal(converted, image):
        raise ValueError(
            f"{where} has an image of {image.dtype} with values that are not whole "
            f"numbers in [0, 255] ({_extremes(image)}): prepare it as uint8"
        )
    return converted


def fit_to_set(
    image: Any, name: str, *, size: int | None, shape: tuple[int, ...] | None
) -> np.ndarray:
    """Return an image of the data set ``name`` as uint8, resized unless size is None.

    Raises:
      ValueError: its shape is not ``shape``, that of the set's images before it (None:
        there is none), or a value is outside a byte.
    """
    image = as_bytes(image, name)
    image = image if size is None else fit(image, size)
    if shape is not None and image.shape != shape:
        raise ValueError(
            f"the images of {name} have several sizes, such as {shape} and "
            f"{image.shape}; choose an image_size"
        )
    return image


def _extremes(image: np.ndarray) -> str:
    if image.dtype.kind not in "buif":
        return "not numbers"
    if not np.isfinite(image).all():
        return f"{(~np.isfinite(image)).sum()} of them NaN or infinite"
    return f"{image.min():g} to {image.max():g}"


def decode_files(
    paths: Sequence[Path], *, size: int, channels: int, background: str = "white"
) -> list[np.ndarray | Exception]:
    """Decode image files to uint8 [size, size, channels], in threads.

    A file that cannot be decoded gives its exception in place of an image.

    Args:
      background: the colour behind what is transparent, as Pillow names it.

    Raises:
      ValueError: a background that is no colour.
    """
    pillow = _pillow()
    try:
        pillow.new("RGBA", (1, 1), background)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"background={background!r}: give a colour, such as 'white' or '#ff8800'"
        ) from error

    def decode(path: Path) -> np.ndarray | Exception:
        try:
            with pillow.open(path) as image:
                plain = _eight_bits(image, background)
                image = plain.convert("RGB" if channels == 3 else "L")
                return np.asarray(_fit(image, size)).reshape(size, size, channels)
        except Exception as error:  # a dozen kinds, by format and by damage
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(decode, paths, chunksize=64))


def read_images(
    paths: Sequence[Any],
    *,
    image_size: int,
    channels: int = 3,
    background: str = "white",
) -> np.ndarray:
    """Read images to predict, as `load_image_folders` reads those to train on.

    The middle square of each is resized, upright and opaque; uint8 [N, H, W, ch] is
    what a `metalstm.Predictor` takes. Arguments are those of `load_image_folders`;
    ``predictor.image_shape`` has the first two.

    Raises:
      ValueError: files that cannot be decoded, the first of which are named; no colour.
    """
    files = [Path(path).expanduser() for path in paths]
    decoded = decode_files(
        files, size=image_size, channels=channels, background=background
    )
    bad = [
        f"{path} ({image})"
        for path, image in zip(files, decoded, strict=True)
        if isinstance(image, Exception)
    ]
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(files)} images cannot be decoded: {', '.join(bad[:5])}"
        )
    return np.stack([np.asarray(image) for image in decoded])


def _eight_bits(image: Any, background: str) -> Any:
    """Return a Pillow image upright and opaque, or raise ValueError.

    Refused is what Pillow would turn into another image without a word: more than 8
    bits a channel, several frames or pages, and a drawing in the background's colour.
    """
    from PIL import ImageOps

    if image.mode[0] in "IF":  # Pillow would cut off what is above 255
        raise ValueError(f"{image.mode} pixels: save it with 8 bits a channel")
    # a camera's MPO holds one photograph, and previews of it
    if image.format != "MPO" and (num := getattr(image, "n_frames", 1)) > 1:
        raise ValueError(f"{num} frames or pages: save the one that is meant")
    image = ImageOps.exif_transpose(image)
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La")
    if not has_alpha and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    paper = _pillow().new("RGBA", image.size, background)
    flat = _pillow().alpha_composite(paper, image).convert("RGB")
    lowest, highest = image.getchannel("A").getextrema()
    if lowest < highest and all(low == high for low, high in flat.getextrema()):
        raise ValueError(
            f"a drawing in {background} on transparency, which shows nothing on "
            f"background={background!r}: choose another background"
        )
    return flat


def _fit(image: Any, size: int) -> Any:
    """Resize the middle square of a Pillow image, anti-aliased."""
    if image.size == (size, size):
        return image
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    # Cut first: the filter would reach beyond the square.
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), _pillow().Resampling.BILINEAR)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(
            "decoding and resizing images needs Pillow: pip install 'metalstm[images]'"
        ) from None
    return Image
