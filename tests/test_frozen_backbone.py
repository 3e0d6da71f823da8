"""The tour from a folder of photos to answers runs, with a tiny backbone in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from run_blocks import blocks

DOCS = Path(__file__).parents[1] / "docs"
# what is made smaller, so that it costs seconds
SMALLER = {
    "image_size=224": "image_size=8",
    "range(500)": "range(2)",
    '"num_episodes": 600': '"num_episodes": 40',
    "num_episodes=600": "num_episodes=8",
    "num_episodes=200": "num_episodes=8",
}


def take_photos(root: Path) -> None:
    """Ten classes a split: a colour and a gradient each, and noise."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for c in range(10):
            folder = root / split / f"{split}-{c}"
            folder.mkdir(parents=True)
            pattern = rng.integers(0, 255, (8, 8, 3))
            for m in range(6):
                noisy = pattern + rng.normal(0, 25, pattern.shape)
                photo = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
                photo.save(folder / f"{m}.png")


def tiny_backbone(images):
    weights = np.random.default_rng(1).normal(size=(8 * 8 * 3, 16))
    return np.maximum(images.reshape(len(images), -1) @ weights, 0)


def test_the_tour_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METALSTM_CACHE_DIR", str(tmp_path / "cache"))
    take_photos(tmp_path / "photos")
    names = {"backbone_features": tiny_backbone}
    shown = blocks(DOCS / "frozen_backbone.md")
    (of_transformers,) = (b for b in shown if "from transformers import" in b)
    compile(of_transformers, "frozen_backbone.md", "exec")  # neither is a dependency
    text = "\n".join(block for block in shown if "transformers" not in block)
    for long, short in SMALLER.items():
        assert long in text
        text = text.replace(long, short)
    exec(compile(text, "frozen_backbone.md", "exec"), names)

    assert names["features"].image_shape == (16,)
    assert names["results"]["nearest centroid"].mean > 0.8
    report = names["report"]
    assert report.coverage[0] > 0.85
    assert report.misses[0] < 0.5
    said = capsys.readouterr().out
    assert "tuned AdamW" in said
    assert f"coverage {100 * report.coverage[0]:.1f} ±" in said
    answers = names["answers"].labels.tolist()
    assert answers[:5] == [0, 1, 2, 3, 4]
    assert answers[5:].count(-1) >= 3
    assert "none of these" in said
