"""Where the clients run: a pure function from (configuration, sizes, machine) to a plan."""

from fedsim.placement.machine import Node, local_node
from fedsim.placement.plan import Plan, Size, capacity, make_plan

__all__ = ["Node", "Plan", "Size", "capacity", "local_node", "make_plan"]
