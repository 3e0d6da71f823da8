"""What an image file and a folder can hold: read as it looks, refused, or counted."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metalstm import data
from metalstm.data.images import decode_files

INK, PAPER = 0, 255
SQUARE = (slice(2, 6), slice(1, 4))  # not symmetric, so that a turn shows
DRAWING = np.full((8, 8), PAPER, np.uint8)
DRAWING[SQUARE] = INK
CLEAR = np.where(DRAWING == INK, 255, 0).astype(np.uint8)  # alpha: ink alone is opaque
BLACK = np.zeros((8, 8), np.uint8)


def stack(*channels) -> Image.Image:
    mode = {2: "LA", 3: "RGB", 4: "RGBA"}[len(channels)]
    return Image.merge(mode, [Image.fromarray(channel) for channel in channels])


def palette(transparency) -> tuple[Image.Image, dict]:
    image = Image.fromarray((DRAWING == INK).astype(np.uint8)).convert("P")
    image.putpalette([0] * 768)
    return image, {"transparency": transparency}


def cmyk() -> Image.Image:
    return Image.merge("CMYK", [Image.fromarray(b) for b in (BLACK,) * 3 + (CLEAR,)])


def turned(orientation: int, back) -> tuple[Image.Image, dict]:
    image = Image.fromarray(back(DRAWING))
    exif = image.getexif()
    exif[0x0112] = orientation
    return image, {"exif": exif}


grey = Image.fromarray(DRAWING)
SAME = {  # what all decode to DRAWING: suffix, image, options of save
    "1 png": ("png", grey.convert("1"), {}),
    "1 tiff": ("tif", grey.convert("1"), {}),
    "CMYK tiff": ("tif", cmyk(), {}),
    "EXIF 3 png": ("png", *turned(3, lambda a: a[::-1, ::-1])),
    "EXIF 6 webp": ("webp", *turned(6, lambda a: np.rot90(a))),
    "EXIF 8 png": ("png", *turned(8, lambda a: np.rot90(a, -1))),
    "EXIF mirrored png": ("png", *turned(2, lambda a: a[:, ::-1])),
    "L bmp": ("bmp", grey, {}),
    "L png": ("png", grey, {}),
    "L with transparency": ("png", Image.fromarray(255 - DRAWING), {"transparency": 0}),
    "LA png": ("png", stack(BLACK, CLEAR), {}),
    "P gif": ("gif", *palette(0)),
    "P png, alpha of each colour": ("png", *palette(b"\x00\xff")),
    "P png, one colour": ("png", *palette(0)),
    "RGB png": ("png", grey.convert("RGB"), {}),
    "RGB with transparency": (
        "png",
        stack(CLEAR, BLACK, BLACK),
        {"transparency": (0, 0, 0)},
    ),
    "RGBA opaque": ("png", grey.convert("RGBA"), {}),
    "RGBA png": ("png", stack(BLACK, BLACK, BLACK, CLEAR), {}),
    "RGBA tiff": ("tif", stack(BLACK, BLACK, BLACK, CLEAR), {}),
    "RGBA webp": ("webp", stack(BLACK, BLACK, BLACK, CLEAR), {"lossless": True}),
    "YCbCr tiff": ("tif", grey.convert("YCbCr"), {}),
}
IN_RED = ("L with transparency", "RGB with transparency")  # ink is white, or red
IN_RED_EXPECTED = {"RGB with transparency": (255, 0, 0)}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [name for name in SAME if name not in IN_RED])
def test_every_mode_shows_the_same_drawing(tmp_path, name, channels):
    suffix, image, options = SAME[name]
    path = tmp_path / f"x.{suffix}"
    if suffix == "webp":
        options = options | {"lossless": True}
    image.save(path, **options)
    (found,) = decode_files([path], size=8, channels=channels)
    if isinstance(found, Exception):
        raise found
    expected = np.repeat(DRAWING[..., None], channels, -1)
    np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=2)


def test_colour_under_transparency_is_kept_and_a_white_drawing_is_refused(tmp_path):
    for name in IN_RED:
        suffix, image, options = SAME[name]
        image.save(tmp_path / f"{name}.{suffix}", **options)
    paths = [tmp_path / f"{name}.png" for name in IN_RED]
    white, red = decode_files(paths, size=8, channels=3)
    assert red[SQUARE].reshape(-1, 3).tolist() == [[255, 0, 0]] * 12
    assert red[0, 0].tolist() == [255, 255, 255]
    with pytest.raises(ValueError, match="a drawing in white on transparency, which"):
        raise white
    (on_black,) = decode_files(paths[:1], size=8, channels=1, background="black")
    np.testing.assert_array_equal(on_black[..., 0], 255 - DRAWING)
    with pytest.raises(ValueError, match="background='wihte': give a colour, such as"):
        decode_files(paths, size=8, channels=1, background="wihte")


def half_transparent():
    return stack(BLACK, BLACK, BLACK, np.full((8, 8), 51, np.uint8))


def test_half_transparent_ink_is_mixed_with_the_background(tmp_path):
    half_transparent().save(tmp_path / "x.png")
    (found,) = decode_files([tmp_path / "x.png"], size=8, channels=1)
    assert set(found.ravel().tolist()) == {204}


@pytest.mark.parametrize(
    ("suffix", "image", "options", "message"),
    [
        ("png", Image.fromarray(DRAWING.astype(np.uint16)), {}, "I;16 pixels: save it"),
        (
            "tif",
            Image.fromarray(DRAWING.astype(np.int32)),
            {},
            "I pixels: save it with",
        ),
        ("tif", Image.fromarray(DRAWING.astype(np.float32)), {}, "F pixels: save it"),
        ("gif", grey, "frames", "2 frames or pages: save the one"),
        ("png", grey, "frames", "2 frames or pages: save the one"),
        ("tif", grey, "frames", "2 frames or pages: save the one"),
        ("webp", grey, "frames", "2 frames or pages: save the one"),
    ],
)
def test_what_would_become_another_image_is_refused(
    tmp_path, suffix, image, options, message
):
    if options == "frames":
        options = {"save_all": True, "append_images": [Image.fromarray(255 - DRAWING)]}
    image.save(tmp_path / f"x.{suffix}", **options)
    (found,) = decode_files([tmp_path / f"x.{suffix}"], size=8, channels=1)
    with pytest.raises(ValueError, match=message):
        raise found


def folders(root: Path, classes=("a", "b", "c"), num: int = 2) -> Path:
    rng = np.random.default_rng(0)
    for name in map(os.fsencode, classes):
        os.makedirs(os.path.join(os.fsencode(root), name))
        for k in range(num):
            pixels = Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8))
            with open(os.path.join(os.fsencode(root), name, b"%d.png" % k), "wb") as f:
                pixels.save(f, "PNG")
    return root


@pytest.fixture
def load(tmp_path):
    options = {"image_size": 4, "channels": 1, "cache_dir": tmp_path / "cache"}
    return lambda root, **more: data.load_image_folders(root, **(options | more))


@pytest.mark.filterwarnings("ignore:all images of:RuntimeWarning")
def test_images_that_are_all_alike_are_said(tmp_path, load):
    root = folders(tmp_path / "x")
    for path in root.glob("*/*.png"):
        Image.new("L", (4, 4), 9).save(path)
    with pytest.warns(RuntimeWarning, match="all images of x's train split are the sa"):
        load(root)


def test_what_is_not_read_is_counted_and_named(tmp_path, load):
    root = folders(tmp_path / "x")
    (root / "readme.md").write_text("x")
    (root / "a" / "photo.HEIC").write_text("x")
    (root / "a" / "more").mkdir()
    (root / "a" / "more" / "3.png").write_bytes((root / "a" / "0.png").read_bytes())
    (root / "a" / ".DS_Store").write_text("x")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    names = r"gone, readme\.md, a/photo\.HEIC, a/more/3\.png\. Read are files in a c"
    with pytest.warns(RuntimeWarning, match=rf"4 files in .*x are not read: {names}"):
        found = load(root)
    assert found.info["omitted"] == 5
    assert len(found.info["omitted_files"]) == 5
    assert sum(int(found.pool(split).counts.sum()) for split in data.SPLITS) == 6


@pytest.mark.filterwarnings("error")
def test_upper_case_suffixes_and_linked_folders_are_read(tmp_path, load):
    root = folders(tmp_path / "x", ("a", "b"), num=3)
    (root / "a" / "0.png").rename(root / "a" / "0.PNG")
    (root / "c").symlink_to(folders(tmp_path / "elsewhere", ("c",)) / "c")
    found = load(root)
    assert sum(int(found.pool(split).counts.sum()) for split in data.SPLITS) == 8


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_one_file_under_two_names_is_refused(tmp_path, load, link):
    root = folders(tmp_path / "x")
    link(root / "a" / "0.png", root / "b" / "7.png")
    with pytest.raises(
        ValueError, match=r"(7|0)\.png and .*(0|7)\.png are one file by a l"
    ):
        load(root)


def test_the_folders_of_the_splits_are_known_in_any_case(tmp_path, load):
    for split, name in (("Train", "a"), ("VAL", "b"), ("Test", "c")):
        folders(tmp_path / "x" / split, (name,))
    found = load(tmp_path / "x")
    assert found.class_names == {"train": ("a",), "validation": ("b",), "test": ("c",)}
    folders(tmp_path / "x" / "valid", ("d",))
    with pytest.raises(
        ValueError, match="has VAL/ and valid/ for validation: keep one"
    ):
        load(tmp_path / "x")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_that_are_not_utf8_are_read_and_can_be_printed(tmp_path, load):
    root = folders(tmp_path / "x", (b"\xc4pfel", "Äpfel".encode(), b"c"))
    broken = os.path.join(os.fsencode(root), b"c", b"caf\xe9.png")
    with open(broken, "wb") as file:
        file.write(b"no image")
    found = load(root, skip_corrupt=True)
    names = {name for split in data.SPLITS for name in found.class_names[split]}
    assert names == {r"\xc4pfel", "Äpfel", "c"}
    assert found.info["skipped_files"][0].endswith(r"caf\xe9.png")
    str(found.info).encode()
    os.mkdir(os.path.join(os.fsencode(root), rb"\xc4pfel"))
    with pytest.raises(ValueError, match=r"two classes '\\\\xc4pfel': rename one"):
        load(root)


def test_one_large_class_does_not_multiply_the_memory(tmp_path, load):
    y = np.concatenate([np.repeat(np.arange(60), 2), np.full(1000, 60)])
    x = np.arange(len(y), dtype=np.uint8)[:, None, None]
    np.savez(tmp_path / "x.npz", x=x, y=y)
    found = data.load_arrays(tmp_path / "x.npz")
    assert found.train.images.shape == (38 * 2 + 1000, 1, 1, 1)
    assert int(found.train.counts.max()) == 1000
    assert "over_limit" not in found.info
    few = data.load_arrays(tmp_path / "x.npz", max_per_class=1)
    assert few.info["over_limit"] == 60 + 999
    root = folders(tmp_path / "folders", num=5)
    chosen = load(root, max_per_class=3)
    assert int(chosen.train.counts.max()) == 3
    assert chosen.info["over_limit"] == 6
    with pytest.raises(ValueError, match="max_per_class=0: choose 1 or more or None"):
        load(root, max_per_class=0)
