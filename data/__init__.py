"""Builds shards: `prepare.py` and one recipe per data set family."""
