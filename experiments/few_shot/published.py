"""Published accuracies, each with its protocol, to stand beside ours in the table.

A number is comparable only under the same split and with batch statistics gathered the
same way: `beside` says in which of them one differs, and of what nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Published(NamedTuple):
    value: float  # accuracy, %
    source: str
    split: str | None = None  # None: the source as read does not say
    transductive: bool | None = None  # batch norm reads the query batch; None: unknown
    ci95: float | None = None
    up_to: float | None = None  # sources differ: value is the least of theirs
    confirmed: bool = True  # False: quoted from memory, not read in the source


class Beside(NamedTuple):
    """A published number, and why it is not comparable with ours."""

    number: Published
    other: tuple[str, ...]  # in what its protocol differs
    unknown: tuple[str, ...]  # what its source does not say

    def __str__(self) -> str:
        value, _, _, _, ci95, up_to, confirmed = self.number
        digits = 2 if f"{value:.2f}"[-1] != "0" else 1
        text = f"{value:.{digits}f}"
        text += "" if up_to is None else f"-{up_to:.{digits}f}"
        text += "" if ci95 is None else f" ± {ci95:.2f}"
        marks = "*" * bool(self.other) + "~" * bool(self.unknown)
        return text + marks + "?" * (not confirmed)


# How the paper splits characters. Ours: background alphabets for meta-training,
# evaluation alphabets for the test ("alphabets"), or 1,100 / 100 / 423 ("characters").
ALPHABETS, CHARACTERS = "alphabets", "characters"
_SPLITS = {ALPHABETS: "held-out alphabets", CHARACTERS: "1,100 / 100 / 423 characters"}
_TURNED = "1,028 / 172 / 423 characters, turned ones are classes of the test too"
_REPTILE_SPLIT = "1,200 / 423 characters"
_RAVI_SPLIT = "Ravi & Larochelle's"

_RAVI, _FINN = "Ravi & Larochelle 2017", "Finn et al. 2017"
_VINYALS, _SNELL = "Vinyals et al. 2016", "Snell et al. 2017"
_NICHOL, _LI, _SUNG = "Nichol et al. 2018", "Li et al. 2017", "Sung et al. 2018"
_TASKNORM, _CHEN = "Bronskill et al. 2020", "Chen et al. 2019"

_Entries = dict[str, tuple[Published, ...]]


def _finn(value: float, split: str, ci95: float | None = None) -> Published:
    return Published(value, _FINN, split, True, ci95)


def _tasknorm(transductive: float, support: float, split: str | None):
    """MAML by batch-norm mode, as that paper has it."""
    return (
        Published(transductive, _TASKNORM, split, True),
        Published(support, _TASKNORM, split, False),
    )


def _reptile(inductive: float, transductive: float, split: str):
    return (
        Published(inductive, _NICHOL, split, False),
        Published(transductive, _NICHOL, split, True),
    )


def _mini(value: float, source: str, ci95: float | None = None, **known) -> Published:
    return Published(value, source, _RAVI_SPLIT, ci95=ci95, **known)


# (data set, way, shot) -> method -> numbers, the original first
PUBLISHED: dict[tuple[str, int, int], _Entries] = {
    ("omniglot", 5, 1): {
        "meta-lstm": (Published(94.7, "a public re-run", transductive=True),),
        "maml": (_finn(98.7, CHARACTERS), *_tasknorm(98.4, 91.8, None)),
        "fomaml": (_finn(98.3, CHARACTERS),),
        "reptile": _reptile(95.4, 97.7, _REPTILE_SPLIT),
        "meta-sgd": (Published(99.53, _LI),),
        "prototypical": (
            Published(98.8, _SNELL, _TURNED),
            Published(98.2, "a public re-run", ALPHABETS),
        ),
        "matching": (Published(98.1, _VINYALS),),
        "relation": (Published(99.6, _SUNG, confirmed=False),),
        "siamese": (Published(97.3, "as quoted", confirmed=False),),
        "mann": (Published(82.8, "Santoro et al. 2016", confirmed=False),),
        "feature-cosine": (Published(80.0, _VINYALS, confirmed=False),),
        "finetune-all": (Published(82, "as quoted", up_to=86, confirmed=False),),
        "nearest-neighbour": (
            Published(41.7, _VINYALS, transductive=False, confirmed=False),
        ),
    },
    ("omniglot", 5, 5): {
        "maml": (_finn(99.9, CHARACTERS), *_tasknorm(99.2, 98.1, None)),
        "fomaml": (_finn(99.2, CHARACTERS),),
        "reptile": _reptile(98.9, 99.5, _REPTILE_SPLIT),
        "meta-sgd": (Published(99.93, _LI),),
        "prototypical": (
            Published(99.7, _SNELL, _TURNED),
            Published(99.4, "a public re-run", ALPHABETS),
        ),
        "matching": (Published(98.9, _VINYALS),),
        "relation": (Published(99.8, _SUNG, confirmed=False),),
        "siamese": (Published(98.4, "as quoted", confirmed=False),),
        "mann": (Published(94.9, "Santoro et al. 2016", confirmed=False),),
        "feature-cosine": (Published(95.0, _VINYALS, confirmed=False),),
        "finetune-all": (Published(98, "as quoted", confirmed=False),),
        "nearest-neighbour": (
            Published(63.2, _VINYALS, transductive=False, confirmed=False),
        ),
    },
    ("omniglot", 20, 1): {
        "maml": (_finn(95.8, CHARACTERS),),
        "fomaml": (_finn(89.4, CHARACTERS),),
        "reptile": _reptile(88.1, 89.4, _REPTILE_SPLIT),
        "meta-sgd": (Published(95.93, _LI),),
        "prototypical": (Published(96.0, _SNELL, _TURNED),),
        "matching": (Published(93.8, _VINYALS),),
        "relation": (Published(97.6, _SUNG, confirmed=False),),
        "siamese": (Published(88.1, "as quoted", confirmed=False),),
    },
    ("omniglot", 20, 5): {
        "maml": (_finn(98.9, CHARACTERS),),
        "fomaml": (_finn(97.9, CHARACTERS),),
        "reptile": _reptile(96.7, 97.1, _REPTILE_SPLIT),
        "meta-sgd": (Published(98.97, _LI),),
        "prototypical": (Published(98.9, _SNELL, _TURNED),),
        "matching": (Published(98.5, _VINYALS),),
        "relation": (Published(99.1, _SUNG, confirmed=False),),
        "siamese": (Published(97.0, "as quoted", confirmed=False),),
    },
    ("mini-imagenet", 5, 1): {
        "meta-lstm": (_mini(43.44, _RAVI, 0.77, transductive=False),),
        "matching": (_mini(43.40, _RAVI, 0.78), _mini(48.1, _CHEN)),
        "matching-fce": (_mini(43.56, _RAVI, 0.84),),
        "finetune-all": (_mini(28.86, _RAVI, 0.54),),
        "feature-neighbour": (_mini(41.08, _RAVI, 0.70),),
        "maml": (
            _finn(48.70, _RAVI_SPLIT),
            *_tasknorm(45.5, 41.6, _RAVI_SPLIT),
            _mini(46.5, _CHEN, transductive=True),
        ),
        "fomaml": (_finn(48.07, _RAVI_SPLIT),),
        "reptile": _reptile(47.07, 49.97, _RAVI_SPLIT),
        "meta-sgd": (_mini(50.47, _LI),),
        "prototypical": (_mini(49.42, _SNELL), _mini(44.4, _CHEN)),
        "relation": (_mini(50.44, _SUNG), _mini(49.3, _CHEN)),
        "finetune-head": (_mini(42.1, _CHEN),),
        "baseline++": (_mini(48.2, _CHEN),),
    },
    ("mini-imagenet", 5, 5): {
        "meta-lstm": (_mini(60.60, _RAVI, 0.71, transductive=False),),
        "matching": (_mini(51.09, _RAVI, 0.71), _mini(63.5, _CHEN)),
        "matching-fce": (_mini(55.31, _RAVI, 0.73),),
        "finetune-all": (_mini(49.79, _RAVI, 0.79),),
        "feature-neighbour": (_mini(51.04, _RAVI, 0.65),),
        "maml": (
            _finn(63.11, _RAVI_SPLIT),
            *_tasknorm(59.7, 58.6, _RAVI_SPLIT),
            _mini(62.7, _CHEN, transductive=True),
        ),
        "fomaml": (_finn(63.15, _RAVI_SPLIT),),
        "reptile": _reptile(62.74, 65.99, _RAVI_SPLIT),
        "meta-sgd": (_mini(64.03, _LI),),
        "prototypical": (_mini(68.20, _SNELL), _mini(64.2, _CHEN)),
        "relation": (_mini(65.32, _SUNG), _mini(66.6, _CHEN)),
        "finetune-head": (_mini(62.5, _CHEN),),
        "baseline++": (_mini(66.4, _CHEN),),
    },
}


def beside(
    method: str,
    *,
    dataset: str,
    split: str,
    way: int,
    shot: int,
    batch_norm: str | None,
) -> Beside | None:
    """The published number whose protocol is nearest to ours, or None.

    Args:
      split: of Omniglot, ``alphabets`` or ``characters``; mini-ImageNet has one.
      batch_norm: how our queries were normalised.
    """
    numbers = PUBLISHED.get((dataset, way, shot), {}).get(method, ())
    ours = _RAVI_SPLIT if dataset == "mini-imagenet" else split
    found = [_compared(n, ours, batch_norm == "transductive") for n in numbers]
    return min(found, key=lambda b: (len(b.other), len(b.unknown)), default=None)


def _compared(number: Published, split: str, transductive: bool) -> Beside:
    other, unknown = [], []
    if number.split is None:
        unknown.append("split")
    elif number.split != split:
        other.append(f"split {_SPLITS.get(number.split, number.split)}")
    if number.transductive is None:
        unknown.append("batch-norm mode")
    elif number.transductive != transductive:
        other.append("transductive" if number.transductive else "inductive")
    return Beside(number, tuple(other), tuple(unknown))


def legend(found: dict[str, Beside]) -> Iterator[str]:
    """Lines that explain the marks, and name the sources."""
    kinds = (
        ("* other protocol", lambda b: b.other),
        ("~ not stated", lambda b: b.unknown),
        ("? unconfirmed", lambda b: () if b.number.confirmed else ("quoted",)),
        ("published by", lambda b: (b.number.source,)),
    )
    for title, reasons_of in kinds:
        groups: dict[str, list[str]] = {}
        for name, number in found.items():
            for reason in reasons_of(number):
                groups.setdefault(reason, []).append(name)
        parts = [f"{reason} ({', '.join(names)})" for reason, names in groups.items()]
        if parts:
            yield f"{title}: {'; '.join(parts)}"
