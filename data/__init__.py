"""How shards are made: `prepare.py` and one recipe per data set family."""
