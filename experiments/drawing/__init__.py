"""Figures of runs, sweeps and studies: what is drawn, apart from where it is read."""
