"""What any command prints under `--json` when it refuses."""

from akd_dist.documents.base import Document


class Refusal(Document):
    """Why a command refused."""

    code: int
    """The exit code."""
    what: str
    """What is wrong, with the name of the thing."""
    got: str | None
    """What was found."""
    expected: str | None
    """What would have been right."""
    next: str | None
    """What to do about it."""


class ErrorDocument(Document):
    """What a command prints with --json when it refuses."""

    error: Refusal
    """The refusal."""
