"""The ways to compute the operation, all exact: each takes theta, phi, g and returns y."""
