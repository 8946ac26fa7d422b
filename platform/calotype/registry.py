"""MLflow's registry of models: a checkpoint becomes a version once, whoever asks for it how often.

What a version is made of is said in its tags; `calotype.digest` is that of the checkpoint, and finds it again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from calotype import track
from calotype.errors import CalotypeError
from calotype.runs import Record

DIGEST = "calotype.digest"


def version_of(name: str, digest: str) -> str:
    """The version of the registered model that holds this checkpoint: the oldest; "" if there is none."""
    with _said(name):
        found = track.connect().search_model_versions(f"name = '{name}' and tags.`{DIGEST}` = '{digest}'")
        return min((str(one.version) for one in found), key=int, default="")


def register(
    record: Record, name: str, digest: str, source: str, tags: Mapping[str, str], description: str = ""
) -> str:
    """The version of this checkpoint, made now, of the registered model, which is made if it is missing.

    Args:
        record: the run that trained it, tracked in MLflow.
        source: where its weights lie.
        description: markdown, as MLflow's page of the version shows it.
    """
    logging.getLogger("mlflow.store.model_registry").setLevel(logging.WARNING)  # that it waits is no news
    with _said(name):
        client = track.connect()
        with contextlib.suppress(Exception):  # it is there already; if it is not, the next request says why
            client.create_registered_model(name)
        run = client.get_run(record.mlflow_run_id)
        models = [output.model_id for output in run.outputs.model_outputs] if run.outputs else []
        made = client.create_model_version(
            name,
            source,
            record.mlflow_run_id,
            {**tags, DIGEST: digest},
            description=description,
            model_id=models[0] if models else None,
        )
        if (oldest := version_of(name, digest)) != str(made.version):  # somebody else registered it in this moment
            client.delete_model_version(name, made.version)
        return oldest


def point(name: str, alias: str, version: str) -> None:
    """Let the alias mean this version, in one request: it never means none, or two."""
    with _said(name):
        track.connect().set_registered_model_alias(name, alias, version)


@contextlib.contextmanager
def _said(name: str) -> Iterator[None]:
    """What MLflow says against a registration, in one sentence.

    Raises:
        CalotypeError: MLflow is not there, or refuses the name or the alias; in its words.
    """
    try:
        yield
    except CalotypeError:
        raise
    except Exception as error:
        said = str(error).splitlines()[0].removeprefix("INVALID_PARAMETER_VALUE: ")
        raise CalotypeError(f"MLflow did not register {name!r}: {said[:300]}") from None


def tags_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Tags of a version: `calotype.NAME`, those that say something."""
    return {f"calotype.{name}": str(value) for name, value in values.items() if value not in ("", None)}
