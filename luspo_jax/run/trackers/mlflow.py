"""MLflow: a run of an experiment, where MLFLOW_TRACKING_URI says."""

import json
import logging
import re
import time
from collections.abc import Mapping

from luspo_jax.run.trackers.tracker import About, Table

_AT_ONCE = 100  # parameters of a call, MLflow's limit
_METRICS_AT_ONCE = 1000  # likewise
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")


def metric_name(name: str) -> str:
    """Returns a name that MLflow takes: acc/mean@4 becomes acc/mean_at_4."""
    return _NOT_IN_NAMES.sub("_", name.replace("@", "_at_"))


class Mlflow:
    """Writes to MLflow; the project is an experiment, the group a tag.

    MLflow keeps every value that is logged for a step, so steps that are repeated are not sent.
    """

    PACKAGE, EXTRA, OVERWRITES = "mlflow", "mlflow", False

    def __init__(self):
        self._client, self._run, self._tables = None, "", []

    def prepare(self) -> None:
        """Needs nothing."""

    def start(self, about: About, known: str) -> str:
        """Starts a run, whose parameters are the configuration; or continues one."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        # Its import sets INFO, at which it reports the making of a new database's tables.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client = MlflowClient()
        if known:
            self._run = known
            self._client.update_run(known, status="RUNNING")
            tag = self._client.get_run(known).data.tags.get(_TABLES)
            self._tables = json.loads(tag) if tag else []
            return known
        found = self._client.get_experiment_by_name(about.project)
        experiment = found.experiment_id if found else self._client.create_experiment(about.project)
        tags = {"group": about.group} if about.group else {}
        self._run = self._client.create_run(experiment, run_name=about.name, tags=tags).info.run_id
        params = [Param(metric_name(name), str(value)) for name, value in about.config.items()]
        for start in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self._run, params=params[start : start + _AT_ONCE])
        return self._run

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = [Metric(metric_name(name), value, now, step) for name, value in numbers.items()]
        for start in range(0, len(found), _METRICS_AT_ONCE):
            self._client.log_batch(self._run, metrics=found[start : start + _METRICS_AT_ONCE])

    def table(self, step: int, table: Table) -> None:
        """Writes an artifact that MLflow's pages and `load_table` read as a table."""
        file = f"completions/step_{step:06d}.json"
        # As pandas writes a frame with orient="split", which `log_table` needs pandas for.
        rows = [list(row) for row in table.rows]
        content = {"columns": list(table.columns), "data": rows}
        self._client.log_text(self._run, json.dumps(content, ensure_ascii=False), file)
        self._tables.append({"path": file, "type": "table"})
        self._client.set_tag(self._run, _TABLES, json.dumps(self._tables))

    def close(self, *, failed: bool) -> None:
        """Marks the run as ended."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


_TABLES = "mlflow.loggedArtifacts"  # the tag by which its pages find tables
