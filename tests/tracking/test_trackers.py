"""Trackers, with the real libraries and offline: every point once, through resumes, cuts and servers that are gone."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from akd_dist.base.errors import RecipeError
from akd_dist.tracking import follower, trackers, wandb as wandb_runs
from akd_dist.tracking.follower import Follower, check_trackers, forwarding
from akd_dist.tracking.mlflow import MLflow, MLflowLog
from akd_dist.tracking.tensorboard import TensorBoard
from akd_dist.tracking.trackers import Tracked
from akd_dist.tracking.wandb import Wandb, records_of

EPOCHS = 5


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "WANDB_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # also so that what the tracker sets goes with the test
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(follower, "POLL_SECONDS", 0.05)


def a_student(run: Path, name: str = "mlp-8") -> Tracked:
    folder = run / "students" / name
    folder.mkdir(parents=True)
    params: dict[str, str | int | float | bool] = {"model": "mlp-8", "lr": 0.005, "seed": 3, "tau_max": 2}
    return Tracked(
        name=name, run=run.name, folder=folder, params=params, recipe='{\n  "lr": 0.005\n}', metric="accuracy"
    )


def a_record(epoch: int) -> dict[str, Any]:
    annealing = epoch < 3
    return {
        "epoch": epoch, "stage": "annealing" if annealing else "hard_labels", "stage_epoch": epoch,
        "temperature": 3 - epoch if annealing else None, "phi": 1 / (3 - epoch) if annealing else None, "psi": None,
        "lr": 0.01 / (epoch + 1), "train_loss": 2.0 - epoch / 10, "seconds": 1.5,
        "validation": {"accuracy": 0.5 + epoch / 1000, "f1": 0.25, "loss": 1.0},
    }  # fmt: skip


def train(student: Tracked, epochs: int) -> None:
    """What a worker leaves after so many epochs: the whole file each time."""
    lines = "".join(json.dumps(a_record(epoch)) + "\n" for epoch in range(epochs))
    (student.folder / "metrics.jsonl").write_text(lines)


def end(student: Tracked, state: str = "done") -> None:
    test = {"accuracy": 0.75, "f1": 0.5, "loss": 0.9} if state == "done" else None
    result = {
        "name": student.folder.name, "model": "mlp-8", "parameters": 610, "objective": "kd", "tau_max": None, "seed": 0,
        "state": state, "reason": None if state == "done" else "it broke", "epochs": EPOCHS, "validation": None,
        "test": test, "agreement": 0.875 if state == "done" else None, "seconds": 1.0, "path": ".",
    }  # fmt: skip
    (student.folder / "result.json").write_text(json.dumps(result))


def forward(tracker: trackers.Tracker, *students: Tracked) -> None:
    """One look of a driver that then goes away."""
    Follower(tracker, students, print).forward()
    tracker.close()


# ---- TensorBoard


def points(student: Tracked) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads: every scalar as (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(student.folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def texts(student: Tracked) -> dict[str, list[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(student.folder / "tensorboard"))
    read.Reload()
    tags = [tag for tag in read.Tags()["tensors"] if tag.endswith("text_summary")]
    return {tag: [event.tensor_proto.string_val[0].decode() for event in read.Tensors(tag)] for tag in tags}


def check_complete(student: Tracked) -> None:
    found = points(student)
    expected: dict[str, list[float]] = {
        "train/loss": [2.0 - epoch / 10 for epoch in range(EPOCHS)],
        "validation/accuracy": [0.5 + epoch / 1000 for epoch in range(EPOCHS)],
        "validation/f1": [0.25] * EPOCHS,
        "validation/loss": [1.0] * EPOCHS,
        "schedule/temperature": [3, 2, 1],
        "schedule/phi": [1 / 3, 1 / 2, 1],
        "schedule/lr": [0.01 / (epoch + 1) for epoch in range(EPOCHS)],
    }
    for tag, values in expected.items():
        assert [step for step, _ in found[tag]] == list(range(len(values))), tag
        assert [value for _, value in found[tag]] == pytest.approx(values), tag
    assert found["test/accuracy"] == [(EPOCHS, 0.75)]
    assert found["test/agreement"] == [(EPOCHS, 0.875)]
    assert "schedule/psi" not in found


def test_a_reason_that_is_no_utf_8_is_text_to_a_tracker(tmp_path: Path) -> None:
    student = a_student(tmp_path)
    train(student, 1)
    end(student, "failed")
    path = student.folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reason": "OSError: \udcff.txt"}))
    forward(TensorBoard(), student)
    assert texts(student)["end/text_summary"] == [f"failed after {EPOCHS} epochs: OSError: \\udcff.txt"]


def test_tensorboard_reads_every_number_and_the_recipe(tmp_path: Path) -> None:
    student = a_student(tmp_path)
    train(student, EPOCHS)
    end(student)
    forward(TensorBoard(), student)
    check_complete(student)
    assert '"lr": 0.005' in texts(student)["recipe/text_summary"][0]
    assert texts(student)["end/text_summary"] == [f"done after {EPOCHS} epochs"]


def test_tensorboard_compares_students_by_their_parameters(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    student = a_student(tmp_path)
    train(student, 1)
    forward(TensorBoard(), student)
    read = EventAccumulator(str(student.folder / "tensorboard"))
    read.Reload()
    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    params = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert params["model"].string_value == "mlp-8"
    assert params["tau_max"].number_value == 2


def test_a_resumed_driver_adds_what_is_missing_and_nothing_twice(tmp_path: Path) -> None:
    student = a_student(tmp_path)
    for epochs in (1, 3, 3, 2, 4, EPOCHS):  # 2: back to a checkpoint, as after a kill
        train(student, epochs)
        forward(TensorBoard(), student)
    end(student)
    forward(TensorBoard(), student)
    forward(TensorBoard(), student)
    check_complete(student)
    assert len(list((student.folder / "tensorboard").iterdir())) == 1


def test_a_file_that_was_cut_is_mended(tmp_path: Path) -> None:
    student = a_student(tmp_path)
    train(student, EPOCHS)
    end(student)
    forward(TensorBoard(), student)
    (file,) = (student.folder / "tensorboard").iterdir()
    whole = file.read_bytes()
    for size in range(0, len(whole), 97):
        file.write_bytes(whole[:size])
        forward(TensorBoard(), student)
        check_complete(student)


def test_a_file_with_a_flipped_byte_is_mended_from_there_on(tmp_path: Path) -> None:
    student = a_student(tmp_path)
    train(student, EPOCHS)
    end(student)
    forward(TensorBoard(), student)
    (file,) = (student.folder / "tensorboard").iterdir()
    broken = bytearray(file.read_bytes())
    broken[12] ^= 0xFF  # the first byte of the first event
    file.write_bytes(broken)
    forward(TensorBoard(), student)
    check_complete(student)


def test_a_student_that_a_tracker_refuses_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    students, tracker = [a_student(tmp_path, name) for name in "abcdef"], TensorBoard()
    for student in students:
        train(student, EPOCHS)
    opened, asked, refused = tracker.open, list[str](), {"b"}

    def open_most(student: trackers.Tracked) -> trackers.Log:
        asked.append(student.name)
        if student.name in refused:
            raise OSError(f"not {student.name}")
        return opened(student)

    monkeypatch.setattr(tracker, "open", open_most)
    with pytest.raises(OSError, match="not b"):
        Follower(tracker, students, print).forward()
    assert "".join(asked) == "abcdef"
    refused |= set("abcdef")
    asked.clear()
    with pytest.raises(OSError, match="not a"):  # it is gone: each of thousands would wait for it in vain
        Follower(tracker, students, print).forward()
    assert "".join(asked) == "abc"


def test_a_retried_student_goes_on_in_its_file(tmp_path: Path) -> None:
    student = a_student(tmp_path)
    train(student, 2)
    end(student, "failed")
    forward(TensorBoard(), student)
    train(student, EPOCHS)
    forward(TensorBoard(), student)
    end(student)
    forward(TensorBoard(), student)
    check_complete(student)
    assert texts(student)["end/text_summary"] == [
        f"failed after {EPOCHS} epochs: it broke",
        f"done after {EPOCHS} epochs",
    ]


# ---- MLflow


def mlflow_runs(uri: str | None = None) -> tuple[Any, dict[str, Any]]:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("akd-dist/fleet")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    runs = {run.info.run_name: run for run in found}
    assert len(runs) == len(found)
    return client, runs


def test_mlflow_has_a_run_for_each_student_and_every_point_once(tmp_path: Path) -> None:
    run = tmp_path / "fleet"
    one, two = a_student(run, "one"), a_student(run, "two")
    for epochs in (1, 3, 2, EPOCHS):
        train(one, epochs)
        train(two, epochs)
        forward(MLflow(run), one, two)
    _, runs = mlflow_runs((run / "mlruns").as_uri())
    assert {entry.info.status for entry in runs.values()} == {"RUNNING"}
    end(one)
    end(two, "failed")
    forward(MLflow(run), one, two)
    forward(MLflow(run), one, two)

    client, runs = mlflow_runs((run / "mlruns").as_uri())
    assert {name: entry.info.status for name, entry in runs.items()} == {"fleet/one": "FINISHED", "fleet/two": "FAILED"}
    entry = runs["fleet/one"]
    history = client.get_metric_history(entry.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(n, 2.0 - n / 10) for n in range(EPOCHS)]
    assert len(client.get_metric_history(entry.info.run_id, "schedule/temperature")) == 3
    assert entry.data.metrics["test/accuracy"] == 0.75
    assert entry.data.params == {"model": "mlp-8", "lr": "0.005", "seed": "3", "tau_max": "2"}
    assert runs["fleet/two"].data.tags["akd_dist.end"].endswith("it broke")


def test_mlflow_goes_where_its_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "fleet"
    student = a_student(run)
    train(student, 1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "elsewhere").as_uri())
    forward(MLflow(run), student)
    assert list(mlflow_runs((tmp_path / "elsewhere").as_uri())[1]) == ["fleet/mlp-8"]
    assert not (run / "mlruns").exists()


def test_a_run_that_is_started_over_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    run = tmp_path / "fleet"
    student = a_student(run)
    train(student, EPOCHS)
    forward(MLflow(run), student)
    (run / "trackers.json").unlink()  # as --fresh does
    train(student, 1)
    tracker = MLflow(run)
    forward(tracker, student)
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("akd-dist/fleet")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert sorted(entry.data.tags["akd_dist.epochs"] for entry in found) == ["1", str(EPOCHS)]


def test_a_lost_server_gets_the_rest_when_it_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "fleet"
    student = a_student(run)
    monkeypatch.setattr(follower, "RETRY_SECONDS", 0.05)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    told: list[str] = []
    with forwarding(run, [student], ["mlflow"], told.append):
        for epochs in range(1, EPOCHS + 1):
            train(student, epochs)
        end(student)
    assert [line for line in told if "MLflow failed, and training goes on without it" in line] == told[:1]
    assert told[1:] == ["MLflow does not have everything yet: the same command again forwards the rest"]
    check_complete(student)  # TensorBoard's file does not depend on it

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "back").as_uri())
    told.clear()
    with forwarding(run, [student], ["mlflow"], told.append):
        pass
    assert told == []
    _, runs = mlflow_runs()
    assert runs["fleet/mlp-8"].data.tags["akd_dist.epochs"] == str(EPOCHS)
    assert runs["fleet/mlp-8"].info.status == "FINISHED"


def test_a_failed_tracker_asks_again_what_is_there(tmp_path: Path) -> None:
    run = tmp_path / "fleet"
    student, tracker = a_student(run), MLflow(run)
    train(student, 2)
    following = Follower(tracker, [student], print)
    following.forward()
    log = following.logs[student.name]
    forward(MLflow(run), student)
    train(student, EPOCHS)
    assert isinstance(log, MLflowLog)
    log.epoch(a_record(2))  # it arrives, and its answer does not
    log.epochs = 2
    log.client = None
    failures = []
    for _ in range(2):
        following._try()
        failures.append(following.failure is not None)
    assert failures == [True, False]
    client, runs = mlflow_runs((run / "mlruns").as_uri())
    history = client.get_metric_history(runs["fleet/mlp-8"].info.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(EPOCHS))


# ---- Weights & Biases


def wandb_history(run: Path, student: str) -> tuple[list[dict[str, Any]], dict[str, Any], set[str]]:
    """What lies in W&B's own files of all sessions: lines of history, the summary, and ids."""
    record_of: Any = importlib.import_module("wandb.proto.wandb_internal_pb2").Record

    def as_dict(items: Any) -> dict[str, Any]:
        return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}

    lines: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    ids = set()
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        records = [record_of.FromString(data) for data in records_of(path.read_bytes())]
        if any(record.run.display_name == f"{run.name}/{student}" for record in records):
            ids |= {record.run.run_id for record in records if record.HasField("run")}
            lines += [items for record in records if (items := as_dict(record.history.item))]
            for record in records:
                summary |= as_dict(record.summary.update)
    return lines, summary, ids


def test_wandb_has_every_point_once_in_one_run(tmp_path: Path) -> None:
    run = tmp_path / "fleet"
    one, two = a_student(run, "one"), a_student(run, "two")
    for epochs in (2, 1, EPOCHS):
        train(one, epochs)
        train(two, epochs)
        forward(Wandb(run), one, two)
    end(one)
    forward(Wandb(run), one, two)
    forward(Wandb(run), one, two)
    lines, summary, ids = wandb_history(run, "one")
    assert [(line["_step"], line["train/loss"]) for line in lines] == [(n, 2.0 - n / 10) for n in range(EPOCHS)]
    assert summary["test/accuracy"] == 0.75
    assert len(ids) == 1
    assert wandb_history(run, "two")[2].isdisjoint(ids)


def test_a_session_of_wandb_counts_once_its_file_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B says that it has finished before its own process has written the file."""
    run, seen = tmp_path / "fleet", list[str]()
    monkeypatch.setattr(wandb_runs, "_comes_to_its_end", lambda file: seen.append(file.name))
    student = a_student(run, "one")
    train(student, 1)
    forward(Wandb(run), student)
    note = student.folder / "wandb.json"
    (name,) = seen
    assert name.removeprefix("run-").removesuffix(".wandb") in json.loads(note.read_text())["session"]
    monkeypatch.undo()
    forward(Wandb(run), student)
    assert json.loads(note.read_text())["session"] is None
    assert [len(list(run.glob("wandb/offline-run-*"))), len(wandb_history(run, "one")[0])] == [1, 1]


def test_a_file_of_wandb_that_lacks_its_end_is_not_whole(tmp_path: Path) -> None:
    run = tmp_path / "fleet"
    student = a_student(run, "one")
    train(student, 150)
    forward(Wandb(run), student)
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    data = file.read_bytes()
    assert wandb_runs._is_whole(file)
    for length in (7, 32 * 1024, len(data) - 1):
        file.write_bytes(data[:length])
        assert not wandb_runs._is_whole(file)


def is_served(pid: int) -> bool:
    """Whether the process that W&B starts beside each of ours is there for this one."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended
            if f"--pid {pid}" in " ".join(process.cmdline()):
                return True
    return False


@pytest.mark.parametrize("epochs", [EPOCHS, 150])
def test_a_killed_driver_loses_nothing_in_wandb(tmp_path: Path, epochs: int) -> None:
    """W&B writes blocks of 32 KiB: of a killed session they hold nothing, or not the last epochs."""
    student = a_student(tmp_path / "fleet", "one")
    train(student, epochs)
    code = (
        "import os\nfrom pathlib import Path\nfrom akd_dist.tracking.follower import Follower\n"
        "from akd_dist.tracking.trackers import Tracked\nfrom akd_dist.tracking.wandb import Wandb\n"
        f"run = Path({str(tmp_path / 'fleet')!r})\n"
        "one = Tracked('one', 'fleet', run / 'students' / 'one', {}, '', 'accuracy')\n"
        "Follower(Wandb(run), [one], print).forward()\nos.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code])
    assert killed.wait() == -9
    deadline = time.monotonic() + 900
    while is_served(killed.pid):  # W&B's own process still writes what came to it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.1)  # W&B names a session's folder by the second; no command starts again within one
    train(student, epochs + 1)
    forward(Wandb(tmp_path / "fleet"), student)
    lines, _, _ = wandb_history(tmp_path / "fleet", "one")
    assert sorted(line["_step"] for line in lines) == list(range(epochs + 1))


def test_a_note_from_elsewhere_deletes_nothing(tmp_path: Path) -> None:
    run = tmp_path / "fleet"
    student = a_student(run, "one")
    train(student, 1)
    forward(Wandb(run), student)
    note = student.folder / "wandb.json"
    mine = json.loads(note.read_text())
    (run / "wandb" / "offline-run-1-2").mkdir()
    for session in ("..", "../students", "offline-run-1-2", f"../wandb/offline-run-1-{mine['id']}"):
        note.write_text(json.dumps(mine | {"session": session}))
        forward(Wandb(run), student)
    assert len(wandb_history(run, "one")[0]) == 1
    assert (run / "wandb" / "offline-run-1-2").is_dir()


# ---- refused at once


def test_a_tracker_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(RecipeError, match=r"pip install 'akd-dist\[mlflow\]'") as refused:
        check_trackers(["mlflow"])
    assert refused.value.code == 2


def test_a_tracker_that_there_is_not_is_refused() -> None:
    with pytest.raises(RecipeError, match="no such tracker"):
        check_trackers(["notebook"])


def test_wandb_without_a_key_is_refused_before_anything_begins(tmp_path: Path) -> None:
    code = "from akd_dist.tracking.follower import check_trackers; check_trackers(['wandb'])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONWARNINGS": "ignore", "NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "W&B does not know who you are" in done.stderr
    assert "wandb login" in done.stderr
    check_trackers(["wandb"])  # offline it need not know
