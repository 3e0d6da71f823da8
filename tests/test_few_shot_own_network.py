"""`--learner MODULE:NAME`: a user's network by every method of the table."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from few_shot_runs import command, read, tiny_dataset

import metalstm
from experiments.few_shot import __main__ as few_shot
from experiments.few_shot import methods
from experiments.few_shot.command_line import parse
from metalstm.nn.named import learner_at
from metalstm.specs import build_algorithm, build_learner

MODULE = """
from flax import linen as nn, nnx
import metalstm

class CNN(nnx.Module):
    def __init__(self, num_classes, *, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = num_classes and nnx.Linear(36, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        return self.head(x) if self.head else x

class Linen(nn.Module):
    num_classes: int | None = None
    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes or 4)(x.reshape(len(x), -1))

three = Linen(3)
def made(num_classes) -> nn.Module:
    return Linen(num_classes)
def of_rngs(rngs) -> nnx.Module:
    return CNN(3, rngs=rngs)
def learner() -> metalstm.Learner:
    return metalstm.nn.mlp(3)
ten = Linen(10)
def silent():
    open("ran", "w").write("x")
number = 3
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module in the current directory, forgotten afterwards."""
    (tmp_path / "mymodule.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "needy.py").write_text("import not_installed_here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    methods.kind_of.cache_clear()  # which another test would not import for
    for name in ("mymodule", "broken", "needy"):
        sys.modules.pop(name, None)


METHODS = ("fomaml", "prototypical")


@pytest.mark.filterwarnings("ignore:an answer of this fomaml depends on how many")
@pytest.mark.usefixtures("tiny_instead_of_glyphs")
def test_the_table_compares_it_by_every_method_again_and_again(own_module, capsys):
    folder = own_module / "run"
    own = ["--fomaml.num-steps", "2", "--learner", "mymodule:CNN"]
    words = command("--algorithms", *METHODS, *own, workdir=folder)
    at = words.index("--widths")
    assert few_shot.main([*words[: at - 2], *words[at + 2 :]]) == 0
    rows = read(folder / "results.json")["methods"]
    assert list(rows) == list(METHODS)
    assert all(row["batch_norm"] for row in rows.values())
    saved = read(folder / "config.json")["config"]["methods"]
    assert {own["learner"]["learner"] for own in saved.values()} == {"mymodule:CNN"}
    before = capsys.readouterr().out
    assert "mymodule:CNN" not in before.split("method")[0]

    assert few_shot.main(["--resume", str(folder)]) == 0
    assert few_shot.main(["--evaluate", str(folder), "--test-episodes", "10"]) == 0
    again = capsys.readouterr().out
    assert f"{100 * rows['fomaml']['accuracy']:.1f}" in again

    x, y = np.zeros((3, 6, 6, 1), np.uint8), ["a", "b", "c"]
    assert set(metalstm.load_run(folder, "fomaml")(x, y, x)) <= set(y)
    del sys.modules["mymodule"]
    with pytest.raises(ValueError, match=r"mymodule:CNN.*`import mymodule` first"):
        metalstm.load_run(folder, "fomaml")


@pytest.mark.parametrize("name", methods.METHODS)
@pytest.mark.usefixtures("tiny_instead_of_glyphs", "own_module")
def test_every_method_takes_it(name):
    """By shapes alone: nothing is compiled."""
    is_rule = methods.METHODS[name].family == methods.HAND_MADE
    names = ["fomaml", name] if is_rule else [name]  # a rule starts from its theta_0
    words = command("--algorithms", *names, "--learner", "mymodule:CNN")
    at = words.index("--widths")
    options = parse([*words[: at - 2], *words[at + 2 :]])
    algorithm = build_algorithm(methods.specs_of(options, 12)[name])
    pools, spec = tiny_dataset(), metalstm.data.EpisodeSpec(3, 1, 2)
    key, tx = metalstm.data.episode_key(0, "train", 0), optax.sgd(0.1)

    def train_and_predict():
        episode = algorithm.train_sampler(spec).sample(key, pools.train)
        state = metalstm.init_train_state(algorithm, tx, 0, episode)
        train = metalstm.make_train_loop(algorithm, tx, spec, num_tasks=1)
        if algorithm.trainable:
            state, _ = train(state, pools.train)
        support, query = spec.sample(key, pools.test)
        return algorithm.predict(state.params, key, support, query.x, num_classes=3)

    assert jax.eval_shape(train_and_predict).shape == (6, 3)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nomodule:CNN", "No module named 'nomodule'; run in the folder of nomodule"),
        ("mymodule.sub:CNN", "run in the folder of mymodule"),
        ("mymodule:RNN", "mymodule has no 'RNN', but CNN, Linen"),
        ("mymodule:", "write MODULE:NAME, such as mymodule:CNN"),
        ("my-module:CNN", "write MODULE:NAME"),
        ("broken:CNN", r"importing broken failed \(ZeroDivisionError: division"),
        ("needy:CNN", "install not_installed_here, which needy imports"),
    ],
)
@pytest.mark.usefixtures("own_module")
def test_what_cannot_be_found_is_said_before_anything_runs(path, message):
    with pytest.raises(ValueError, match=message):
        parse(["--learner", path])


@pytest.mark.usefixtures("own_module")
def test_what_a_name_may_be():
    parse(["--learner", "mymodule:CNN"])
    x, key = (
        np.zeros((2, 6, 6, 1), np.float32),
        metalstm.data.episode_key(0, "train", 0),
    )
    for name in ("CNN", "Linen", "three", "made", "of_rngs", "learner"):
        spec = {"learner": f"mymodule:{name}", "num_classes": 3}
        learner = build_learner(spec)
        outputs, _ = learner.apply(learner.init(key, x), x, norm="batch")
        assert outputs.shape == (2, 3), name
    features = learner_at("mymodule:CNN")
    outputs, _ = features.apply(features.init(key, x), x, norm="batch")
    assert outputs.shape == (2, 36)
    with pytest.raises(ValueError, match=r"returns \[2, 10\] for 2 .* of 3 classes"):
        learner_at("mymodule:ten", 3).init(key, x)
    with pytest.raises(ValueError, match=r"mymodule:number' is 3: give a metalstm\.L"):
        learner_at("mymodule:number", 3)
    with pytest.raises(
        ValueError, match=r"`def silent\(..\) -> metalstm.Learner` \(or "
    ):
        build_learner({"learner": "mymodule:silent", "num_classes": 3})
    assert not Path("ran").exists()
