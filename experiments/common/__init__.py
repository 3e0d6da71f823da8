"""What all commands share: the run folder, the loop, tables, devices."""
