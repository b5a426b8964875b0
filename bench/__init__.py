"""Measurements with the clock: never a test, always a result file. See `python -m bench --help`."""
