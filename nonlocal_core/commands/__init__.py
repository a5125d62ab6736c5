"""The command line program `nonlocal` and the commands that need the core alone."""
