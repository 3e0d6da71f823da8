"""The table of few_shot, and the published numbers next to ours."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from experiments.few_shot import methods, published, results
from experiments.few_shot.command_line import parse
from experiments.few_shot.options import Data
from metalstm.meta.evaluation import Evaluation


def reference(method, batch_norm="support", *, dataset="omniglot", shot=1, **options):
    data = Data(dataset=dataset, shot=shot, **options)
    return published.published_reference(method, data, batch_norm)


def test_published_numbers_carry_their_protocol():
    for (dataset, way, shot), entries in published.read_published().items():
        assert dataset in ("omniglot", "mini-imagenet")
        assert way in (5, 20)
        assert shot in (1, 5)
        assert entries.keys() <= methods.METHODS.keys()
        for numbers in entries.values():
            for number in numbers:
                assert 20 < number.value < 100, "per cent"
                assert number.source


def test_the_nearest_protocol_is_next_to_ours():
    # Finn's own is of other characters and transductive; ours is neither
    ours = reference("maml")
    assert (ours.number.value, ours.other, ours.unknown) == (91.8, (), ("split",))
    transductive = reference("maml", "transductive", split="characters")
    assert (transductive.number.value, str(transductive)) == (98.7, "98.7")
    assert str(reference("reptile")) == "95.4*"
    assert reference("reptile").other == ("split 1,200 / 423 characters",)
    assert str(reference("reptile", "transductive", split="characters")) == "97.7*"
    assert str(reference("prototypical", "frozen")) == "98.2~"
    assert str(reference("finetune-all", "frozen")) == "82.0-86.0~?"
    mini = reference("meta-lstm", dataset="mini-imagenet")
    assert str(mini) == "43.44 ± 0.77"
    assert (
        str(reference("meta-lstm", "transductive", dataset="mini-imagenet"))[-1] == "*"
    )
    for absent in ({"shot": 3}, {"dataset": "glyphs"}, {"way": 7}):
        assert reference("maml", **absent) is None
    assert reference("sgd") is None


def rows(names=("maml", "meta-lstm")):
    found = []
    for index, name in enumerate(names):
        difference = None if name == "meta-lstm" else (-0.1234, 0.0123)
        spent = {"episodes": 123_456, "wall_seconds": 4_321.7} if index % 2 else {}
        evaluation = Evaluation(np.zeros(2), 0.98765, 0.00432, "support", "test", 0)
        one = results.Tested(name, name, evaluation, "support", 112_234, spent)
        found.append(results.Row(one, difference, reference(name, "support")))
    return found


def test_the_terminal_table_fits_and_explains_its_marks():
    names = tuple(methods.METHODS)
    whole = results.table_of("meta-test", "meta-lstm", rows(names))
    lines = str(whole).splitlines()
    assert max(map(len, lines)) <= 110
    cells = next(line for line in lines if line.split()[0] == "fomaml").split("  ")
    cells = [cell.strip() for cell in cells if cell.strip()]
    assert cells[:4] == ["fomaml", "98.8 ± 0.4", "-12.3 ± 1.2", "98.3*"]
    assert cells[4:] == ["support", "112,234", "123,456", "4,322"]
    legend = "\n".join(whole.notes)
    assert "* other protocol: transductive (meta-lstm, fomaml); split 1,1" in legend
    assert "split 1,200 / 423 characters (reptile)" in legend
    assert "~ not stated: split (meta-lstm, maml" in legend
    assert "? unconfirmed: quoted (relation" in legend
    assert "Nichol et al. 2018 (reptile)" in legend
    unpublished = [row._replace(published=None) for row in rows(names)]
    assert results.table_of("", "", unpublished).notes == []


def test_markdown_and_csv(tmp_path):
    whole = results.table_of("meta-test", "meta-lstm", rows())
    assert whole.write(tmp_path) == ["table.md", "table.csv"]
    text = (tmp_path / "table.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [cell.strip() for cell in lines[-1].split("|")[1:7]]
    assert cells == [
        "meta-lstm", "98.8 ± 0.4", "", "94.7\\*\\~", "support", "112,234"
    ]  # fmt: skip
    assert {line.count("|") for line in lines} == {9}
    with open(tmp_path / "table.csv", newline="") as file:
        maml, meta_lstm = csv.DictReader(file)
    assert float(maml["difference"]) == -0.1234
    assert meta_lstm["difference"] == ""
    assert maml["published_percent"] == "91.8"
    assert maml["published_marks"] == "~"
    assert maml["meta_training_seconds"] == ""
    assert meta_lstm["meta_training_episodes"] == "123456"
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "table.csv"}


def test_whom_the_others_are_compared_with():
    assert results.compared_with(["maml", "meta-lstm"]) == "meta-lstm"
    assert results.compared_with(["maml", "anil"]) == "maml"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {"maml": "support", "prototypical": "frozen", "nearest-neighbour": None}),
        ("--norm layer", {"maml": None, "prototypical": None}),
        ("--learner mlp", {"maml": None}),
    ],
)
def test_the_batch_norm_mode_of_a_method(line, expected):
    specs = methods.specs_of(parse(["--algorithms", *expected, *line.split()]))
    for name, mode in expected.items():
        assert results.batch_norm_of(specs[name], mode or "support") == mode
