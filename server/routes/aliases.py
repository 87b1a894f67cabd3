"""The same routes under other prefixes: clients disagree on whether `/v1` is part of the base URL."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastapi import APIRouter
from fastapi.routing import APIRoute

API_PREFIX = "/v1"
ALIAS_PREFIXES = ("", "/beta")
"""The root as in llama.cpp, and what DeepSeek's clients are told to use."""


def with_aliases(routers: Iterable[APIRouter], prefixes: Sequence[str] = ALIAS_PREFIXES) -> APIRouter:
    """All routes of `routers`, and those under /v1 once more under each prefix, which the document leaves out."""
    every = APIRouter()
    for router in routers:
        every.include_router(router)
        for route in router.routes:
            if isinstance(route, APIRoute) and route.path.startswith(f"{API_PREFIX}/"):
                for prefix in prefixes:
                    every.add_api_route(
                        prefix + route.path.removeprefix(API_PREFIX),
                        route.endpoint,
                        methods=list(route.methods or ()),
                        include_in_schema=False,
                    )
    return every
