"""Omniglot: which alphabet goes where, strokes as 255 whatever the decoder gave."""

import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from metalstm.data.episodes import EpisodeSpec, validate
from metalstm.data.pools import SPLITS
from metalstm.data.sources import omniglot

BACKGROUND = [*omniglot.VALIDATION_ALPHABETS, "Greek", "Latin", "Korean"]
EVALUATION = ["Angelic", "Tengwar"]


class FakeBuilder:
    """Three characters an alphabet; the place of a line says which it is."""

    def __init__(self, paper=1, drawings=20):
        names = [*BACKGROUND, *EVALUATION]
        self.paper, self.drawings = paper, drawings
        self.info = SimpleNamespace(
            full_name="omniglot/9.9.9",
            features={"alphabet": SimpleNamespace(names=names)},
        )
        self.reads: list[str] = []

    def as_data_source(self, split):
        self.reads.append(split)
        names = {"train": BACKGROUND, "test": EVALUATION}[split]
        offset = 0 if split == "train" else len(BACKGROUND)
        for drawing in range(self.drawings):  # interleaved, as a shuffled file is
            for a, _ in enumerate(names):
                for character in range(3):
                    image = np.full((105, 105, 3), self.paper, np.uint8)
                    label = 3 * (offset + a) + character
                    image[3 * label : 3 * label + 3, : 60 + drawing] = 0
                    yield {
                        "image": image,
                        "label": label,
                        "alphabet": offset + a,
                        "alphabet_char_id": character,
                    }


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(omniglot, "_BACKGROUND", 3 * len(BACKGROUND))
    monkeypatch.setattr(omniglot, "_EVALUATION", 3 * len(EVALUATION))
    sizes = {"train": 20, "validation": 4, "test": 6}
    monkeypatch.setattr(omniglot, "CHARACTER_SPLIT", sizes)

    def install(**arguments):
        builder = FakeBuilder(**arguments)
        monkeypatch.setattr(omniglot, "open_builder", lambda *_: builder)
        return builder

    return install


@pytest.mark.parametrize("paper", [1, 255])
def test_strokes_are_255_whichever_decoder_read_them(fake, tmp_path, paper):
    builder = fake(paper=paper)
    dataset = omniglot.load_omniglot(image_size=35, cache_dir=tmp_path)
    assert dataset.test.images.shape == (6 * 20, 35, 35, 1)
    images = np.asarray(dataset.test.images).reshape(6, 20, 35, 35, 1)
    # 105 / 35 = 3: a line of three rows is one row, 60 columns are 20.
    for row in range(6):
        label = 24 + row
        assert np.all(images[row, :, label, :20] == 255)
        assert np.all(images[row, :, label + 1 :] == 0)
        assert np.all(images[row, :, :label] == 0)
    widths = images.sum((2, 3, 4)) / 255 * 3
    np.testing.assert_allclose(np.sort(widths[0]), np.arange(60, 80), atol=0.02)
    assert set(builder.reads) == {"train", "test"}  # never small1 or small2


def test_alphabets_are_held_out_and_the_cache_serves_both_splits(fake, tmp_path):
    builder = fake()
    dataset = omniglot.load_omniglot(cache_dir=tmp_path)
    alphabets = {
        split: {name.split("/")[0] for name in dataset.class_names[split]}
        for split in SPLITS
    }
    assert alphabets["train"] == {"Greek", "Latin", "Korean"}
    assert alphabets["validation"] == set(omniglot.VALIDATION_ALPHABETS)
    assert alphabets["test"] == set(EVALUATION)
    assert dataset.image_shape == (28, 28, 1)
    reads = len(builder.reads)
    shuffled, other = (
        omniglot.load_omniglot(split="characters", seed=seed, cache_dir=tmp_path)
        for seed in (0, 1)
    )
    assert len(builder.reads) == reads
    assert [shuffled.pool(s).num_classes for s in SPLITS] == [20, 4, 6]
    every = [name for s in SPLITS for name in shuffled.class_names[s]]
    assert len(set(every)) == 30
    assert shuffled.class_names != other.class_names
    assert shuffled.checksum != dataset.checksum


def test_a_half_written_cache_is_rebuilt(fake, tmp_path):
    fake()
    whole = omniglot.load_omniglot(cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.warns(RuntimeWarning, match="is damaged .*building it again"):
        assert omniglot.load_omniglot(cache_dir=tmp_path).checksum == whole.checksum


def test_what_cannot_be_omniglot_is_refused(fake, tmp_path):
    fake(drawings=19)
    with pytest.raises(
        ValueError, match=r"24 characters of \[19\] drawings, not 24 of 20"
    ):
        omniglot.load_omniglot(cache_dir=tmp_path)
    fake(paper=7)
    with pytest.raises(ValueError, match="values from 0 to 7; strokes of 0 on paper"):
        omniglot.load_omniglot(cache_dir=tmp_path)
    with pytest.raises(ValueError, match="more than half ink"):
        omniglot._shrink(np.eye(105, dtype=np.uint8)[None, None], 28)
    with pytest.raises(ValueError, match="split='alphabet': choose one of alphabets"):
        omniglot.load_omniglot(split="alphabet")
    with pytest.raises(
        ValueError, match="image_size=200: choose a number from 1 to 105"
    ):
        omniglot.load_omniglot(image_size=200)


def test_averaging_keeps_the_ink():
    matrix = omniglot._averaging(105, 28)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(matrix.sum(0), 28 / 105, rtol=1e-5)
    assert np.all((matrix > 0).sum(1) <= 5)


@pytest.fixture(scope="module")
def root(real_data_dir):
    return real_data_dir / "tensorflow_datasets"


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        pytest.param("alphabets", [781, 183, 659], marks=pytest.mark.real_data),
        pytest.param("characters", [1100, 100, 423], marks=pytest.mark.real_data),
    ],
)
def test_real_omniglot(root, split, sizes):
    dataset = omniglot.load_omniglot(root, split=split)  # cached after the first time
    assert [dataset.pool(s).num_classes for s in SPLITS] == sizes
    for s in SPLITS:
        pool = dataset.pool(s)
        assert pool.images.shape == (20 * pool.num_classes, 28, 28, 1)
        assert 0.06 < np.asarray(pool.images).mean() / 255 < 0.1
        assert pool.images.max() == 255
    names = [name for s in SPLITS for name in dataset.class_names[s]]
    assert len(set(names)) == 1623
    alphabets = {s: {n.split("/")[0] for n in dataset.class_names[s]} for s in SPLITS}
    if split == "alphabets":
        assert [len(alphabets[s]) for s in SPLITS] == [25, 5, 20]
        assert (
            Counter(a for s in SPLITS for a in alphabets[s]).most_common(1)[0][1] == 1
        )
    message = f"way=700 is more than the {sizes[2]} classes of omniglot's test split"
    with pytest.raises(ValueError, match=f"{message}; choose way <= {sizes[2]}"):
        validate(EpisodeSpec(700, 1), dataset, "test")


@pytest.mark.parametrize(
    "decoder", [pytest.param(d, marks=pytest.mark.real_data) for d in ("cv2", "PIL")]
)
def test_real_drawings_are_normalised_by_what_was_decoded(root, decoder, monkeypatch):
    from metalstm.data.sources.tfds import open_builder

    if decoder == "PIL":
        monkeypatch.setitem(sys.modules, "cv2", None)
    source = open_builder("omniglot", root).as_data_source(split="test")
    raw = np.stack([source[i]["image"][..., 0] for i in range(40)])
    ink = omniglot._shrink(raw[None], 28) / 255
    assert 0.05 < ink.mean() < 0.12
    assert ink.max() == 1
