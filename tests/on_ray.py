"""`akd-dist` as for fleets that train for long, whose cohorts are Ray Train runs: `python -m tests.on_ray COMMAND ...`.

Fleets as small as those of tests are otherwise trained by processes of this machine, which no raylet watches over.
"""

from akd_dist.cli import main
from akd_dist.jobs.planning import plan

if __name__ == "__main__":
    plan.RAY_PAYS_SECONDS = 0.0
    main()
