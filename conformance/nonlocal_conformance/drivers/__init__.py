"""The drivers: how the suite speaks to each backend, in NumPy arrays with channels last."""
