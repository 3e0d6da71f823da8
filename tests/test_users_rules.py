"""A rule of one's own, by its path: built, saved, exported, on the command lines."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from few_shot_runs import command, read

import metalstm
from experiments.few_shot import __main__ as few_shot
from experiments.few_shot.command_line import parse
from experiments.learned_optimizer import __main__ as learned_optimizer
from metalstm import algorithms, first_order, rules
from metalstm.records import to_spec
from metalstm.runtime.array_files import digest_of, write_members

MODULE = (
    tiny.RULE_MODULE
    + """
made = tanh_descent(0.2)
def clipped(rate=0.1) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(rate))
sgd = optax.sgd(0.3)
number = 3
def nothing() -> metalstm.UpdateRule:
    return None
def silent(text=''):
    open('ran', 'w').write(text)
"""
)
PARAMS = {"w": jnp.array([1.0, -2.0])}
GRADS = {"w": jnp.array([0.5, 4.0])}


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    """A module in the current directory, forgotten afterwards."""
    (tmp_path / "myrules.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield
    sys.modules.pop("myrules", None)


def one_update(rule):
    tx = rule.bind(rule.init(jax.random.key(0), PARAMS))
    return tx.update(GRADS, tx.init(PARAMS), PARAMS, value=jnp.float32(1))[0]["w"]


def test_what_a_path_may_name():
    import myrules  # noqa: F401

    for name, options, expected in (
        ("tanh_descent", {"rate": 0.5}, -0.5 * jnp.tanh(GRADS["w"])),
        ("made", {}, -0.2 * jnp.tanh(GRADS["w"])),
        ("clipped", {"rate": 2.0}, -2 * GRADS["w"] / jnp.linalg.norm(GRADS["w"])),
        ("sgd", {}, -0.3 * GRADS["w"]),
    ):
        spec = {"rule": f"myrules:{name}", **options}
        rule = rules.build_rule(spec)
        np.testing.assert_allclose(one_update(rule), expected, rtol=1e-6)
        assert to_spec(rule) == (spec, {})
        chained = rules.build_rule({"rule": "chain", "parts": [spec]})
        np.testing.assert_allclose(one_update(chained), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"rule": "other:rule"}, r"rule 'other:rule': `import other` first"),
        ({"rule": "myrules:rule"}, r"myrules has no 'rule', but .*tanh_descent"),
        ({"rule": "myrules:number"}, r"is 3: give a metalstm\.UpdateRule, or a fun"),
        ({"rule": "myrules:nothing"}, r"cannot be built of \{\}: rule=None is neither"),
        ({"rule": "myrules:silent", "text": "x"}, r"by its return annotation that it"),
        (
            {"rule": "os:system", "command": "touch ran"},
            r"is <built-in function system>: giv",
        ),
        ({"rule": "myrules:made", "rate": 1}, r"is a rule, which takes no rate"),
        ({"rule": "myrules:tanh_descent", "rats": 1}, r"cannot be built of .*'rats'"),
    ],
)
def test_what_it_may_not(spec, message, tmp_path):
    import myrules  # noqa: F401

    with pytest.raises(ValueError, match=message):
        rules.build_rule(spec)
    header = {"format": 1, "features": 1, "spec": spec, "info": {}}
    header["sha256"] = digest_of([spec, {}], {})
    write_members(tmp_path / "hostile.npz", header, {})
    with pytest.raises(ValueError, match=message):
        metalstm.load_rule(tmp_path / "hostile.npz")
    with pytest.raises(ValueError, match=message):
        metalstm.pretrained_optimizer(directory=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_it_is_saved_and_loaded_where_its_module_is_imported(tmp_path):
    import myrules

    path, spec = tmp_path / "mine.npz", {"rule": "myrules:tanh_descent", "rate": 0.5}
    weights = {"alpha": jnp.float32(0.25), "beta": jnp.float32(2)}
    metalstm.save_rule(path, spec, weights)
    expected = myrules.tanh_descent().bind(weights).update(GRADS, optax.EmptyState())
    found = metalstm.load_rule(path).transform().update(GRADS, optax.EmptyState())
    tiny.assert_equal(found[0], expected[0])
    del sys.modules["myrules"]  # a file imports nothing
    with pytest.raises(
        ValueError, match=r"holds no usable rule: .*`import myrules` fi"
    ):
        metalstm.load_rule(path)


def test_an_algorithm_with_it_is_saved_and_loaded(tmp_path):
    import myrules  # noqa: F401

    rule = rules.build_rule({"rule": "myrules:tanh_descent"})
    net = metalstm.nn.mlp(tiny.WAY, widths=(4,))
    algorithm = algorithms.learned_init(
        net, rule, num_steps=2, differentiation=first_order()
    )
    spec, given = to_spec(algorithm)
    assert spec["rule"] == {"rule": "myrules:tanh_descent"}
    assert not given
    again = metalstm.specs.build_algorithm(spec)
    episode = tiny.episode()
    params = algorithm.init(jax.random.key(0), episode)
    ask = (params, jax.random.key(1), episode.support, episode.query.x)
    way = {"num_classes": tiny.WAY}
    tiny.assert_equal(again.predict(*ask, **way), algorithm.predict(*ask, **way))


@pytest.mark.usefixtures("tiny_instead_of_glyphs")
def test_few_shot_meta_trains_and_tests_it(tmp_path):
    folder = tmp_path / "run"
    own = ["--num-steps", "2", "--rule", "myrules:tanh_descent"]
    words = command("--algorithms", "learned-rule", *own, workdir=folder)
    assert few_shot.main(words) == 0
    _, learned = metalstm.load_run(folder).params.rule  # after the calibrated scale
    assert learned["alpha"] != jnp.float32(0.1)  # it was meta-trained
    sys.modules.pop("myrules")
    assert few_shot.main(["--evaluate", str(folder), "--test-episodes", "10"]) == 0
    (row,) = read(folder / "results.json")["methods"].values()
    (again,) = read(folder / "evaluation-3w1s-0.json")
    assert again["mean"] == row["accuracy"]
    with pytest.raises(ValueError, match="--rule nomodule:x: No module named 'nomod"):
        few_shot_specs("nomodule:x")


def few_shot_specs(path):
    from experiments.few_shot.methods import specs_of

    return specs_of(parse(["--algorithms", "learned-rule", "--rule", path]))


def test_learned_optimizer_meta_trains_exports_and_tests_it(tmp_path):
    words = (
        "--rules myrules:tanh_descent --dim 2 --num-tasks 2 --unroll-steps 2 "
        "--horizon 4 --meta-steps 2 --validate-every 2 --save-every 2 "
        "--validation-instances 4 --steps 4 --instances 4 --tune-instances 2 "
        "--baselines sgd --few-baselines sgd --workdir run --study cost"
    ).split()
    assert learned_optimizer.main(words) == 0
    (file,) = (tmp_path / "run" / "rules").iterdir()
    saved = metalstm.load_rule(file)
    assert saved.spec == {"rule": "myrules:tanh_descent"}
    assert set(saved.params) == {"alpha", "beta"}
