"""What a block costs, counted from sizes alone."""

from nonlocal_core.costs.model import Cost, MethodCost, cost

__all__ = ["Cost", "MethodCost", "cost"]
