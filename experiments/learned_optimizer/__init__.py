"""Learned optimizers: meta-train a rule and compare it with tuned ones."""
