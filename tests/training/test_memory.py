"""What a process of its own does with memory that it has freed, since it is all of a process that is changed."""

import ctypes
import os
import subprocess
import sys

import pytest

PAGE_FAULTS = """
import resource
import sys
import torch
from training.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
torch.set_num_threads(1)
for _ in range(3):  # as steps do: tensors of four megabytes, freed before the next ones are made
    kept = [torch.ones(1 << 20) for _ in range(32)]
    del kept
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    kept = [torch.ones(1 << 20) for _ in range(32)]
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    # glibc's own limit, which it otherwise moves with what is freed: by how much is a matter of luck.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    run = subprocess.run([sys.executable, "-c", PAGE_FAULTS, how], capture_output=True, text=True, check=True, env=env)
    return int(run.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the heap is not glibc's, and nothing is done")
def test_freed_memory_is_used_again_without_new_pages():
    assert page_faults("keep") < 100
    assert page_faults("as ever") > 10_000
