"""Examples: each runs with `python -m examples.<name>`."""

import os

# Threads that wait for each other sleep instead of spinning: on a machine with more threads than
# free cores, as with three ranks on two cores, spinning is an order of magnitude slower. OpenMP
# reads this when it is loaded, so it is set before anything imports torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
