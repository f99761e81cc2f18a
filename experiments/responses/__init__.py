"""Shows the responses of a run's steps, in the terminal or as a page of HTML."""
