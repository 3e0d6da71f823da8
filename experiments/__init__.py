"""One script per result; run as ``python -m experiments.<name> --help``."""
