"""Speed against other libraries and against what the machine can do."""
