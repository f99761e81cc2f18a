"""Does the age of responses bias their length, and which correction takes it back?"""
