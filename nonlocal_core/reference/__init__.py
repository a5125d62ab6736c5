"""The definition, to be read beside the paper; `exact` and `gradients` rest on it."""
