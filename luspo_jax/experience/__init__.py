"""What a policy did: responses and groups, how they are chosen, measured and prepared."""
