"""Train one student in this process, and print the most memory that it had: what the planner's estimate is held to."""

import re
import sys
from pathlib import Path

from akd_dist.jobs.train_students import train_in_process
from akd_dist.recipe import load_recipe

if __name__ == "__main__":
    recipe, root = Path(sys.argv[1]), Path(sys.argv[2])
    train_in_process(load_recipe(recipe), {}, run=root / recipe.stem, cache_root=str(root / "cache"))
    # Not getrusage: after a fork that one starts from what the parent had.
    status = Path("/proc/self/status").read_text()
    print(1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]))
