"""`/v1/models` and the small answers of the operational endpoints."""

from __future__ import annotations

from typing import Literal

import msgspec


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["latentd"] = "latentd"
    root: str
    parent: str | None = None
    max_model_len: int | None
    """Most tokens of prompt + answer; null until the model is loaded. Evaluation tools read it."""


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    status: str
    reason: str | None = None


class Version(msgspec.Struct, frozen=True, kw_only=True):
    version: str
