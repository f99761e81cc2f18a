"""Which control of length gives how much accuracy for how many tokens, on the same base?"""
