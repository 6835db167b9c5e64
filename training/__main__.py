"""`python -m training` is `sidrec-train`."""

from training.cli import main

main()
