"""Methods that pre-train a classifier, then compare or fine-tune."""
