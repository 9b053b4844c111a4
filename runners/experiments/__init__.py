"""Published systems of structured pruning, each reproduced by one command."""
