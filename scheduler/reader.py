"""The engine's reader thread: frames become requests, whose prompts are hashed and whose grammars are compiled here."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from model.batch import SamplingParams
from scheduler.channel import ChannelClosed, EngineChannel, ProtocolError
from scheduler.messages import AbortRequests, AddRequest, Finished, FinishReason, ResetPrefixCache, Shutdown
from scheduler.process_end import EXIT_FAILURE, end_process
from scheduler.request import Request
from scheduler.scheduler import Scheduler
from scheduler.worker import Grammars

logger = logging.getLogger("engine")


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that the reader found impossible to build."""

    request_id: str
    finished: Finished


Inbox = SimpleQueue[Request | Refused | AbortRequests | ResetPrefixCache | Shutdown]


class Reader:
    """The thread that receives. It starts before the model is loaded, to see the front-end's end even then."""

    def __init__(self, channel: EngineChannel) -> None:
        self.inbox: Inbox = SimpleQueue()
        self.exit_code = 0
        """With what to exit at the front-end's end of file."""
        self._channel = channel
        self._scheduler: Scheduler | None = None
        self._grammars: Grammars | None = None
        self._vocab_size = 0

    def start(self) -> None:
        threading.Thread(target=self._run, name="reader", daemon=True).start()

    def accept_requests(self, scheduler: Scheduler, grammars: Grammars, vocab_size: int) -> None:
        """Call before the front-end is told that the engine is ready; a request that comes earlier is an error."""
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._scheduler = scheduler

    def _run(self) -> None:
        try:
            while True:
                match self._channel.receive():
                    case AddRequest() as message:
                        self.inbox.put(self._build(message))
                    case AbortRequests() | ResetPrefixCache() | Shutdown() as message:
                        self.inbox.put(message)
                    case message:
                        raise ProtocolError(f"unexpected {type(message).__name__}")
        except ChannelClosed as error:
            logger.info("front-end is gone (%s): exiting", error)
            end_process(self.exit_code)
        except Exception:
            logger.exception("the reader failed: exiting")
            end_process(EXIT_FAILURE)

    def _build(self, message: AddRequest) -> Request | Refused:
        """The scheduler's request. What is wrong with one request must end that one only, never the engine."""
        if self._scheduler is None:
            raise ProtocolError("AddRequest before EngineReady")
        try:
            token_ids = np.frombuffer(message.prompt, dtype="<u4")
            if token_ids.size and (largest := int(token_ids.max())) >= self._vocab_size:
                raise ValueError(f"token id {largest} is outside the vocabulary of {self._vocab_size}")
            request = self._scheduler.make_request(message, time.monotonic())
        except ValueError as error:
            return _refused(message, "invalid_prompt", error)
        try:
            _check_ids(message.params, self._vocab_size)
        except ValueError as error:
            return _refused(message, "invalid_request", error)
        if message.grammar is not None:
            try:
                assert self._grammars is not None
                self._grammars.add(message.request_id, message.grammar)
            except ValueError as error:
                return _refused(message, "invalid_grammar", error)
        return request


def _refused(message: AddRequest, code: str, error: Exception) -> Refused:
    return Refused(message.request_id, Finished(reason=FinishReason.REJECTED, code=code, message=str(error)))


def _check_ids(params: SamplingParams, vocab_size: int) -> None:
    """The HTTP edge has checked them; one that slipped through must not reach a tensor's index. Raises ValueError."""
    ids = (params.stop_token_ids, params.logit_bias, params.allowed_token_ids, *params.bad_words)
    if any(not 0 <= token_id < vocab_size for group in ids for token_id in group):
        raise ValueError(f"a token id of the sampling parameters is outside the vocabulary of {vocab_size}")
