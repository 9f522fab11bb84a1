"""`python -m akd_dist`, the same as `akd-dist`."""

import sys
from pathlib import Path

# As for the console script: libraries look for modules that may be missing, and would run those of the working
# directory, which `python -m` puts first. The directory that akd-dist itself was found in stays.
if sys.path[0] in ("", str(Path.cwd())) and not (Path(sys.path[0]) / "akd_dist").is_dir():
    del sys.path[0]

from akd_dist.cli import main

if __name__ == "__main__":
    main()
