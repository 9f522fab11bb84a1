"""`python -m akd_dist.cli`, the same as `akd-dist` and `python -m akd_dist`."""

from akd_dist.cli import main

if __name__ == "__main__":
    main()
