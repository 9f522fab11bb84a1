"""`akd-dist` as where no process of this machine may do the work: on a Ray of its own: `python -m tests.on_ray ...`.

Fleets as small as those of tests start none otherwise, and no raylet watches over their workers.
"""

from akd_dist.cli import main
from akd_dist.jobs import idle

if __name__ == "__main__":
    idle.may_work_here = lambda *_: False
    main()
