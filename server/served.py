"""The names clients call the model by."""

from __future__ import annotations

import time
from collections.abc import Sequence

from server.errors import ModelNotFound
from server.schemas.models import Model, ModelList
from server.supervisor import Supervisor


class ServedModel:
    """One model under one or more names; the first is the one that is told when none was asked for."""

    def __init__(self, names: Sequence[str], supervisor: Supervisor) -> None:
        self.names = tuple(names)
        self._supervisor = supervisor
        self._created = int(time.time())

    def resolve(self, name: str | None) -> str:
        """The name to answer under. Raises ModelNotFound."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            raise ModelNotFound(f"The model `{name}` does not exist", param="model")
        return name

    @property
    def fingerprint(self) -> str:
        ready = self._supervisor.engine.ready
        return f"fp_{ready.fingerprint[:10]}" if ready is not None else "fp_loading"

    def describe(self, name: str) -> Model:
        ready = self._supervisor.engine.ready
        return Model(
            id=self.resolve(name),
            created=self._created,
            root=self.names[0],
            max_model_len=None if ready is None else ready.max_model_len,
        )

    def list(self) -> ModelList:
        return ModelList(data=[self.describe(name) for name in self.names])
