"""What a person starts and sees: the command line, the quickstart and the report."""
