"""What a run meets outside: machines and processes, files, and the values that people give."""
