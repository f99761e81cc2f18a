"""Tables of rehearsals, and what they are worth: predictions beside measurements."""
