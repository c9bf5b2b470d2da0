"""Where the clients run: a pure function from (configuration, sizes, machine) to a plan."""

from fedsim.placement.limits import capacity
from fedsim.placement.machine import Node, cpu_node, local_node
from fedsim.placement.plan import Plan, Size, make_plan

__all__ = ["Node", "Plan", "Size", "capacity", "cpu_node", "local_node", "make_plan"]
