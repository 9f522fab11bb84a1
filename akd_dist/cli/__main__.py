"""`python -m akd_dist.cli`, the same as `akd-dist`."""

from akd_dist.cli import main

main()
