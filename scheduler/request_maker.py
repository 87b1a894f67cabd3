"""From what the front-end sent to a request, its prompt hashed block by block."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from scheduler.block_hash import chain_hashes, root_hash
from scheduler.messages import AddRequest
from scheduler.ngram import NgramDrafter
from scheduler.request import Request


@dataclass(frozen=True, slots=True)
class RequestMaker:
    """Never changes, so that any thread may use it."""

    fingerprint: str
    block_size: int
    max_num_tokens: int
    """Prompt + output, of any request."""
    eos_token_ids: frozenset[int]
    prefix_cache: bool
    speculative: bool

    def make(self, message: AddRequest, now: float = 0.0) -> Request:
        """Unpack a message that arrived at `now` and hash its prompt's blocks (about 1 us a block).

        Raises ValueError if the prompt is not a whole number of uint32.
        """
        params = message.params
        tokens = array("I", message.prompt)
        root = root_hash(self.fingerprint, message.cache_salt)
        stop_token_ids = frozenset(params.stop_token_ids)
        return Request(
            request_id=message.request_id,
            params=params,
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            num_tokens=len(tokens),
            max_num_tokens=min(len(tokens) + params.max_tokens, self.max_num_tokens),
            priority=message.priority,
            tenant=message.tenant,
            stop_token_ids=stop_token_ids if params.ignore_eos else stop_token_ids | self.eos_token_ids,
            root=root,
            block_hashes=chain_hashes(root, tokens, self.block_size) if self.prefix_cache else [],
            has_grammar=message.grammar is not None,
            in_lockstep=message.grammar is not None or any(len(word) > 1 for word in params.bad_words),
            drafter=NgramDrafter(tokens) if self.speculative and message.grammar is None else None,
            progress=message.progress,
            arrived_at=now,
        )
