"""The parts of ``python -m experiments.learned_optimizer``."""
