"""Tables of rehearsals and their accuracy: predictions beside measurements."""
