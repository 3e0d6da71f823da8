"""A few rounds of the fuzzers, and what longer runs of them have found."""

from __future__ import annotations

import json
import os
import re

import fuzz
import pytest

import metalstm
from experiments.few_shot import command_line
from experiments.few_shot.options import Config, from_json, to_json
from experiments.learned_optimizer import options as optimizers

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


def saved(folder, change, config=None):
    document = {"config": to_json(config or Config()), "methods": {}, "data": {}}
    change(document["config"])
    (folder / "config.json").write_text(json.dumps(document))
    return ["--evaluate", str(folder)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["data"].update(way="five"), r"has --way 'five', which is not int"),
        (lambda c: c["data"].update(way=True), r"has --way True, which is not int"),
        (lambda c: c["data"].update(way=[5]), r"has --way \(5,\), which is not int"),
        (
            lambda c: c["learner"].update(widths=[4, "x"]),
            r"--widths \(4, 'x'\), which is not tuple\[int, ...\]",
        ),
        (
            lambda c: c["rule"].update(forget_bias=[4]),
            r"--forget-bias \(4,\), which is not tuple\[float, float\]",
        ),
        (
            lambda c: c["methods"].update(order="third"),
            r"--order 'third', which is not Literal\['first', 'second'\]",
        ),
        (lambda c: c["run"].update(workdir=3), r"--workdir 3, which is not .*Path"),
        (lambda c: c.update(budget=7), r"config.json has budget=7 and no options"),
        (lambda c: c.update(own=0.5), r"has --own 0.5, which is not dict"),
        (lambda c: c.update(own={"maml": 3}), r"has maml=3 and no options"),
        (
            lambda c: c.update(own={"maml": {"way": "x"}}),
            r"has --way 'x', which is not int",
        ),
    ],
)
def test_options_of_another_type_are_refused_by_name(tmp_path, change, message):
    """Fuzzing few_shot_config: TypeError and AttributeError further on."""
    with pytest.raises(ValueError, match=message):
        command_line.parse(saved(tmp_path, change))


def test_options_of_an_optimizers_run_likewise(tmp_path):
    """Fuzzing optimizer_config: TypeError from comparing with a number."""
    line = saved(
        tmp_path, lambda c: c["problem"].update(batch_size={}), optimizers.Config()
    )
    with pytest.raises(ValueError, match=r"has --batch-size \{\}, which is not int"):
        optimizers.parse(line)


@pytest.mark.parametrize(
    ("parse", "line"),
    [
        (command_line.parse, "--clip nan"),
        (command_line.parse, "--forget-bias nan 5"),
        (optimizers.parse, "--clip nan"),
        (optimizers.parse, "--output-scale nan"),
    ],
)
def test_what_is_no_number_is_refused(parse, line):
    """Fuzzing flags: NaN is neither below nor above any limit, and passed them all."""
    with pytest.raises(ValueError, match=rf"{line.split()[0]} .*nan.*: give a number"):
        parse(line.split())


def test_options_survive_their_file_and_null_keeps_a_default():
    config = Config()
    document = to_json(config)
    assert from_json(document) == config
    document["learner"]["widths"] = [3, 4]
    document["data"] |= {"data_dir": "a/b", "way": None, "of_another_version": 1}
    document["budget"]["learning_rate"] = 1  # JSON of some writers has no 1.0
    found = from_json(document)
    assert found.learner.widths == (3, 4)
    assert str(found.data.data_dir) == "a/b"
    assert found.data.way == config.data.way
    assert found.budget.learning_rate == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("methods"), r"config.json is damaged \(KeyError: 'methods'\)"),
        (lambda d: d.update(methods={}), r"damaged \(no methods, or sizes that cannot"),
        (lambda d: d.update(data=3), r"config.json is damaged \(TypeError"),
        (lambda d: d["data"].update(image_shape=[3, -3, 1]), r"sizes that cannot be"),
        (lambda d: d["data"].update(normalise=[[0.5], [0]]), r"sizes that cannot be"),
        (lambda d: d["methods"]["scratch"].update(way="2"), r"sizes that cannot be"),
        (
            lambda d: d["methods"]["scratch"].pop("learner"),
            r"config.json makes no scratch \(KeyError: 'learner'\)",
        ),
        (
            lambda d: d["methods"]["scratch"]["learner"]["options"].update(widths="x"),
            r"config.json makes no scratch \(\w+",
        ),
    ],
)
def test_a_damaged_run_is_no_predictor(tmp_path, change, message):
    """Fuzzing run_folder: KeyError, TypeError and what flax makes of wrong options."""
    document = json.loads((fuzz._good_run() / "config.json").read_text())
    change(document)
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "checkpoints").symlink_to(fuzz._good_run() / "checkpoints")
    with pytest.raises(ValueError, match=message):
        metalstm.load_run(tmp_path, "scratch" if document.get("methods") else None)


def test_the_fuzzers_run_is_sound():
    folder = fuzz._good_run()
    assert metalstm.load_run(folder).method == "prototypical"
    assert metalstm.load_run(folder, "scratch").way == 2
