"""Methods that embed and compare."""
