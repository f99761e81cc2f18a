"""The machine that a run is on: its processes and its files."""
