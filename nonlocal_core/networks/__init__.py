"""Blocks in networks: where they go, how they are put in, what they attend to."""
