"""What object storage refuses, as a message that says what to do: by the code of its answer."""

import re

from akd_dist.base.errors import MachineError
from akd_dist.storage.objects import storage_error

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if they came with one, AWS_SESSION_TOKEN on this machine"
)
_PERMISSION = "let these credentials list, read, write and delete objects there, or set others (AWS_ACCESS_KEY_ID, ...)"
_REGION = "set AWS_REGION to the region of the bucket, or AWS_ENDPOINT_URL to the server that has it"
_ROOM = "free some space there or raise the bucket's quota, then run the same command again: what is stored is kept"
# What to do about a refusal, by its code: those of S3, and of other servers with the same interface.
_NEXT = {
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled"), _PERMISSION),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired", "401"),
        _CREDENTIALS,
    ),
    **dict.fromkeys(
        (
            "PermanentRedirect",
            "TemporaryRedirect",
            "AuthorizationHeaderMalformed",
            "IllegalLocationConstraintException",
        ),
        _REGION,
    ),
    **dict.fromkeys(("QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity", "507"), _ROOM),
    "403": f"{_PERMISSION}; and see whether this machine's clock is right",
    "RequestTimeTooSkewed": "set this machine's clock: it is off by more than the minutes that the server allows",
    "NoSuchBucket": "create the bucket, or correct its name in the root that was given",
    "NotImplemented": "choose storage with conditional puts (If-None-Match): two writers must not overwrite each other",
}
# Where a cloud tells its machines their credentials.
_METADATA = "169.254.169.254"


def refusal(verb: str, where: str, error: Exception) -> MachineError:
    """The error for a request that obstore says has failed; what to do next where the code of the answer tells.

    Args:
        verb: what was asked for: `read`, `write`.
        where: the URI of the object.
    """
    if has_no_credentials(error):
        told = f"no AWS credentials in the environment, and none from a cloud: {_first_line(error)}"
        return storage_error(verb, where, told, _CREDENTIALS)
    code = _code(error)
    return storage_error(verb, where, _first_line(error) + (f" ({code})" if code else ""), _NEXT.get(code))


def has_no_credentials(error: Exception) -> bool:
    """Whether it was for credentials that obstore asked: those of a cloud, where the environment has none."""
    return _METADATA in str(error)


def _first_line(error: Exception) -> str:
    """The first line of a failure: the rest is a dump of the request."""
    return str(error).strip().partition("\n")[0].partition(": <?xml")[0]


def _code(error: Exception) -> str:
    """The code in the server's answer, or the HTTP status where the answer has none, as that of a HEAD; else empty."""
    if "incorrectly configured region" in str(error):
        return "PermanentRedirect"
    told = re.search(r"<Code>(\w+)</Code>", str(error)) or re.search(r"status code: (\d{3})", str(error))
    return told[1] if told else ""
