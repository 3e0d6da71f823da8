"""Few-shot learning: meta-train, meta-test, compare."""
