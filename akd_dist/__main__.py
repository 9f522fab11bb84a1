"""`python -m akd_dist`, the same as `akd-dist`."""

from akd_dist.cli import main

main()
