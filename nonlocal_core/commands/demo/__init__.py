"""The main job, `nonlocal demo`: denoise a photograph over all pairs of its pixels; needs the extra "demo"."""
