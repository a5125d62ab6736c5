"""The ways to sum over keys, y_i = sum_j w_ij g_j.

Each takes theta (B, N, C'), phi (B, M, C'), g (B, M, D), the form, and `valid` (B, M), True where a key takes part, or
None where all do. Phi and g are 0 where it is False. The sums are at least float32.
"""
