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

__all__ = ["decode_files", "fit"]


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """Cut the middle square out of uint8 [H, W, ch] and resize it to ``size``."""
    if image.shape[:2] == (size, size):
        return image
    squeezed = image[..., 0] if image.shape[-1] == 1 else image
    out = np.asarray(_fit(_pillow().fromarray(squeezed), size))
    return out.reshape(size, size, image.shape[-1])


def decode_files(
    paths: Sequence[Path], *, size: int, channels: int
) -> list[np.ndarray | Exception]:
    """Decode image files to uint8 [size, size, channels], in threads.

    A file that cannot be decoded gives its exception in place of an image.
    """
    pillow = _pillow()

    def decode(path: Path) -> np.ndarray | Exception:
        from PIL import ImageOps

        try:
            with pillow.open(path) as image:
                upright = ImageOps.exif_transpose(image)
                image = upright.convert("RGB" if channels == 3 else "L")
                return np.asarray(_fit(image, size)).reshape(size, size, channels)
        except (OSError, SyntaxError, ValueError) as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(decode, paths, chunksize=64))


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
