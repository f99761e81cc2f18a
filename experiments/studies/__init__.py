"""Questions answered by runs of this repository, each with its command, numbers and verdict."""
