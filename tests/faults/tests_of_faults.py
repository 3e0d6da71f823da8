"""The tests that feed bad input, counted by the fault that they are marked with."""

from __future__ import annotations

from pathlib import Path

import pytest

from .outcomes import Outcome

TESTS = Path(__file__).parents[1]


class _Count:
    """A pytest plugin: outcomes by the name in ``@pytest.mark.fault(name)``."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.fault_of: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            mark = item.get_closest_marker("fault")
            if mark is not None:
                self.fault_of[item.nodeid] = mark.args[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = self.fault_of.get(report.nodeid)
        if name is None or not (report.when == "call" or report.failed):
            return
        means = "refused and named, or counted and omitted on request (tests)"
        outcome = self.outcomes.setdefault(name, Outcome(name, means))
        outcome.tried += 1
        if report.failed:
            outcome.lost.append(report.nodeid)


def run_tests() -> list[Outcome]:
    """Run the marked tests in this process."""
    count = _Count()
    arguments = ["-q", "-m", "fault", "-p", "no:cacheprovider", "-p", "no:randomly"]
    status = pytest.main([*arguments, str(TESTS)], plugins=[count])
    if not count.outcomes or status not in (0, 1):
        raise RuntimeError(f"the marked tests did not run: status {status}")
    return list(count.outcomes.values())
