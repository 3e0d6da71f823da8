"""Letters of the fonts that matplotlib ships: few-shot learning without a download.

A class is a Unicode letter; its examples are that letter in different faces, with
affine jitter and noise on the strokes. Letters of one shape (A, Alpha and Cyrillic A; o
and O; e and its accented forms) are one class, across the splits too, and the splits
have no script in common. Rendered once and cached.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metalstm.data.cache import Split, cache_folder, cached_dataset, fingerprint
from metalstm.data.pools import SPLITS, Dataset

__all__ = ["FACES", "IMAGES_PER_CLASS", "SCRIPTS", "load_glyphs"]

# Named, not globbed: matplotlib also ships a face that draws a box for every code point
# (LastResortHE) and faces with private encodings (cm*, STIXNonUni*, STIXSiz*), where
# the code point of a letter holds something else.
FACES = (
    "DejaVuSans",
    "DejaVuSerif",
    "DejaVuSansMono",
    "STIXGeneral",
    "DejaVuSans-Bold",
    "DejaVuSerif-Bold",
    "DejaVuSansMono-Bold",
    "STIXGeneralBol",
    "DejaVuSans-Oblique",
    "DejaVuSerif-Italic",
    "DejaVuSansMono-Oblique",
    "STIXGeneralItalic",
    "DejaVuSans-BoldOblique",
    "DejaVuSerif-BoldItalic",
    "DejaVuSansMono-BoldOblique",
    "STIXGeneralBolIta",
)

SCRIPTS = {
    "validation": ("ARMENIAN", "HEBREW", "LAO"),
    "test": ("ARABIC", "GEORGIAN", "OLD ITALIC"),
}
"""How the Unicode names of a split's letters begin; every other script trains."""

IMAGES_PER_CLASS = 40  # enough for 15 queries when a class has only four faces
_MIN_FACES = 4
_SIZE = 28
_CANVAS = 2 * _SIZE  # drawn at twice the size, then averaged 2 x 2
_EM = 64  # pixels to the em of the bitmaps that are warped
_VERSION = 1  # of everything below that changes a pixel

# Look-alikes: the cosine distance of two letters' blurred 24 x 24 pictures, each scaled
# to its box. Chosen by eye: at NEAREST (in the face where they are closest) and at MEAN
# (over the faces they share) most pairs are one shape; at twice that, few are.
_NEAREST, _MEAN = 0.015, 0.06


class _Letter(NamedTuple):
    code: int
    faces: tuple[int, ...]  # indices into FACES
    bitmaps: tuple[np.ndarray, ...]  # uint8 [h, w], one a face, cropped to the ink


def load_glyphs(
    cache_dir: str | os.PathLike[str] | None = None, *, seed: int = 0
) -> Dataset:
    """Load the letters: uint8 28 x 28 x 1, ink 255 on 0, 40 images a class.

    Support and query of an episode come from different faces. Rotations as classes are
    refused: b turned is q, and the Canadian syllabics are rotations of one another.

    Args:
      cache_dir: where the rendered letters are kept; see `metalstm.data.cache`.
      seed: of the jitter; another seed draws the same letters with other jitter.

    Raises:
      ImportError: without matplotlib (whose fonts these are), naming the extra.
    """
    folder = _font_folder()
    fonts = [folder / f"{face}.ttf" for face in FACES]
    key = fingerprint(
        [_VERSION, seed, _freetype(), *(path.stat().st_size for path in fonts)]
    )
    path = cache_folder(cache_dir) / f"glyphs-{key}.npz"
    return cached_dataset("glyphs", path, lambda: _render(fonts, seed))


def _font_folder() -> Path:
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "the glyphs data set is made of matplotlib's fonts: "
            "pip install 'metalstm[experiments]'"
        ) from None
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _freetype() -> str:
    import matplotlib
    from PIL import features

    return f"{matplotlib.__version__} {features.version('freetype2')}"


def _render(fonts: list[Path], seed: int) -> tuple[dict[str, Split], dict[str, Any]]:
    letters = _bitmaps(fonts)
    kept = _drop_look_alikes(letters)
    noise = _noise_fields(np.random.RandomState(seed))
    parts: dict[str, list[_Letter]] = {split: [] for split in SPLITS}
    for letter in kept:
        parts[_split_of(letter.code)].append(letter)
    splits = {}
    for split, members in parts.items():
        images = np.concatenate([_draw(letter, seed, noise) for letter in members])
        # Image m is in face m % F: the faces share a class's images evenly.
        groups = [np.arange(IMAGES_PER_CLASS) % len(m.faces) for m in members]
        names = tuple(f"{chr(m.code)} {_name(m.code)}" for m in members)
        counts = np.full(len(members), IMAGES_PER_CLASS, np.int32)
        splits[split] = Split(images, counts, names, np.stack(groups).astype(np.int32))
    info = {
        "rotations": False,
        "fonts": _freetype(),
        "scripts": {name: list(scripts) for name, scripts in SCRIPTS.items()},
        "letters": len(letters),
        "merged": len(letters) - len(kept),
        "seed": seed,
    }
    return splits, info


def _name(code: int) -> str:
    return unicodedata.name(chr(code), f"U+{code:04X}")


def _split_of(code: int) -> str:
    for split, scripts in SCRIPTS.items():
        if _name(code).startswith(scripts):
            return split
    return "train"


def _bitmaps(fonts: list[Path]) -> list[_Letter]:
    """Draw every letter that at least four faces have, in each of them."""
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    faces_of: dict[int, list[int]] = {}
    for face, path in enumerate(fonts):
        for code in FT2Font(os.fspath(path)).get_charmap():
            # Modifier letters (Lm) are dashes, dots and raised copies of others.
            if unicodedata.category(chr(code)) in ("Lu", "Ll", "Lt", "Lo"):
                faces_of.setdefault(code, []).append(face)
    basic = ImageFont.Layout.BASIC  # no shaping: the letter alone, as its outline is
    drawers = [
        ImageFont.truetype(os.fspath(p), _EM, layout_engine=basic) for p in fonts
    ]
    page = Image.new("L", (5 * _EM, 4 * _EM))
    letters = []
    for code, faces in sorted(faces_of.items()):
        drawn: dict[int, np.ndarray] = {}
        for face in faces:
            page.paste(0, (0, 0, *page.size))
            ImageDraw.Draw(page).text(
                (2 * _EM, _EM), chr(code), fill=255, font=drawers[face]
            )
            if box := page.getbbox():
                bitmap = np.asarray(page.crop(box))
                # A quarter of an em in both directions is a dot, not a letter.
                if max(bitmap.shape) > _EM // 4:
                    drawn[face] = bitmap
        if len(drawn) >= _MIN_FACES:
            letters.append(_Letter(code, tuple(drawn), tuple(drawn.values())))
    return letters


def _drop_look_alikes(letters: list[_Letter]) -> list[_Letter]:
    """Keep one letter of each shape: the one in most faces, then of lowest code point.

    No two of those kept look alike, whatever their split.
    """
    codes = {letter.code for letter in letters}
    bases = {
        letter.code: ord(unicodedata.normalize("NFKD", chr(letter.code))[0])
        for letter in letters
    }
    # Accents, presentation forms, mathematical alphabets: their base letter is kept.
    candidates = [
        letter
        for letter in letters
        if bases[letter.code] == letter.code or bases[letter.code] not in codes
    ]
    candidates.sort(key=lambda letter: (-len(letter.faces), letter.code))
    is_same_shape = _same_shape(candidates)
    kept: list[int] = []
    for index in range(len(candidates)):
        if not is_same_shape[index, kept].any():
            kept.append(index)
    return sorted((candidates[i] for i in kept), key=lambda letter: letter.code)


def _same_shape(letters: list[_Letter]) -> np.ndarray:
    """Say of each pair [n, n] whether the two letters are one shape."""
    num = len(letters)
    nearest = np.full((num, num), np.inf, np.float32)
    total, shared = np.zeros((2, num, num), np.float32)
    for face in range(len(FACES)):
        rows, pictures = [], []
        for row, letter in enumerate(letters):
            if face in letter.faces:
                rows.append(row)
                pictures.append(_thumbnail(letter.bitmaps[letter.faces.index(face)]))
        if not rows:
            continue
        x = _blur(np.stack(pictures).astype(np.float32), 2).reshape(len(rows), -1)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        distance = 1 - x @ x.T
        block = np.ix_(rows, rows)
        nearest[block] = np.minimum(nearest[block], distance)
        total[block] += distance
        shared[block] += 1
    mean = np.divide(total, shared, out=np.full_like(total, np.inf), where=shared > 0)
    return (nearest < _NEAREST) | (mean < _MEAN)


def _thumbnail(bitmap: np.ndarray, size: int = 24, margin: int = 2) -> np.ndarray:
    """Scale a bitmap to fit the middle of a square, keeping its proportions."""
    from PIL import Image

    scale = (size - 2 * margin) / max(bitmap.shape)
    height, width = (max(1, round(side * scale)) for side in bitmap.shape)
    image = Image.fromarray(bitmap).resize((width, height), Image.Resampling.BOX)
    out = np.zeros((size, size), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    out[top : top + height, left : left + width] = np.asarray(image)
    return out


def _blur(x: np.ndarray, times: int) -> np.ndarray:
    """Blur [..., H, W] by (1, 2, 1) / 4 in both directions, ``times`` times."""
    for _ in range(times):
        for axis in (-1, -2):
            edge = [(0, 0)] * x.ndim
            edge[axis] = (1, 1)
            padded = np.moveaxis(np.pad(x, edge), axis, -1)
            x = 0.25 * (padded[..., :-2] + padded[..., 2:]) + 0.5 * padded[..., 1:-1]
            x = np.moveaxis(x, -1, axis)
    return x


def _draw(letter: _Letter, seed: int, noise: np.ndarray) -> np.ndarray:
    """Draw one class [M, 28, 28, 1] with affine jitter and stroke noise."""
    from PIL import Image

    # The legacy generator: its streams are frozen, so the checksum is too.
    random = np.random.RandomState([seed, letter.code])
    num, num_faces = IMAGES_PER_CLASS, len(letter.faces)
    sources = [Image.fromarray(np.pad(bitmap, 2)) for bitmap in letter.bitmaps]
    canvas = np.empty((num, _CANVAS, _CANVAS), np.float32)
    sizes = np.array([sources[m % num_faces].size for m in range(num)])
    maps = _jitter(random, sizes)
    for m in range(num):
        drawn = sources[m % num_faces].transform(
            (_CANVAS, _CANVAS),
            Image.Transform.AFFINE,
            maps[m],
            resample=Image.Resampling.BILINEAR,
        )
        canvas[m] = np.asarray(drawn)
    field = random.randint(len(noise), size=num)
    strength = random.uniform(0.0, 0.12, (num, 1, 1))
    threshold = random.uniform(0.28, 0.48, (num, 1, 1))
    ink = _blur(canvas / 255, 1)
    # The noise frays the strokes and leaves the paper clean.
    ink += strength * noise[field] * np.minimum(1, 4 * ink)
    ink = np.clip(3 * (ink - threshold) + 0.5, 0, 1)  # an edge three grey levels wide
    ink = ink.reshape(num, _SIZE, 2, _SIZE, 2).mean((2, 4))
    return np.rint(255 * ink).astype(np.uint8)[..., None]


def _jitter(random: np.random.RandomState, sizes: np.ndarray) -> np.ndarray:
    """Draw affine maps [M, 6], as PIL wants them: canvas to bitmap of ``sizes``."""
    num = len(sizes)
    angle = np.deg2rad(random.uniform(-15, 15, num))
    shear = random.uniform(-0.2, 0.2, num)
    scale = random.uniform(34, 44, num) / sizes.max(1)  # canvas pixels a bitmap pixel
    stretch = np.exp(random.uniform(-0.15, 0.15, num))
    shift = random.uniform(-3, 3, (num, 2))  # canvas pixels, 1.5 of the picture's
    # The inverse of scale * rotation * shear * stretch, factor by factor.
    cos, sin, one, zero = np.cos(angle), np.sin(angle), np.ones(num), np.zeros(num)
    inverse_turn = _matrices(cos, sin, -sin, cos)
    inverse_shear = _matrices(one, -shear, zero, one)
    inverse_stretch = _matrices(1 / stretch, zero, zero, stretch)
    inverse = inverse_stretch @ inverse_shear @ inverse_turn / scale[:, None, None]
    middle = (_CANVAS / 2 + shift)[..., None]
    offset = sizes[..., None] / 2 - inverse @ middle
    return np.concatenate([inverse, offset], 2).reshape(num, 6)


def _matrices(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.stack([a, b, c, d], 1).reshape(-1, 2, 2)


def _noise_fields(random: np.random.RandomState, num: int = 128) -> np.ndarray:
    """Draw smooth fields [num, H, W] of variance 1, some four pixels to a wave."""
    fields = _blur(random.standard_normal((num, _CANVAS, _CANVAS)), 6)
    return (fields / fields.std()).astype(np.float32)
