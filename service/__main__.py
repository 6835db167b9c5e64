"""`python -m service` is `sidrec-serve`."""

from service.cli import main

main()
