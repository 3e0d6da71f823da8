"""Rules as specs and as files: the round trip, and every way a file can be bad."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import metalstm
from metalstm import rules
from metalstm.runtime.array_files import digest_of

SPECS = {
    "l2l": {"rule": "l2l", "hidden_size": 2},
    "gradient_memory": {"rule": "gradient_memory", "hidden_size": 2},
    "two_layer": {
        "rule": "two_layer",
        "memory": {"hidden_size": 2},
        "gates": {"loss_input": False, "forget_bias": [6, 7]},
    },
    "lstm_gates": {"rule": "lstm_gates", "hidden_size": 2, "input_bias": [-3, -2]},
    "learned_sgd": {"rule": "learned_sgd", "rate": [0.1, 0.2], "num_steps": 3},
    "moment_gates": {"rule": "moment_gates", "hidden_size": 2, "orthogonal": True},
    "moment_lstm": {"rule": "moment_lstm", "hidden_size": 2},
    "chain": {
        "rule": "chain",
        "parts": [
            {"rule": "gradient_memory", "hidden_size": 1},
            {"rule": "learned_sgd"},
        ],
    },
    "by_group": {
        "rule": "by_group",
        "labels": "matrix_or_vector",
        "groups": {
            "matrix": {"rule": "l2l", "hidden_size": 2},
            "vector": {"rule": "learned_sgd", "rate": 0.3},
        },
    },
}
PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
GRADS = jax.tree.map(lambda p: 0.3 * p, PARAMS)
INFO = {"trained_on": "toys", "limits": ["none known"], "steps": 3}


@functools.cache
def params_of(name: str):
    return rules.build_rule(SPECS[name]).init(jax.random.key(0), PARAMS)


def one_update(tx):
    return tx.update(GRADS, tx.init(PARAMS), PARAMS, value=1.0)[0]


@pytest.fixture
def file(tmp_path) -> Path:
    return rules.save_rule(
        tmp_path / "rule.npz", SPECS["l2l"], params_of("l2l"), info=INFO
    )


# -- specs -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_a_saved_rule_comes_back_as_it_was(name, tmp_path):
    path = tmp_path / f"{name}.npz"
    weights = params_of(name)
    assert metalstm.save_rule(path, SPECS[name], weights, info=INFO) == path
    saved = metalstm.load_rule(str(path))
    assert saved.spec == SPECS[name]
    assert saved.info == INFO
    tiny.assert_equal(saved.params, weights)
    expected = one_update(rules.build_rule(SPECS[name]).bind(weights))
    tiny.assert_equal(one_update(saved.transform()), expected)
    assert path.stat().st_size < 20_000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_spec_is_the_call_it_says():
    ours = rules.build_rule(SPECS["two_layer"])
    by_hand = rules.two_layer(
        memory={"hidden_size": 2}, gates={"loss_input": False, "forget_bias": (6, 7)}
    )
    key = jax.random.key(3)
    tiny.assert_equal(ours.init(key, PARAMS), by_hand.init(key, PARAMS))
    assert 6 < ours.init(key, PARAMS)[1]["forget"]["bias"] < 7


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, r"give a dict with the rule's name"),
        ("l2l", r"spec='l2l': give a dict"),
        ({"rule": ["l2l"]}, r"give a dict with the rule's name"),
        ({"rule": "adam"}, r"no rule 'adam': choose one of by_group, chain, gradient_"),
        ({"rule": "l2l", "hiden_size": 3}, r"l2l takes no 'hiden_size': it takes feat"),
        ({"rule": "l2l", "hidden_size": "3"}, r"l2l cannot be built of .*hidden_size"),
        ({"rule": "l2l", "hidden_size": 0}, r"hidden_size=0: choose 1 or more"),
        ({"rule": "two_layer", "gates": {"x": 1}}, r"two_layer cannot be built .*'x'"),
        ({"rule": "chain"}, r"chain takes parts=\[spec, ..\], not None"),
        ({"rule": "chain", "parts": []}, r"chain needs at least one rule"),
        ({"rule": "chain", "parts": [], "x": 1}, r"chain takes no 'x'"),
        ({"rule": "chain", "parts": [{"rule": "sgd"}]}, r"no rule 'sgd'"),
        ({"rule": "by_group", "labels": "odd"}, r"labels='odd': choose one of conv_or"),
        (
            {"rule": "by_group", "labels": "conv_or_dense", "groups": {"conv": {}}},
            r"takes groups=\{label: spec\} for conv and dense, not \{'conv'",
        ),
        ({"rule": "by_group", "label": "x"}, r"by_group takes no 'label'"),
    ],
)
def test_a_wrong_spec_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        rules.build_rule(spec)


def test_a_spec_may_not_nest_without_end():
    spec = {"rule": "l2l"}
    for _ in range(9):
        spec = {"rule": "chain", "parts": [spec]}
    with pytest.raises(ValueError, match="nests more than 8 rules"):
        rules.build_rule(spec)
    rules.build_rule(spec["parts"][0])


# -- groups ----------------------------------------------------------------------------


def test_each_group_has_its_own_rule():
    rule = rules.build_rule(SPECS["by_group"])
    weights = rule.init(jax.random.key(0), PARAMS)
    assert set(weights) == {"matrix", "vector"}
    assert not rule.traits.coordinatewise
    assert rule.traits.smooth
    assert not rule.traits.reads_loss
    one_reads = {"matrix": rules.lstm_gates(), "vector": rules.learned_sgd()}
    assert rules.by_group(one_reads, rules.matrix_or_vector).traits.reads_loss
    updates = one_update(rule.bind(weights))
    np.testing.assert_allclose(updates["b"], -0.3 * 0.3 * np.ones(3), rtol=1e-6)
    alone = rules.build_rule(SPECS["l2l"]).bind(weights["matrix"])
    expected, _ = alone.update(GRADS["w"], alone.init(PARAMS["w"]))
    np.testing.assert_array_equal(updates["w"], expected)
    other = weights | {"vector": jnp.float32(0.1)}
    np.testing.assert_array_equal(one_update(rule.bind(other))["w"], updates["w"])


def test_a_rule_of_a_group_sees_that_groups_tensors_alone():
    rule = rules.by_group(
        {
            "matrix": rules.learned_sgd(0.1, per="tensor"),
            "vector": rules.learned_sgd(0.2, per="parameter"),
        },
        rules.matrix_or_vector,
    )
    weights = rule.init(jax.random.key(0), PARAMS)
    shapes = {k: [x.shape for x in jax.tree.leaves(w)] for k, w in weights.items()}
    assert shapes == {"matrix": [()], "vector": [(3,)]}
    updates = one_update(rule.bind(weights))
    np.testing.assert_allclose(updates["w"], -0.03 * np.ones((2, 3)), rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -0.06 * np.ones(3), rtol=1e-6)


def test_labels_by_shape_and_path():
    params = {
        "Conv_0": {"kernel": jnp.zeros((3, 3, 1, 2)), "bias": jnp.zeros(2)},
        "out": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)},
        "stem": jnp.zeros((3, 1, 2)),  # along one axis
        "scale": jnp.zeros(()),
    }
    label = jax.tree_util.tree_map_with_path
    assert label(rules.conv_or_dense, params) == {
        "Conv_0": {"kernel": "conv", "bias": "conv"},
        "out": {"kernel": "dense", "bias": "dense"},
        "stem": "conv",
        "scale": "dense",
    }
    assert label(rules.matrix_or_vector, params) == {
        "Conv_0": {"kernel": "matrix", "bias": "vector"},
        "out": {"kernel": "matrix", "bias": "vector"},
        "stem": "matrix",
        "scale": "vector",
    }


def test_a_label_without_a_rule_is_refused():
    rule = rules.by_group({"matrix": rules.learned_sgd()}, rules.matrix_or_vector)
    with pytest.raises(ValueError, match=r"calls \['b'\] 'vector', which has no rule"):
        rule.init(jax.random.key(0), PARAMS)
    with pytest.raises(ValueError, match="needs at least one rule"):
        rules.by_group({}, rules.matrix_or_vector)


# -- saving ----------------------------------------------------------------------------


def test_what_cannot_be_saved_is_refused_and_leaves_the_old_file(file):
    before = file.read_bytes()
    good = params_of("l2l")
    bad_params = {
        r"params\['output'\]\['bias'\] is missing in place of \(\)": {
            **good,
            "output": {"kernel": good["output"]["kernel"]},
        },
        r"params\['output'\]\['kernel'\] is \(3,\) in place of \(2,\)": {
            **good,
            "output": {**good["output"], "kernel": jnp.zeros(3)},
        },
        r"params\['output'\]\['bias'\] holds what is not a finite number": {
            **good,
            "output": {**good["output"], "bias": jnp.float32(np.nan)},
        },
    }
    for message, params in bad_params.items():
        with pytest.raises(ValueError, match=message):
            rules.save_rule(file, SPECS["l2l"], params)
    with pytest.raises(ValueError, match=r"info= must be JSON"):
        rules.save_rule(file, SPECS["l2l"], good, info={"a": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"spec= must be JSON"):
        rules.save_rule(file, {"rule": "l2l", "p": np.float64}, good)
    with pytest.raises(ValueError, match="the spec makes no rule that runs"):
        rules.save_rule(file, {**SPECS["l2l"], "output_scale": "ten"}, good)
    assert file.read_bytes() == before
    missing = file.parent / "missing" / "rule.npz"
    with pytest.raises(
        FileNotFoundError, match=r"rule\.npz cannot .*: make its folder"
    ):
        rules.save_rule(missing, SPECS["l2l"], good)


def test_a_rule_tied_to_one_model_is_refused(tmp_path):
    spec = {"rule": "learned_sgd", "per": "tensor"}
    params = rules.build_rule(spec).init(jax.random.key(0), PARAMS)
    with pytest.raises(ValueError, match="for each tensor belong to one model"):
        rules.save_rule(tmp_path / "x.npz", spec, params)


def test_half_precision_parameters_are_saved_in_full(tmp_path):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params_of("l2l"))
    saved = rules.load_rule(rules.save_rule(tmp_path / "x.npz", SPECS["l2l"], half))
    tiny.assert_equal(saved.params, jax.tree.map(lambda w: w.astype(jnp.float32), half))


# -- bad files -------------------------------------------------------------------------


def rewrite(path: Path, change, *, arrays=None, compress=False) -> None:
    """Write the file again, its header changed, all sums of the zip being right."""
    with np.load(path) as data:
        members = dict(data)
    header = json.loads(members.pop("header").tobytes())
    change(header)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    members = {"header": np.frombuffer(text, np.uint8), **members, **(arrays or {})}
    (np.savez_compressed if compress else np.savez)(path, **members)


@pytest.mark.fault("a rule file that is none (pickles, bombs, wrong JSON)")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format=2), r"rule.npz was written by a newer metalstm"),
        (lambda h: h.update(features=99), r"features 99; .*: upgrade metalstm"),
        (lambda h: h.update(features=0), r"was trained on features 0 .*train it again"),
        (lambda h: h.update(format="x"), r"has a header that cannot be read"),
        (lambda h: h.pop("format"), r"has a header that cannot be read \('format'\)"),
        (lambda h: h.update(pad="x" * 2**20), r"cannot be read \(more than 1048576"),
        (lambda h: h.pop("spec"), r"has a header without spec"),
        (lambda h: h.update(sha256=3), r"has a header without sha256"),
        (lambda h: h["spec"].update(p=5.0), r"is damaged \(its digest does not match"),
        (lambda h: h["info"].update(limits=[]), r"is damaged \(its digest"),
    ],
)
def test_a_changed_header_is_noticed(file, change, message):
    rewrite(file, change)
    with pytest.raises(ValueError, match=message):
        rules.load_rule(file)


@pytest.mark.fault("a rule file that is none (pickles, bombs, wrong JSON)")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"rule": "l2l", "hidden_size": 10**6}, r"holds no usable rule: the file and"),
        ({"rule": "l2l", "hidden_size": 2, "num_layers": 10**9}, r"choose 1 to 16"),
        ({"rule": "l2l", "hidden_size": 2, "output_scale": "os"}, r"makes no rule"),
        ({"rule": "eval"}, r"holds no usable rule: there is no rule 'eval'"),
    ],
)
def test_a_file_signed_with_another_spec_is_refused(file, spec, message):
    arrays = {k: v for k, v in np.load(file).items() if k != "header"}

    def change(header):
        header["spec"] = spec
        header["sha256"] = digest_of([spec, header["info"]], arrays)

    rewrite(file, change)
    with pytest.raises(ValueError, match=message):
        rules.load_rule(file)


@pytest.mark.fault("a rule file that is none (pickles, bombs, wrong JSON)")
def test_other_files_are_refused_by_name(tmp_path, file):
    with pytest.raises(
        FileNotFoundError, match=r"no rule file .*absent.npz: save_rule"
    ):
        rules.load_rule(tmp_path / "absent.npz")
    other = tmp_path / "other.npz"
    np.savez(other, weights=np.zeros(3, np.float32))
    with pytest.raises(
        ValueError, match=r"other.npz is not a rule file: it has no hea"
    ):
        rules.load_rule(other)
    np.savez(other, weights=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"an array is of object.*write it with save_"):
        rules.load_rule(other)
    rewrite(file, lambda header: None, compress=True)
    with pytest.raises(ValueError, match=r"it is compressed"):
        rules.load_rule(file)


@pytest.mark.fault("a rule file that is none (pickles, bombs, wrong JSON)")
def test_sizes_and_names_are_checked_before_anything_is_read(tmp_path):
    path = tmp_path / "big.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", bytes(65 * 2**20))
    with pytest.raises(ValueError, match="holds more than 64 MiB"):
        rules.load_rule(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"")
        archive.writestr("a", b"")
    with pytest.raises(ValueError, match="two of its arrays have one name"):
        rules.load_rule(path)
    text = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        text, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", text.getvalue())
    with pytest.raises(ValueError, match="cut short or damaged"):
        rules.load_rule(path)
    text = io.BytesIO()
    np.lib.format.write_array(text, np.zeros(2), version=(2, 0))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", text.getvalue())
    with pytest.raises(ValueError, match="a layout that is never written"):
        rules.load_rule(path)


@pytest.mark.fault("a rule file that is none (pickles, bombs, wrong JSON)")
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_noticed(file, share):
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        ValueError, match=r"rule.npz is not a rule file, or is cut short"
    ):
        rules.load_rule(file)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_damage_is_noticed_or_harmless(file, data):
    """Bytes changed, cut out or put in: a ValueError, or the same rule."""
    whole = _pristine()
    position = data.draw(st.integers(0, len(whole) - 1))
    length = data.draw(st.integers(0, 40))
    middle = data.draw(st.binary(max_size=40))
    file.write_bytes(whole[:position] + middle + whole[position + length :])
    with contextlib.suppress(ValueError):
        saved = rules.load_rule(file)
        assert (saved.spec, saved.info) == (SPECS["l2l"], INFO)
        tiny.assert_equal(saved.params, params_of("l2l"))


@functools.cache
def _pristine() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rule.npz"
        rules.save_rule(path, SPECS["l2l"], params_of("l2l"), info=INFO)
        return path.read_bytes()


# -- shipped rules ---------------------------------------------------------------------


def test_pretrained_lists_and_loads_what_is_there(tmp_path):
    assert metalstm.pretrained_optimizer(directory=tmp_path / "none") == ()
    with pytest.raises(ValueError, match=r"rule 'x' in .*: give another directory"):
        metalstm.pretrained_optimizer("x", directory=tmp_path)
    info = {"trained_on": "quadratics", "limits": "10 dimensions", "cost": "2 x Adam"}
    rules.save_rule(tmp_path / "b.npz", SPECS["l2l"], params_of("l2l"), info=info)
    rules.save_rule(tmp_path / "a.npz", SPECS["l2l"], params_of("l2l"))
    # what a write leaves that is killed
    (tmp_path / ".part-0a1b2c3d-a.npz").write_bytes(b"half")
    assert metalstm.pretrained_optimizer(directory=tmp_path) == (
        metalstm.RuleCard("a", "not stated", "not stated", "not stated"),
        metalstm.RuleCard("b", "quadratics", "10 dimensions", "2 x Adam"),
    )
    expected = one_update(rules.build_rule(SPECS["l2l"]).bind(params_of("l2l")))
    tiny.assert_equal(
        one_update(metalstm.pretrained_optimizer("b", directory=tmp_path)), expected
    )
    shipped = metalstm.load_rule("gates-v1")
    assert shipped.spec == {"rule": "moment_gates", "hidden_size": 8}
    with pytest.raises(FileNotFoundError, match="of the package are gates-v1, l2l-mni"):
        metalstm.load_rule("gates-v2")
    with pytest.raises(ValueError, match=r"rule 'c' in .*: choose from a, b"):
        metalstm.pretrained_optimizer("c", directory=tmp_path)


def test_every_shipped_rule_is_described_and_does_without_the_loss():
    for card in metalstm.pretrained_optimizer():
        assert "not stated" not in card, f"{card.name}: info lacks a field"
        tx = metalstm.pretrained_optimizer(card.name)
        updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
