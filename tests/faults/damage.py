"""Files changed after they were written: bits flipped, ends cut off."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .outcomes import Outcome, require
from .writers import _read_checkpoint, _state, _write_cache, _write_checkpoint


def damages(whole: bytes, flips: int, cuts: int) -> Iterator[tuple[str, bytes]]:
    """Cut-off ends and single flipped bits, evenly over a file."""
    size = len(whole)
    lengths = {0, 1, size - 1, *np.linspace(0, size - 1, cuts).astype(int).tolist()}
    for length in sorted(n for n in lengths if 0 <= n < size):
        yield f"cut to {length}", whole[:length]
    places = np.linspace(0, size - 1, min(flips, size)).astype(int)
    for place in sorted(set(places.tolist())):
        flipped = bytes([whole[place] ^ 1 << place % 8])
        yield (
            f"bit {place % 8} of byte {place}",
            (whole[:place] + flipped + whole[place + 1 :]),
        )


def damaged_checkpoints(folder: Path, flips: int, cuts: int) -> list[Outcome]:
    """Damage every file of the newest checkpoint, one at a time."""
    for version in (1, 2):
        _write_checkpoint(folder, version)
    outcome = Outcome(
        "newest checkpoint: a bit flipped, an end cut off, a file missing",
        "it is read whole, or the one before is, and what was skipped is said",
    )
    back = 0
    newest = folder / "2"
    for path in sorted(p for p in newest.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        name = str(path.relative_to(newest))
        for how, data in [*damages(whole, flips, cuts), ("missing", None)]:
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)
            with outcome.trial(f"{name} {how}"):
                back += _goes_back(folder)
            path.write_bytes(whole)
    require(_read_checkpoint(folder) == 2, "the trials changed the checkpoint")
    outcome.note = f"{back} of them fell back to the one before"
    return [outcome]


def _goes_back(folder: Path) -> bool:
    from metalstm.runtime import checkpoints

    restored = checkpoints.restore(folder, _state(0))
    version = restored.step
    require(version in (1, 2), f"step {version}")
    if version == 1:
        said = restored.message or ""
        require("2 cannot be read" in said and "fell back to step 1" in said, said)
    else:
        require(restored.message is None, "nothing was skipped, but it says so")
        require(restored.metadata["version"] == 2, "altered metadata")
    for name, expected in _state(version).items():
        found = np.asarray(restored.state[name])
        require(np.array_equal(found, expected), f"altered {name} is believed")
    return version == 1


def damaged_caches(folder: Path, flips: int, cuts: int) -> list[Outcome]:
    """Damage a decode cache: it is built again, or is what it was."""
    from metalstm.data import cache

    expected = _state(3)["weights"]
    _write_cache(folder, 3)
    path = folder / "data.npz"
    whole = path.read_bytes()
    outcome = Outcome(
        "decode cache: a bit flipped, an end cut off",
        "it is noticed and built again, or harmless",
    )
    rebuilt = 0
    for how, data in damages(whole, flips, cuts):
        path.write_bytes(data)
        with outcome.trial(how), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            arrays = cache.cached(path, lambda: {"images": expected})
            require(set(arrays) == {"images"}, f"it holds {sorted(arrays)}")
            require(np.array_equal(arrays["images"], expected), "altered images")
            rebuilt += any("is damaged" in str(w.message) for w in said)
    outcome.note = f"{rebuilt} of them built again"
    return [outcome]


def damaged_rules(folder: Path, flips: int, cuts: int) -> list[Outcome]:
    """Damage a rule file: refused by name, or the same rule."""
    import jax
    import jax.numpy as jnp

    from metalstm import rules

    spec = {"rule": "l2l", "hidden_size": 2, "num_layers": 1}
    built = rules.build_rule(spec)
    params = built.init(jax.random.key(0), jnp.zeros(()))
    path = rules.save_rule(folder / "rule.npz", spec, params, info={"seed": 0})
    whole = path.read_bytes()
    outcome = Outcome(
        "rule file: a bit flipped, an end cut off",
        "it is refused and named, or the same rule",
    )
    for how, data in damages(whole, flips, cuts):
        path.write_bytes(data)
        with outcome.trial(how):
            try:
                saved = rules.load_rule(path)
            except ValueError as error:
                require("rule.npz" in str(error), f"no name: {error}")
                continue
            same = jax.tree.map(np.array_equal, saved.params, params)
            require(all(jax.tree.leaves(same)), "altered parameters")
            require(saved.info == {"seed": 0}, "altered info")
    return [outcome]


def run(folder: Path, *, flips: int = 64, cuts: int = 12) -> list[Outcome]:
    """All of them; ``flips`` and ``cuts`` for each file."""
    found: list[Outcome] = []
    kinds: tuple[Callable[[Path, int, int], list[Outcome]], ...] = (
        damaged_checkpoints,
        damaged_caches,
        damaged_rules,
    )
    for kind in kinds:
        place = folder / kind.__name__
        place.mkdir(parents=True)
        # an archive is one file: the same number in all as a checkpoint of many
        more = 1 if kind is damaged_checkpoints else 10
        found += kind(place, more * flips, more * cuts)
        shutil.rmtree(place)
    return found
