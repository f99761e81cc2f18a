"""What the mathematical verifier is tried on: changed and rewritten golds, and who judges them."""
