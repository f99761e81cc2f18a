"""Trackers of experiments: services and files that show a run's numbers; one module each."""
