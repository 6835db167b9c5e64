"""Offline: interactions and item text → one bundle. Never imports `service`."""

import os

# With libgomp's default, two threads spin while they wait for each other, and on two busy cores that makes training
# up to ten times slower. OpenMP reads this once, when torch loads, so it is set before any stage can import torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
