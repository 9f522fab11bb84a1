"""Real text that every machine has: passages of Python's standard library, each with the package it comes from.

python -m akd_dist.jobs.stdlib_texts texts.parquet
"""

import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

PACKAGES = (
    "asyncio",
    "concurrent",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "xml",
)
LINES = 6
LEAST_CHARACTERS = 80


def passages(package: Path) -> Iterator[str]:
    """LINES lines at a time of every module of a package, in the order of their names; blank lines left out."""
    for module in sorted(package.rglob("*.py")):
        lines = iter([line for line in module.read_text("utf-8").splitlines() if line.strip()])
        while passage := "\n".join(itertools.islice(lines, LINES)):
            if len(passage) >= LEAST_CHARACTERS:
                yield passage


def corpus() -> pa.Table:
    """The columns `text` and `package`, each passage once; it depends on the version of Python alone."""
    library = Path(sysconfig.get_paths()["stdlib"])
    package_of = {text: package for package in PACKAGES for text in passages(library / package)}
    return pa.table({"text": list(package_of), "package": list(package_of.values())})


@click.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
def main(path: Path) -> None:
    """Write the passages to PATH, a Parquet file."""
    table = corpus()
    pq.write_table(table, path)
    click.echo(f"{path}: {len(table):,} passages of {len(PACKAGES)} packages")


if __name__ == "__main__":
    main()
