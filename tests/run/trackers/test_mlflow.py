"""MLflow's store says what metrics.jsonl says."""

import json

import pytest

from luspo_jax.run.trackers.mlflow import metric_name
from tests.run.trackers.tracker_cases import COLUMNS, ROW, interrupted_run


def test_names_are_those_that_mlflow_takes():
    assert metric_name("val-core/toy/acc/mean@4") == "val-core/toy/acc/mean_at_4"
    assert metric_name("a/α%") == "a/α_"  # letters of any script pass


@pytest.mark.parametrize(
    "uri",
    [
        "file://{folder}/mlruns",
        pytest.param("sqlite:///{folder}/store.db", marks=pytest.mark.slow),  # makes its tables
    ],
)
def test_a_store_holds_every_step_once_in_one_run(tmp_path, monkeypatch, uri):
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    pytest.importorskip("sqlalchemy", reason="needs the extra mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)  # where MLflow puts artifacts
    uri = uri.format(folder=tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    rows = interrupted_run(tmp_path / "run", "mlflow")
    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "rl"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "member"
    assert run.info.status == "FINISHED"
    assert run.data.tags["group"] == "sweep"
    assert run.data.params == {"seed": "3", "model.path": "m"}
    assert set(run.data.metrics) == {metric_name(name) for name in rows[0]}
    for name in rows[0]:
        points = client.get_metric_history(run.info.run_id, metric_name(name))
        assert {p.step: p.value for p in points} == {step: rows[step][name] for step in rows}
        assert len(points) == len(rows)
    (shown,) = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    (file,) = (tmp_path / "mlruns").rglob("step_*.json")
    assert str(file).endswith(shown["path"])
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (tuple(found["columns"]), [tuple(r) for r in found["data"]]) == (COLUMNS, [ROW])
