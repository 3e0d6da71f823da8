"""A few rounds of the fuzzers, and what longer runs of them have found."""

from __future__ import annotations

import json
import os
import re

import fuzz
import pytest

import metalstm
from experiments.common.saved_options import to_json
from experiments.few_shot import command_line
from experiments.learned_optimizer import command_line as optimizers
from experiments.learned_optimizer.options import Config

ROUNDS = int(os.environ.get("METALSTM_FUZZ_ROUNDS", "0"))
QUICK = {
    "rule_bytes": 40,
    "rule_spec": 40,
    "run_folder": 5,
}  # those that build a command line: slower


@pytest.mark.parametrize("target", fuzz.TARGETS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of huge numbers, before refusal
def test_random_input_is_read_or_refused(target):
    findings = list(fuzz.rounds(target, ROUNDS or QUICK.get(target, 12)))
    assert not findings, "\n".join(f"seed {f.seed}: {f.what}" for f in findings)


@pytest.mark.parametrize(
    ("reader", "expected"),
    [
        (lambda: int("x"), "names no file or flag"),
        (lambda: {}["x"], "KeyError"),
        (lambda: __import__("os").system("true"), r"did more than read: .*os.system"),
        (lambda: open(os.devnull, "w").close(), r"did more than read: .*null"),
    ],
)
def test_the_fuzzer_notices(reader, expected, monkeypatch):
    def target(rng, folder):
        fuzz.reading(reader, folder)

    monkeypatch.setitem(fuzz.TARGETS, "bad", target)
    (finding,) = fuzz.rounds("bad", 1)
    assert re.search(expected, finding.what)


# -- found -----------------------------------------------------------------------------


def saved(folder, change, config):
    document = {"config": to_json(config), "methods": {}, "data": {}}
    change(document["config"])
    (folder / "config.json").write_text(json.dumps(document))
    return ["--evaluate", str(folder)]


def put(document, path, value):
    *groups, last = path.split(".")
    for group in groups:
        document = document[group]
    document[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data.way", "five", r"`int`, got `str` - at `\$.data.way`"),
        ("data.way", True, r"`int`, got `bool` - at `\$.data.way`"),
        ("data.way", 1, r"`int` >= 2 - at `\$.data.way`"),
        ("run.workdir", 3, r"3 is not a \w*Path - at `\$.run.workdir`"),
        ("methods.maml.learner.widths", [4, "x"], r"at `\$.learner.widths"),
        (
            "methods.meta-lstm.method.rule.forget_bias",
            [4],
            r"of length 2, got 1 - at `\$.method.rule.forget_bias`",
        ),
        (
            "methods.meta-lstm.method.order",
            "third",
            r"Invalid enum value 'third' - at `\$.method.order`",
        ),
        ("methods.meta-lstm.training", 7, r"`object`, got `int`"),
        ("methods", 0.5, r"no methods that exist \(AttributeError"),
        ("methods.x", {"learner": {"learner": "mlp"}}, r"no methods that .*KeyError"),
        ("methods.maml", 3, r"no methods that exist \(TypeError"),
        ("methods.maml.learner.learner", ["mlp"], r"no methods that exist \(TypeError"),
    ],
)
def test_options_of_another_type_are_refused_by_name(tmp_path, path, value, message):
    """Fuzzing few_shot_config: TypeError and AttributeError further on."""
    options = command_line.parse(
        "--algorithms meta-lstm,maml --maml.learner mlp".split()
    )
    line = saved(tmp_path, lambda config: put(config, path, value), options)
    with pytest.raises(ValueError, match=rf"config.json holds .*{message}"):
        command_line.parse(line)


def test_options_of_an_optimizers_run_likewise(tmp_path):
    """Fuzzing optimizer_config: TypeError from comparing with a number."""
    line = saved(tmp_path, lambda c: c["training"].update(num_tasks={}), Config())
    with pytest.raises(ValueError, match=r"got `object` - at `\$.*num_tasks`"):
        optimizers.parse(line)


@pytest.mark.parametrize(
    ("parse", "line"),
    [
        (command_line.parse, "--clip nan"),
        (command_line.parse, "--forget-bias nan 5"),
        (optimizers.parse, "--clip nan"),
        (optimizers.parse, "--l2l.output-scale nan"),
    ],
)
def test_what_is_no_number_is_refused(parse, line):
    """Fuzzing flags: NaN is neither below nor above any limit, and passed them all."""
    with pytest.raises(ValueError, match=rf"{line.split()[0]} .*nan.*: give a number"):
        parse(line.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("methods"), r"predictors.json is damaged \(KeyError: 'meth"),
        (lambda d: d.update(methods={}), r"damaged \(no methods, or sizes that cannot"),
        (lambda d: d.update(image_shape=3), r"predictors.json is damaged \(TypeError"),
        (
            lambda d: d.update(normalise=[[float("nan")], [1.0]]),
            r"is damaged \(no methods",
        ),
        (
            lambda d: d.update(normalise=[[0.0], [float("inf")]]),
            r"is damaged \(no methods",
        ),
        (lambda d: d.update(image_shape=[3, -3, 1]), r"sizes that cannot be"),
        (lambda d: d.update(normalise=[[0.5], [0]]), r"sizes that cannot be"),
        (lambda d: d.update(format_version=2), r"has format_version=2, and this metal"),
        (
            lambda d: scratch(d)["learner"].update(num_classes="2"),
            r"sizes that cannot be",
        ),
        (
            lambda d: scratch(d).pop("learner"),
            r"predictors.json makes no scratch \(\w+",
        ),
        (
            lambda d: scratch(d)["learner"].update(widths="x"),
            r"predictors.json makes no scratch \(\w+",
        ),
    ],
)
def test_a_damaged_run_is_no_predictor(tmp_path, change, message):
    """Fuzzing run_folder: KeyError, TypeError and what flax makes of wrong options."""
    document = json.loads((fuzz._good_run() / "predictors.json").read_text())
    change(document)
    (tmp_path / "predictors.json").write_text(json.dumps(document))
    (tmp_path / "checkpoints").symlink_to(fuzz._good_run() / "checkpoints")
    with pytest.raises(ValueError, match=message):
        metalstm.load_run(tmp_path, "scratch" if document.get("methods") else None)


def scratch(document):
    return document["methods"]["scratch"]["spec"]


def test_the_fuzzers_run_is_sound():
    folder = fuzz._good_run()
    assert metalstm.load_run(folder).method == "prototypical"
    assert metalstm.load_run(folder, "scratch").way == 2
