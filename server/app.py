"""The ASGI application: routes and middleware around one supervised engine. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from random import Random, SystemRandom

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from model.config import load_generation_defaults
from scheduler.messages import EngineStats
from server import openapi
from server.address import is_loopback
from server.admission import AdmissionGate
from server.chat import ChatService
from server.chat_template import load_chat_template
from server.deadlines import Deadlines
from server.errors import ApiError, handle_error
from server.generation import Generator
from server.grammar_check import GrammarChecker
from server.metrics import Metrics
from server.middleware import BodyMiddleware, DoorMiddleware, RequestMiddleware
from server.open_requests import OpenRequests
from server.routes.admin import admin_router
from server.routes.aliases import with_aliases
from server.routes.chat import chat_router
from server.routes.completions import completions_router
from server.routes.info import info_router
from server.routes.messages import messages_router
from server.routes.models import models_router
from server.routes.operations import operations_router
from server.routes.responses import responses_router
from server.routes.tokenize import tokenize_router
from server.routes.web import web_router
from server.served import ServedModel
from server.settings import Settings
from server.supervisor import Supervisor
from server.tokenizer import Tokenizer


def build_app(settings: Settings, supervisor: Supervisor, tokenizer: Tokenizer) -> FastAPI:
    """The application that serves `settings.model` with the engine of `supervisor`, which need not be ready yet.

    Takes over its `on_stats`. Raises CheckpointError for a bad generation_config.json, TemplateError for a
    chat template that does not compile.
    """
    template = load_chat_template(tokenizer)
    served = ServedModel(settings.served_model_name, supervisor)
    metrics = Metrics(served.names[0], supervisor)
    metrics.unauthenticated.set(not settings.api_key and not is_loopback(settings.host))
    gate = AdmissionGate(
        settings.max_open_requests, settings.max_queued_tokens, settings.keys, on_refusal=metrics.on_rejection
    )

    def observe(stats: EngineStats) -> None:
        metrics.observe(stats)
        gate.observe(stats)

    supervisor.on_stats = observe
    open_requests = OpenRequests()
    generator = Generator(
        supervisor=supervisor,
        tokenizer=tokenizer,
        gate=gate,
        grammars=GrammarChecker(settings.model / "tokenizer.json"),
        metrics=metrics,
        open_requests=open_requests,
        defaults=load_generation_defaults(settings.model),
        deadlines=Deadlines(settings.queue_timeout, settings.request_timeout),
        seeds=SystemRandom() if settings.seed is None else Random(settings.seed),  # nosec B311
    )
    app = FastAPI(
        title="latentd",
        version=version("latentd"),
        description="DeepSeek-V2-family models over the OpenAI API.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            # The outermost: a browser shows a page no answer without these headers, errors included.
            *([_cors(settings.allowed_origins)] if settings.allowed_origins else []),
            Middleware(RequestMiddleware, metrics=metrics),
            Middleware(
                DoorMiddleware, api_keys=settings.keys, admin_key=settings.admin_key, host=settings.host, gate=gate
            ),
            Middleware(BodyMiddleware, require_place=generator.require_place),
        ],
        exception_handlers={
            ApiError: handle_error,
            HTTPException: handle_error,
            RequestValidationError: handle_error,
        },
    )
    app.state.strict = settings.strict
    service = ChatService(generator, template)
    routers = (
        chat_router(generator, service, served),
        completions_router(generator, served),
        responses_router(service, tokenizer, served),
        models_router(served),
        tokenize_router(generator, gate, service, served),
        admin_router(generator, open_requests, has_admin_key=settings.admin_key is not None),
        info_router(supervisor, gate, served, settings, app.version),
        operations_router(supervisor, metrics, app.version),
        web_router(),
    )
    app.include_router(with_aliases(routers))
    app.include_router(messages_router(service, generator, gate, served))
    openapi.install(app)
    return app


def _cors(origins: Sequence[str]) -> Middleware:
    return Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=(
            *("X-Request-Id", "Request-Id", "Retry-After", "Server-Timing", "X-Ignored-Fields"),
            *(f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")),
        ),
    )
