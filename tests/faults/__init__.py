"""Faults made on purpose, and what survived: ``python -m tests.faults``, `make faults`.

Every fault is tried many times. A trial survives when what was saved before the fault
is there bit for bit (or the newer version is, whole), what was refused was refused with
words, and work is resumed as if nothing had happened. Anything else is lost, and named.
"""
