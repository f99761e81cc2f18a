"""Tasks and models of the base policies that `experiments.make_base` builds."""
