"""The outer loop: meta-steps, the loop around them, seeds, evaluation."""
