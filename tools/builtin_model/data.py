"""Writes the training data: the tokenizer, and per mix its documents as token ids and loss weights.

`M.tokens.npy` (uint16) and `M.weights.npy` (uint8, tenths) are equally long, for M in short, copy, long, recall and
val; documents stand back to back, each begins with the begin token. The same seed gives the same files, whatever the
number of processes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from tools.builtin_model import prose as prose_module
from tools.builtin_model import questions, tokenizer
from tools.builtin_model.documents import Document, encode_all
from tools.builtin_model.mixes import MIXES, VALIDATION_TOKENS, Mix, generators
from tools.builtin_model.prose import Prose

CHUNK_TOKENS = 250_000
"""One process makes so many tokens at a time; the shares are exact within a chunk, and its documents are shuffled."""
_SAMPLE_DOCUMENTS = 1_500
"""Of each type, for the tokenizer."""
_BATCH = 64

Chunk = tuple[NDArray[np.uint16], NDArray[np.uint8], Counter[str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=Path, required=True, help="folder of `fetch`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size, for trials")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--tokenizer", type=Path, metavar="CHECKPOINT", help="use its tokenizer, train none")
    parser.add_argument("--processes", type=int, default=2)


def run(args: argparse.Namespace) -> None:
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.tokenizer is None:
        with_tokenizer = tokenizer.train(sample_texts(prose_module.load(args.cache), args.seed))
    else:
        with_tokenizer = tokenizer.load(args.tokenizer)
    tokenizer.save(with_tokenizer, out)
    sizes = {name: round(mix.tokens * args.scale) for name, mix in MIXES.items()} | {"val": VALIDATION_TOKENS}
    log = {}
    with multiprocessing.Pool(args.processes, _start_worker, (args.cache, out)) as pool:
        for name, tokens in sizes.items():
            mix = "long" if name == "val" else name
            sizes_of_chunks = [CHUNK_TOKENS] * (tokens // CHUNK_TOKENS) + [tokens % CHUNK_TOKENS]
            jobs = [(mix, f"{args.seed}/{name}/{index}", size) for index, size in enumerate(sizes_of_chunks) if size]
            began = time.monotonic()
            chunks = list(tqdm(pool.imap(_make_chunk, jobs), name, len(jobs)))
            log[name] = _write(out, name, chunks) | {"seconds": round(time.monotonic() - began, 1)}
            print(json.dumps({name: log[name]}))
    (out / "data.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


def sample_texts(prose: Prose, seed: int) -> Iterator[str]:
    """What the tokenizer's merges are counted on: documents of every type."""
    rng = Random(f"{seed}/tokenizer")
    for make in generators(prose, longest=250).values():
        for _ in range(_SAMPLE_DOCUMENTS):
            document = make(rng)
            yield from (turn.content for turn in document.turns)
            yield from (call.arguments for turn in document.turns for call in turn.tool_calls)
            yield from (json.dumps(tool["function"], indent=4) for tool in document.tools)


_worker: dict[str, object] = {}


def _start_worker(cache: Path, out: Path) -> None:
    _worker["prose"] = prose_module.load(cache)
    _worker["tokenizer"] = tokenizer.load(out)


def _make_chunk(job: tuple[str, str, int]) -> Chunk:
    mix, seed, tokens = job
    prose, of_worker = _worker["prose"], _worker["tokenizer"]
    assert isinstance(prose, Prose)
    assert isinstance(of_worker, Tokenizer)
    return make_chunk(MIXES[mix], Random(seed), tokens, prose, of_worker)


def make_chunk(mix: Mix, rng: Random, tokens: int, prose: Prose, with_tokenizer: Tokenizer) -> Chunk:
    """About `tokens` token ids of a mix, their weights, and how many of them are of each type."""
    makers = generators(prose, mix.longest)
    total = sum(mix.shares.values())
    encoded: list[tuple[list[int], list[int]]] = []
    counts: Counter[str] = Counter()
    for kind, share in mix.shares.items():
        while counts[kind] < tokens * share / total:
            documents: list[Document] = [makers[kind](rng) for _ in range(_BATCH)]
            documents = [document for document in documents if not questions.asks_held_out(document)]
            for ids, weights in encode_all(documents, with_tokenizer):
                if len(ids) <= mix.longest and counts[kind] < tokens * share / total:
                    encoded.append((ids, weights))
                    counts[kind] += len(ids)
    rng.shuffle(encoded)
    return (
        np.array([token for ids, _ in encoded for token in ids], np.uint16),
        np.array([weight for _, weights in encoded for weight in weights], np.uint8),
        counts,
    )


def _write(out: Path, name: str, chunks: list[Chunk]) -> dict[str, object]:
    tokens = np.concatenate([chunk[0] for chunk in chunks])
    weights = np.concatenate([chunk[1] for chunk in chunks])
    np.save(out / f"{name}.tokens.npy", tokens)
    np.save(out / f"{name}.weights.npy", weights)
    counts = sum((chunk[2] for chunk in chunks), Counter[str]())
    shares = {kind: round(count / len(tokens), 4) for kind, count in counts.items()}
    answers = round(float((weights > 0).mean()), 3)
    return {"tokens": len(tokens), "share_of_targets": answers, "shares": shares}
