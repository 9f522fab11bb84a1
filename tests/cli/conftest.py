"""What tests of the command line share: a command that is run here, and a root with a store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from akd_dist import cli
from akd_dist.documents.error import ErrorDocument
from akd_dist.documents.json_schema import schemas
from tests import stores


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No command leaves anything in the checkout."""
    monkeypatch.chdir(tmp_path)


class Outcome:
    """What a command left: its exit code, stdout and stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The refusal's document, checked against the schema that ships."""
        jsonschema.validate(self.document, schemas()["error"])
        assert self.document["error"]["code"] == self.code
        return ErrorDocument.model_validate(self.document).error.model_dump()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def command(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return command


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store root with one sealed store."""
    shutil.copytree(stores.GOLDEN, tmp_path / "stores")
    return tmp_path / "stores"
