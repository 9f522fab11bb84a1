"""What the pages of runs share: their templates, and whose logits a balance is of."""

from pathlib import Path
from typing import Any

from akd_dist.base.formatting import amount, duration, percent, seconds
from akd_dist.documents.fleet import Economics


def template(name: str) -> Any:
    """A template of `templates/`, by its file's name; what it is given is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, seconds=seconds, duration=duration, amount=amount)
    return environment.get_template(name)


def owner(balance: Economics) -> str:
    """Whose logits a balance is of."""
    return f"{balance.role}, {balance.model}"
