"""Optimizers compared in one call, with a notice of divergence."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import optax
import pytest
from test_safety_of_rules import PARAMS, SPEC, loss_fn

import metalstm
from metalstm import rules
from metalstm.learned_optimizers import comparison

INPUTS = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)


def compare(**optimizers):
    return metalstm.compare_optimizers(
        loss_fn, PARAMS, INPUTS, 20, optimizers=optimizers, batch_size=8, seeds=2,
        records=5, eval_batch=64,
    )  # fmt: skip


def test_a_comparison_trains_every_optimizer_on_the_same_minibatches():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare(adamw=optax.adamw(0.1), same=optax.adamw(0.1), l2l="l2l-mnist")
    assert found.steps.tolist() == [0, 4, 8, 12, 16, 20]
    assert {losses.shape for losses in found.losses.values()} == {(2, 6)}
    np.testing.assert_array_equal(found.losses["adamw"], found.losses["same"])
    assert (found.final["adamw"] < found.losses["adamw"][:, 0]).all()
    lines = str(found).split("\n")
    assert lines[0].split() == [
        "optimizer",
        "median",
        "loss",
        "lowest",
        "highest",
        "seconds",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["adamw", "same", "l2l"]
    assert float(lines[1].split()[1]) == pytest.approx(
        np.median(found.final["adamw"]), rel=1e-3
    )
    assert {line.get_label() for line in found.plot().axes[0].lines} >= {"adamw", "l2l"}


def test_divergence_is_said_once_and_stands_in_the_table():
    with pytest.warns(
        RuntimeWarning, match=r"^wild diverged in 2 of 2 runs: .* from update 4 or"
    ) as said:
        found = compare(wild=optax.sgd(50.0), calm=optax.sgd(0.1))
    assert len(said) == 1
    assert "2 of 2 diverged" in str(found)
    assert found.diverged["wild"].all()
    assert not found.diverged["calm"].any()


def test_the_noise_of_rows_is_no_divergence():
    """Every recorded loss is of the same rows, also where they are not all."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metalstm.compare_optimizers(
            loss_fn, PARAMS, INPUTS, 7, optimizers={"still": optax.set_to_zero()},
            batch_size=4, records=2, eval_batch=8,
        )  # fmt: skip
    assert found.steps.tolist() == [0, 4, 7]
    np.testing.assert_allclose(np.ptp(found.losses["still"]), 0, atol=1e-6)


def test_schedule_free_is_measured_where_it_says():
    free = optax.contrib.schedule_free_sgd(0.5)
    found = compare(free=free, chained=optax.chain(optax.clip(1e6), free))
    np.testing.assert_allclose(*found.losses.values(), rtol=1e-6)
    measured = found.losses["free"]
    family = comparison._family(loss_fn, PARAMS, INPUTS, 8, 64)
    options = {"num_instances": 2, "num_steps": 20, "record_every": 4, "eval_batch": 64}
    at_params = comparison.loss_curves(family, free, INPUTS, **options)
    np.testing.assert_allclose(measured[:, 0], at_params[:, 0], rtol=1e-6)
    assert np.abs(measured[:, 1:] - at_params[:, 1:]).max() > 1e-3


def test_each_run_may_have_a_start_of_its_own():
    found = metalstm.compare_optimizers(
        loss_fn,
        lambda key: jax.tree.map(lambda p: jax.random.normal(key, p.shape), PARAMS),
        INPUTS, 10, optimizers={"sgd": optax.sgd(0.05)}, batch_size=4, eval_batch=64,
    )  # fmt: skip
    assert len(set(found.losses["sgd"][:, 0].tolist())) == 3


def test_wrong_use_of_the_comparison_is_refused():
    with pytest.raises(ValueError, match=r"optimizers=\{\}: name at least one"):
        compare()
    with pytest.raises(ValueError, match="there is no trained rule 'nosuch'"):
        compare(a="nosuch")
    with pytest.raises(ValueError, match=r"data has leading axes .*: give arrays of"):
        metalstm.compare_optimizers(
            loss_fn, PARAMS, (INPUTS, INPUTS[:5]), 2, optimizers={"a": optax.sgd(1.0)}
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": 0}, r"seeds=0: choose 1 or more"),
        ({"seeds": 2.5}, r"seeds=2\.5: choose an integer, 1 or more"),
        ({"steps": 10.0}, r"steps=10\.0: choose an integer"),
        ({"data": INPUTS[:0]}, r"data has leading axes \[\(0,\)\] of ndarray: give"),
        ({"data": [1.0, 2.0]}, r"leading axes \[\(\)\] of float: give arrays of one"),
        ({"loss": lambda p, b: (loss_fn(p, b), {})}, r"loss\(params, batch\) returned"),
        ({"loss": lambda p, b: None}, r"returned None: let it return one number"),
        ({"loss": lambda p, b: b @ p["w"]}, r"returned ShapeDtypeStruct\(shape=\(128"),
        ({"optimizers": ["l2l-mnist"]}, r"optimizers=\['l2l-mnist'\]: name at least"),
        ({"optimizers": {"a": optax.adam}}, r"optimizers\['a'\]=<function adam.* give"),
        (
            {"optimizers": {"a": rules.build_rule(SPEC)}},
            r"or rule\.bind\(its parameters",
        ),
        (
            {"optimizers": {"a": optax.lbfgs()}},
            r"\['a'\] makes no update of these parameters from .*value_fn",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_any_run(changed, message, monkeypatch):
    def no_run(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(comparison, "loss_curves", no_run)
    call = {"loss": loss_fn, "params": PARAMS, "data": INPUTS, "steps": 4}
    call |= {"optimizers": {"a": optax.sgd(0.1)}}
    with pytest.raises(ValueError, match=message):
        metalstm.compare_optimizers(**call | changed)
