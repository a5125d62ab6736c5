"""The ways to sum over keys, y_i = sum_j w_ij g_j.

Each takes theta (B, N, C'), phi (B, M, C') and g (B, M, D), the form, and `valid` (B, M), which says what the keys are;
phi and g are 0 where it is False. The sums are at least float32.
"""
