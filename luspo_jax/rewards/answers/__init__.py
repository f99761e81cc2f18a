"""Reading answers: what a response states, as numbers, sets, formulas or words, and equality."""
