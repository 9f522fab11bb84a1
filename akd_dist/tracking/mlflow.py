"""A run of MLflow for each student."""

import os
import time
from pathlib import Path
from typing import Any

from akd_dist.tracking.trackers import Log, Record, Tracked, end_of, final_scalars, run_key, scalars


class MLflow:
    """An MLflow run for each student, in one experiment for the fleet.

    Where to is what MLFLOW_TRACKING_URI says, else files under the run's folder.

    Args:
        run: the run's folder.
    """

    name = "MLflow"

    def __init__(self, run: Path) -> None:
        self.run, self.key = run, run_key(run)
        self.client: Any = None
        self.found: dict[str, Any] = {}

    def open(self, student: Tracked) -> Log:
        """Its run of an earlier command, found by tag; a new one where there is none."""
        if self.client is None:
            self._connect()
        return MLflowLog(self, student, self.found.get(student.name))

    def _connect(self) -> None:
        """Find the fleet's experiment and all its runs, with one request each."""
        # MLflow itself would wait for minutes for a server that is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        import mlflow

        uri = None
        if not mlflow.tracking.is_tracking_uri_set():  # type: ignore[no-untyped-call]
            uri = (self.run / "mlruns").absolute().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files need no database; MLflow prefers one
        client = mlflow.MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", f"akd-dist/{self.run.name}")
        experiment = client.get_experiment_by_name(name)
        self.experiment = experiment.experiment_id if experiment else client.create_experiment(name)
        token: str | None = None
        while True:
            page = client.search_runs(
                [self.experiment], f"tags.`akd_dist.run` = '{self.key}'", max_results=1000, page_token=token
            )
            self.found |= {run.data.tags["akd_dist.student"]: run for run in page}
            if not (token := page.token):
                break
        # Last, so that a connection that failed half way counts as none, and is begun again.
        self.client = client

    def close(self) -> None:
        """Forget what was found."""
        self.client, self.found = None, {}


class MLflowLog:
    """One student's MLflow run. How many epochs it has stands in a tag, which is sent with the metrics."""

    def __init__(self, tracker: MLflow, student: Tracked, found: Any | None) -> None:
        self.tracker, self.student, self.client = tracker, student, tracker.client
        tags = found.data.tags if found else {}
        self.id: str | None = found.info.run_id if found else None
        self.epochs = int(tags.get("akd_dist.epochs", 0))
        self.ended: str | None = tags.get("akd_dist.end")
        self.running = found is None or found.info.status == "RUNNING"

    def epoch(self, record: Record) -> None:
        """One request with all its numbers."""
        self._log(scalars(record), record["epoch"], {"akd_dist.epochs": str(self.epochs + 1)})
        self.epochs += 1

    def end(self, result: Record) -> None:
        """The test metrics, the end as a tag, and the run's status."""
        self._log(final_scalars(result), result["epochs"], {"akd_dist.end": end_of(result)})
        self.client.set_terminated(self.id, "FINISHED" if result["state"] == "done" else "FAILED")
        self.ended, self.running = end_of(result), False

    def _log(self, numbers: dict[str, float], step: int, tags: dict[str, str]) -> None:
        from mlflow.entities import Metric, RunTag

        self._begin()
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in numbers.items()]
        self.client.log_batch(self.id, metrics, tags=[RunTag(name, value) for name, value in tags.items()])

    def _begin(self) -> None:
        from mlflow.entities import Param

        if self.id is None:
            tags = {"akd_dist.run": self.tracker.key, "akd_dist.student": self.student.name}
            run = self.client.create_run(self.tracker.experiment, run_name=self.student.title, tags=tags)
            self.id = run.info.run_id
        if self.epochs == 0:  # to say the same again does no harm
            params = [Param(name, str(value)) for name, value in self.student.params.items()]
            self.client.log_batch(self.id, params=params)
        if not self.running:
            self.client.update_run(self.id, "RUNNING")
        self.running = True
