"""Speed relative to other libraries and to the machine's limit."""
