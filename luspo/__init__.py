"""The installed program `luspo`: a door to the launchers of `experiments`."""
