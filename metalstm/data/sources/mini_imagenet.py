"""Mini-ImageNet in the split of Ravi & Larochelle (2017).

Classes are ImageNet's WordNet ids. Other splits of the same name exist (Vinyals et al.,
2016, used another list), and one class moved from test to train spoils every number:
hence the check of the classes.
"""

from __future__ import annotations

from pathlib import Path

from metalstm.data.cache import PathLike, cache_folder, cached_dataset, fingerprint
from metalstm.data.pools import SPLITS, Dataset
from metalstm.data.sources.folders import (
    VERSION,
    Files,
    class_files,
    decode_splits,
    list_files,
    split_folders,
)

__all__ = ["CLASSES", "IMAGES_PER_CLASS", "load_mini_imagenet"]

IMAGES_PER_CLASS = 600


def _ids(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CLASSES = {
    "train": _ids(
        """
        n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747
        n02074367 n02089867 n02091831 n02101006 n02105505 n02108089 n02108551
        n02108915 n02111277 n02113712 n02120079 n02165456 n02457408 n02606052
        n02687172 n02747177 n02795169 n02823428 n02966193 n03017168 n03047690
        n03062245 n03207743 n03220513 n03337140 n03347037 n03400231 n03476684
        n03527444 n03676483 n03838899 n03854065 n03888605 n03908618 n03924679
        n03998194 n04067472 n04243546 n04251144 n04258138 n04275548 n04296562
        n04389033 n04435653 n04443257 n04509417 n04515003 n04596742 n04604644
        n04612504 n06794110 n07584110 n07697537 n07747607 n09246464 n13054560
        n13133613
        """
    ),
    "validation": _ids(
        """
        n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356
        n02981792 n03075370 n03417042 n03535780 n03584254 n03770439 n03773504
        n03980874 n09256479
        """
    ),
    "test": _ids(
        """
        n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165
        n02219486 n02443484 n02871525 n03127925 n03146219 n03272010 n03544143
        n03775546 n04146614 n04149813 n04418357 n04522168 n07613480
        """
    ),
}


def load_mini_imagenet(
    data_dir: PathLike | None,
    *,
    image_size: int = 84,
    images_per_class: int = IMAGES_PER_CLASS,
    cache_dir: PathLike | None = None,
) -> Dataset:
    """Load mini-ImageNet in the published split, 64 / 16 / 20 classes of 600 images.

    Args:
      data_dir: holds train/, val/ and test/ of ``<wnid>/*.jpg``.
      image_size: 84 as published; images of another size are resized.
      images_per_class: a class with another number of images is refused.
      cache_dir: where the decoded images are kept (1.3 GB), see `metalstm.data.cache`.

    Raises:
      FileNotFoundError: if there is nothing of the kind at ``data_dir``.
      ValueError: if the classes of a split are not the published ones, a class has
        another number of images, or an image is corrupt.
    """
    root = None if data_dir is None else Path(data_dir).expanduser()
    found = {} if root is None else split_folders(root)
    if root is None or set(found) != set(SPLITS):
        raise FileNotFoundError(
            f"no mini-ImageNet at {root}. Expected folders train/, val/, test/ of "
            f"<wnid>/*.jpg in the split of Ravi & Larochelle; docs/data.md says where "
            f"people get it and what to check"
        )
    files = {split: class_files(found[split]) for split in SPLITS}
    for split, expected in CLASSES.items():
        _check_published(split, files[split], expected, images_per_class, root)
    # The published files never change, so their dates do not matter.
    key = fingerprint([VERSION, image_size, *list_files(files, root, dates=False)])
    info = {"split": "ravi-larochelle"}
    return cached_dataset(
        "mini-imagenet",
        cache_folder(cache_dir) / f"mini-imagenet-{image_size}-{key}.npz",
        lambda: decode_splits(files, info, size=image_size, channels=3),
    )


def _check_published(
    split: str, files: Files, expected: tuple[str, ...], num_images: int, root: Path
) -> None:
    missing = sorted(set(expected) - set(files))
    surplus = sorted(set(files) - set(expected))
    if missing or surplus:
        raise ValueError(
            f"the {split} classes at {root} are not those of Ravi & Larochelle: "
            f"{len(missing)} missing ({', '.join(missing[:5])}), {len(surplus)} not "
            f"expected ({', '.join(surplus[:5])}). For another split use "
            f"load_image_folders, and do not compare with published numbers"
        )
    for name, paths in files.items():
        if len(paths) != num_images:
            raise ValueError(
                f"class {name} at {root} has {len(paths)} images, not {num_images}; "
                f"unpack it again"
            )
