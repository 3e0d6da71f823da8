"""Methods that adapt a learner by gradient steps."""
