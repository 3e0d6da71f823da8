"""Three scripts to read in a sitting, and to copy."""
