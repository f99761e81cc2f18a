"""What `experiments.make_base` makes: the tasks that base policies learn, and their models."""
