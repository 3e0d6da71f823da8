"""One file a study: claim, paper, command, cost, expected figure."""
