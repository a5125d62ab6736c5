"""One small network and one task in three frameworks, for the guide "Train with and without"."""
