"""What a run needs of the machines it is on: processes, their guard, and files."""
