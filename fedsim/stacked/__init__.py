"""The stacked engine: the clients of a stack train as one computation, each with the bits it would have alone.

The weights of K clients are one matrix [K, D]; every layer works on views of it. What cannot be computed in one piece
with equal bits is computed client by client: batches are grouped by their length, never padded, and the first time that
a shape occurs, a stack of it is compared with its clients one by one.
"""

from fedsim.stacked.engine import Stacked
from fedsim.stacked.stack import obstacle

__all__ = ["Stacked", "obstacle"]
