"""Print pip's arguments for the versions that the tests run with on this Python."""

import pathlib
import sys

if sys.version_info < (3, 12):
    name = "py311.txt"
elif sys.version_info < (3, 14):
    name = "py313.txt"
else:
    name = None  # no tested set: the newest that fit pyproject.toml
if name:
    print("-c", pathlib.Path(__file__).with_name(name))
