"""Compare two recordings: `compare.py NEW OLD [--all] [--only REGEX]`.

For each entry in both: max |a - b| / (max |b| + 1e-300) over the whole entry, and over
each leaf whose size is at least FLOOR of the entry's (a smaller leaf is rounding: a bias
in front of a batch norm has a gradient of 1e-17). Limits: 1e-9 for float64, 1e-4 for
entries marked float32. `init` and `inputs` entries are compared and listed, but a
difference there is a note, not a failure, since NEW may have started from OLD's
(record.py --start); `--strict-init` makes it one. Checksums (part c) must be equal; where
only a float's last bit may differ, the values are beside them.
Exits 1 if a limit is exceeded or an entry of OLD is missing in NEW.
"""

from __future__ import annotations

import argparse
import json
import re
import sys

import numpy as np

LIMIT = {"float64": 1e-9, "float32": 1e-4, "init": 1e-6}
FLOOR = {"float64": 1e-6, "float32": 1e-3, "init": 1e-6}


def load(path):
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return arrays, json.loads(arrays.pop("__index__").item())


def leaves_of(recording, name):
    arrays, index = recording
    at, out = 0, {}
    for path, shape, dtype in index["entries"][name]["leaves"]:
        size = int(np.prod(shape))
        out[path] = (tuple(shape), arrays[name][at : at + size], dtype)
        at += size
    return out


def relative(a, b):
    if a.size == 0:
        return 0.0
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        out = np.where(same, 0, np.abs(a - b)).max() / (np.abs(b).max() + 1e-300)
    return float(out) if np.isfinite(out) else float("inf")


def compare(new, old, name):
    """-> (difference, worst leaf, tolerance's name, note)"""
    entry = old[1]["entries"][name]
    kind = "init" if "/inputs/" in name else entry.get("tol", "float64")
    a, b = leaves_of(new, name), leaves_of(old, name)
    note = ""
    metrics = name.endswith("|metrics")  # leaves of their own scale, some float32
    if metrics and set(a) != set(b):
        note = f"only in one: {sorted(set(a) ^ set(b))}"
        a, b = ({p: x[p] for p in sorted(set(a) & set(b))} for x in (a, b))
    if set(a) != set(b):
        if [x[0] for x in a.values()] != [x[0] for x in b.values()]:
            only = sorted(set(b) - set(a))[:3], sorted(set(a) - set(b))[:3]
            return float("inf"), "", kind, f"other leaves: old {only[0]} new {only[1]}"
        note = "matched by place, not by name"
        a = dict(zip(b, a.values(), strict=True))
    for path in b:
        if a[path][0] != b[path][0]:
            return float("inf"), path, kind, f"shape {a[path][0]}, was {b[path][0]}"
    if not b:
        return 0.0, "", kind, note
    whole = [np.concatenate([x[p][1] for p in b]) for x in (a, b)]
    worst, where = 0.0 if metrics else relative(*whole), ""
    largest = np.abs(whole[1][np.isfinite(whole[1])]).max(initial=0)
    for path in b:
        size = np.abs(b[path][1]).max(initial=0)
        if metrics or size > FLOOR[kind] * largest:
            own = relative(a[path][1], b[path][1])
            if metrics and kind == "float64" and b[path][2] != "float64":
                own /= 1e3  # the mean of float32 accuracies: a limit of 1e-6
            if own > worst:
                worst, where = own, path
    return worst, where, kind, note


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("new")
    parser.add_argument("old")
    parser.add_argument("--all", action="store_true", help="print every entry")
    parser.add_argument("--only")
    parser.add_argument("--strict-init", action="store_true")
    args = parser.parse_args()
    new, old = load(args.new), load(args.old)
    parts = {n.split("/")[0] for n in new[1]["entries"]}
    names = [n for n in old[1]["entries"] if n.split("/")[0] in parts]
    if args.only:
        names = [n for n in names if re.search(args.only, n)]
    bad, missing, notes, worst, exact = 0, [], 0, {}, 0
    for name in names:
        if name not in new[1]["entries"]:
            missing.append(name)
            continue
        entry = old[1]["entries"][name]
        if "sha256" in entry:
            ours = new[1]["entries"][name]
            same = ours["sha256"] == entry["sha256"]
            shapes = [x[1:3] for x in ours["leaves_sha"]] == [
                x[1:3] for x in entry["leaves_sha"]]
            exact += same
            if not same or not shapes:
                bad += 1
                print(f"BAD  {name}: checksum differs{'' if shapes else ', shapes too'}")
            elif args.all:
                print(f"ok   {name}: same bytes")
            continue
        difference, where, kind, note = compare(new, old, name)
        worst[kind] = max(worst.get(kind, 0), difference)
        exact += difference == 0
        over = difference > LIMIT[kind]
        if over and kind == "init" and not args.strict_init:
            notes += 1
            print(f"note {name}: {difference:.3g} {where} {note}")
        elif over:
            bad += 1
            print(f"BAD  {name}: {difference:.3g} {where} {note}")
        elif args.all or note:
            print(f"ok   {name}: {difference:.3g} {where} {note}")
    failed = {n: e for n, e in new[1]["failures"].items()
              if n not in old[1]["failures"] and (not args.only or re.search(args.only, n))}
    for name, error in failed.items():
        print(f"FAILED in new: {name}: {error}")
    for name in missing[:40]:
        print(f"MISSING in new: {name}")
    if len(missing) > 40:
        print(f"... {len(missing)} missing in all")
    print(f"{len(names)} entries, {exact} bitwise equal, {bad} over the limit, "
          f"{len(missing)} missing, {notes} inits differ; largest difference "
          + ", ".join(f"{k} {v:.3g} (limit {LIMIT[k]:g})" for k, v in worst.items()))
    sys.exit(bool(bad or missing or failed))


if __name__ == "__main__":
    main()
