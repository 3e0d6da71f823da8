"""What runs beneath and around: compilation, sharding, files, checkpoints."""
