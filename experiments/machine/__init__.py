"""A machine's checkup: kernels against plain formulas, rates, and what a run should set there."""
