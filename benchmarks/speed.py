"""Every row with a target, in one table of ratios; the last part of `make bench`.

    python -m benchmarks.speed            # the rows with a target
    python -m benchmarks.speed --markdown # the same as docs/performance.md has it

Rates are episodes (tasks) or meta-steps per second; a "target" is that of the column
before it. `benchmarks.rows` says what the columns are.
"""

from __future__ import annotations

from benchmarks import episodes, learned_optimizers, rows

if __name__ == "__main__":
    tables = {
        m.__name__: (m.TARGETS, m.TARGETS) for m in (episodes, learned_optimizers)
    }
    rows.run(__doc__, tables)
