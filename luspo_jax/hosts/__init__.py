"""A run's surroundings: machines and processes, files, and the values that users give."""
