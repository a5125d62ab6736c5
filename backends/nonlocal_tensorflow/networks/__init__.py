"""Non-local blocks in networks: put in, taken out, and looked at."""
