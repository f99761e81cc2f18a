"""Many runs that differ in a few fields: what they are, running them, comparing them."""
