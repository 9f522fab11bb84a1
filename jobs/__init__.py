"""The jobs floor: the plain functions of `akd_dist`, run as Ray tasks and Ray Train workers.

Import it as `akd_dist.jobs`. This floor knows ray; it is the only one that does.
"""

if __name__ == "jobs":
    raise ImportError("import akd_dist.jobs, not jobs: one module must have one name")
