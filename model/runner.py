"""The model worker: loads a checkpoint and computes steps. Rows, network, latent cache and sampler meet here."""

from __future__ import annotations

import logging
from array import array
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from model.batch import ForwardBatch, NewRow, SampledTokens, SamplingParams, ScheduledRow
from model.checkpoint import Checkpoint, open_checkpoint
from model.config import CheckpointError, DeepseekConfig, load_config
from model.cores import usable_cores
from model.deepseek import DeepseekForCausalLM
from model.inputs import StepInputs
from model.latent_cache import BLOCK_SIZE, LatentCache
from model.launched import LaunchedStep, Sampled, ScoredPrompt
from model.logprobs import SLICE_ROWS, score, together
from model.memory import available_memory, in_gib, require_memory, trim, weight_bytes_in, weights_in
from model.ops.cpu.library import library
from model.ops.cpu.ops import CpuOps, obstacle
from model.ops.eager.linear import can_lay_out
from model.ops.eager.ops import EagerOps
from model.ops.interface import Ops
from model.pool_size import LARGEST_SHARE, ConfigError, size_pool
from model.profiling import decode_step, prompt_step
from model.rows import Rows
from model.transfer import to_device
from model.weights import CheckpointWeights
from model.weights_cache import WeightsCache

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class ModelRunner:
    """One loaded model with its latent pool and `max_num_seqs` rows. Not thread-safe: one thread executes."""

    def __init__(
        self,
        model: DeepseekForCausalLM,
        cache: LatentCache,
        rows: Rows,
        checkpoint: Checkpoint,
        max_model_len: int,
        weight_bytes: int,
    ) -> None:
        self.model = model
        self.cache = cache
        self.max_model_len = max_model_len
        """Longest prompt + output of one request, in tokens."""
        self.model_type = model.config.model_type
        self.fingerprint = checkpoint.fingerprint
        self.vocab_size = model.config.vocab_size
        self.eos_token_ids = model.config.eos_token_ids
        self.num_blocks = cache.num_blocks
        self.cache_bytes_per_token = cache.block_bytes // BLOCK_SIZE
        self.weight_bytes = weight_bytes
        self.device = str(cache.data.device)
        self.dtype = str(cache.dtype).removeprefix("torch.")
        self.ops = model.ops.name
        self.quantization = model.ops.quantization
        self.instruction_set = model.ops.instruction_set if isinstance(model.ops, CpuOps) else None
        self.prefill_attention = model.ops.prefill_attention
        self._rows = rows
        self._compute = model.ops.recorded(model.compute, model.config)

    @property
    def overlaps(self) -> bool:
        """The next step can be launched while this one runs. On a CPU there is nobody else to run it."""
        return self.cache.data.device.type == "cuda"

    def execute(self, batch: ForwardBatch) -> SampledTokens:
        """Compute one step: latents of all its tokens go to the cache, rows with `sample` get their next token.

        Raises ValueError, having computed nothing, where the batch contradicts what the rows hold, and MemoryError
        where there is too little memory: after a `reset` it can go on.
        """
        return self.launch(batch).collect()

    @torch.inference_mode()
    def launch(self, batch: ForwardBatch) -> LaunchedStep:
        """The same without waiting for a device: the next step may be launched before this one is collected. It reads
        the tokens that this one samples where they are; only behind drafts must they be collected first."""
        try:
            return self._launch(batch)
        except RuntimeError as error:
            if _is_out_of_memory(error):
                raise MemoryError(str(error).splitlines()[0]) from error
            raise

    def reset(self) -> None:
        """Unbind all rows, in whatever state a failed step has left them, and give unused memory back."""
        self._rows.reset()
        if self.cache.data.is_cuda:
            torch.cuda.empty_cache()

    def _launch(self, batch: ForwardBatch) -> LaunchedStep:
        inputs = self.prepare(batch)
        hidden, logits = self._compute_within_memory(inputs)
        prompts = self._score_prompts(batch, inputs, hidden)
        rows = batch.sampled_rows
        if not rows:
            return LaunchedStep(batch, self._rows, None, prompts)
        asked = {i: number for i, row in enumerate(rows) if (number := self._rows.params(row).logprobs) is not None}
        asking = to_device(np.array(list(asked), np.int64), logits.device) if asked else None
        raw = logits if asking is None else logits.index_select(0, asking)  # a copy: sampling overwrites
        token_ids = self.model.ops.sample(logits, self._rows.sampling_inputs(rows, batch.grammar_bitmasks))
        places = self._rows.feed(rows, token_ids)
        scores = None
        if asking is not None:
            scores = score(raw, token_ids.index_select(0, asking), max(asked.values()))
        return LaunchedStep(batch, self._rows, Sampled(token_ids, places, asked, scores), prompts)

    def _compute_within_memory(self, inputs: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Final hidden states and logits. A step whose activations or graph do not fit is computed half by half:
        latents that were written are written again, the same."""
        try:
            return self._compute(inputs, self.cache)
        except RuntimeError as error:
            if inputs.num_tokens == 1 or not _allocator_ran_out(error):
                raise
            logger.warning("a step of %d tokens is computed in parts: %s", inputs.num_tokens, error)
        hidden = self._hidden_in_parts(inputs)
        return hidden, self.model.logits(self.model.ops.gather(hidden, inputs.sample_index))

    def _hidden_in_parts(self, inputs: StepInputs) -> torch.Tensor:
        if self.cache.data.device.type == "cuda":
            torch.cuda.empty_cache()  # what is left in pieces of other sizes
        parts = []
        for part in inputs.halves():
            try:
                parts.append(self.model(part, self.cache))
            except torch.OutOfMemoryError:
                if part.num_tokens == 1:
                    raise
                parts.append(self._hidden_in_parts(part))
        return torch.cat(parts)

    def _score_prompts(self, batch: ForwardBatch, inputs: StepInputs, hidden: torch.Tensor) -> dict[int, ScoredPrompt]:
        """Of the prompt tokens that this step's positions predict, for rows that ask.

        The head runs over a few positions at a time: the logits of a long prompt, 50 GiB at 128K tokens, never exist.
        """
        prompts: dict[int, ScoredPrompt] = {}
        for scheduled, first in zip(batch.rows, inputs.query_start, strict=False):
            num_top = self._rows.params(scheduled.row).prompt_logprobs
            if num_top is None:
                continue
            predicted = self._rows.predicted_prompt_tokens(scheduled)
            if predicted:
                token_ids = to_device(np.array(predicted, np.int64), hidden.device)
                states = hidden[first : first + len(predicted)]
                scores = together(
                    [
                        score(self.model.logits(part), chosen, num_top)
                        for part, chosen in zip(
                            torch.split(states, SLICE_ROWS), torch.split(token_ids, SLICE_ROWS), strict=True
                        )
                    ]
                )
                prompts[scheduled.row] = ScoredPrompt(predicted, num_top, scores)
        return prompts

    def prepare(self, batch: ForwardBatch) -> StepInputs:
        """Apply `batch` to the rows and gather what the network reads."""
        self._rows.update(batch)
        return self._rows.step_inputs(batch)

    def prepare_decoding(self, max_num_seqs: int) -> None:
        """Run every size of decoding steps that is kept ready, the largest first: the others fit into its memory."""
        for size in sorted({min(size, max_num_seqs) for size in self.model.ops.decode_sizes}, reverse=True):
            self.execute(decode_step(size))
            self.reset()

    def warm_up(self, max_num_tokens: int) -> None:
        """Prefill and decode once on row 0 and block 0, the way every request goes; then both are free again.

        Raises CheckpointError if what comes out is not finite.
        """
        num_tokens = min(max_num_tokens, min(BLOCK_SIZE, self.max_model_len) - 1)
        token = self.model.config.bos_token_id or 0
        params = SamplingParams(max_tokens=2, seed=0, top_p=0.9)
        new = NewRow(row=0, tokens=array("I", [token] * num_tokens), num_prompt_tokens=num_tokens, params=params)
        prefill = ScheduledRow(row=0, start=0, num_tokens=num_tokens, new_blocks=[0], sample=True)
        decode = ScheduledRow(row=0, start=num_tokens, num_tokens=1, sample=True)
        outcome = self.execute(ForwardBatch(step=-2, rows=[prefill], new_rows=[new])).token_ids
        outcome += self.execute(ForwardBatch(step=-1, rows=[decode])).token_ids
        self._rows.update(ForwardBatch(step=-1, rows=[], released_rows=[0]))
        if min(outcome) < 0:
            raise CheckpointError(f"the network's logits are not finite in {self.dtype}: wrong weights, or an overflow")


def load_runner(
    model_dir: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "none",
    kv_cache_dtype: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 512,
    num_blocks: int | None = None,
    kv_cache_memory: int | None = None,
    num_threads: int | None = None,
    weights_cache: Path | None = None,
    progress: bool = True,
) -> ModelRunner:
    """Load a checkpoint folder and answer once; options as in `scheduler.config.EngineConfig`.

    Everything that can be refused is refused before memory is taken: CheckpointError or ConfigError, one line.
    """
    num_threads = num_threads or usable_cores()
    torch.set_num_threads(num_threads)
    config = load_config(model_dir)
    checkpoint = open_checkpoint(model_dir, config)
    torch_device = _choose_device(device)
    dtype = _choose_dtype(dtype, checkpoint.file_dtype)
    torch_dtype = _DTYPES[dtype]
    available = available_memory() if torch_device.type == "cpu" else torch.cuda.mem_get_info(torch_device)[0]
    fp8 = kv_cache_dtype == "fp8"
    ops = _choose_ops(config, torch_dtype, torch_device, num_threads, quantization, fp8)
    require_memory(
        config,
        available=available,
        dtype=dtype,
        block_size=BLOCK_SIZE,
        quantization=quantization,
        fp8_cache=fp8,
    )
    weight_bytes = weight_bytes_in(config, dtype, quantization)
    sized = partial(
        size_pool,
        config,
        bytes_per_token=config.cache_bytes_per_token(torch_dtype.itemsize, fp8),
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        kv_cache_memory=kv_cache_memory,
    )
    size = sized(free_bytes=available - weight_bytes)
    packed = None
    if weights_cache is not None:
        if ops.packing is None:
            logger.info("weights cache: %s operations take the weights as they are, nothing is kept", ops.name)
        else:
            packed = WeightsCache(weights_cache, checkpoint, ops.packing, num_threads)
    kept = None if packed is None else packed.read()
    with CheckpointWeights(checkpoint, torch_dtype, torch_device, progress, kept) as weights:
        model = DeepseekForCausalLM(config, ops, weights)
    if packed is not None and kept is None:
        packed.write(weights.made)
    allocate = partial(
        LatentCache,
        num_layers=config.num_hidden_layers,
        latent_dim=config.latent_dim,
        dtype=torch_dtype,
        device=torch_device,
        fp8_latents=config.kv_lora_rank if fp8 else 0,
    )
    if torch_device.type == "cuda":
        longest = size.max_model_len if max_model_len is None else max_model_len
        free = _memory_beside_steps(model, checkpoint, allocate(1), longest, max_num_seqs, max_num_batched_tokens)
        size = sized(free_bytes=free, share=LARGEST_SHARE)
    cache = allocate(size.num_blocks)
    eos_token_ids = [token_id for token_id in config.eos_token_ids if token_id < config.vocab_size]
    rows = Rows(max_num_seqs, size.max_model_len, eos_token_ids, torch_device)
    runner = ModelRunner(model, cache, rows, checkpoint, size.max_model_len, weight_bytes)
    if ops.name == "cpu":
        torch.set_num_threads(1)  # its threads would spin on the cores of the kernels' own
    runner.prepare_decoding(max_num_seqs)
    runner.warm_up(max_num_batched_tokens)
    trim()
    logger.info(
        "%s in %s on %s by the %s operations: %s of weights, "
        "%s of latent cache (%d blocks of %d tokens), at most %d tokens a request",
        *(config.model_type, weights_in(dtype, quantization), torch_device, _described(runner)),
        *(in_gib(runner.weight_bytes), in_gib(cache.block_bytes * size.num_blocks), size.num_blocks, BLOCK_SIZE),
        size.max_model_len,
    )
    return runner


def _memory_beside_steps(
    model: DeepseekForCausalLM,
    checkpoint: Checkpoint,
    cache: LatentCache,
    longest: int,
    max_num_seqs: int,
    max_num_tokens: int,
) -> int:
    """Bytes of the GPU that are free when the largest steps have run: a prompt's last chunk over a context of `longest`
    tokens, and a token of every row, with its graph. The allocator still holds then what it gave them."""
    device = cache.data.device
    runner = ModelRunner(model, cache, Rows(max_num_seqs, longest, device=device), checkpoint, longest, 0)
    runner.execute(prompt_step(min(max_num_tokens, longest - 1), longest - 1))
    runner.reset()
    runner.execute(decode_step(max_num_seqs))
    free = torch.cuda.mem_get_info(device)[0]
    del runner, cache
    torch.cuda.empty_cache()
    return free


def _is_out_of_memory(error: BaseException | None) -> bool:
    """torch's allocator of a GPU has a class of its own for it; a CPU's, the driver, which loads kernels and graphs,
    and cuBLAS have only words. A capture that ran out of it ends with another error in its place."""
    if error is None or _allocator_ran_out(error):
        return error is not None
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return any(word in str(error) for word in words) or _is_out_of_memory(error.__context__)


def _allocator_ran_out(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or _allocator_ran_out(error.__context__))


def _described(runner: ModelRunner) -> str:
    return runner.ops if runner.instruction_set is None else f"{runner.ops} ({runner.instruction_set})"


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch finds no usable GPU here")
    return torch.device(device)


def _choose_ops(
    config: DeepseekConfig,
    dtype: torch.dtype,
    device: torch.device,
    num_threads: int,
    quantization: str,
    fp8_cache: bool = False,
) -> Ops:
    """The kernels that compute this network there, else plain torch, which does not quantise."""
    reason = obstacle(config, dtype, device, fp8_cache)
    if reason is None:
        if (kernels := library()) is not None:
            return CpuOps(kernels, num_threads, quantization)
        reason = "there are none: install a C++ compiler, then run `python -m model.ops.cpu.build`"
    if device.type == "cuda" and dtype is not torch.float32 and find_spec("triton") is not None:
        from model.ops.cuda.cudnn import chosen  # torch for CPUs comes without triton
        from model.ops.cuda.device import KERNEL_MEMORY, shared_memory
        from model.ops.cuda.ops import CudaOps

        if (memory := shared_memory(device)) < KERNEL_MEMORY:
            reason = f"they need {KERNEL_MEMORY} bytes of shared memory, and the GPU has {memory}"
            logger.warning("no Triton kernels: %s", reason)
        elif quantization != "none" and config.n_shared_experts and (config.moe_intermediate_size or 0) % 64:
            reason = f"moe_intermediate_size {config.moe_intermediate_size} is no multiple of 64"
        else:
            return CudaOps(quantization, chosen(config, dtype, device))
    if quantization != "none":
        raise ConfigError(f"quantization {quantization} is computed by kernels, but {reason}")
    if fp8_cache and device.type == "cpu":
        logger.warning("kv_cache_dtype fp8: plain torch computes, slower than the CPU kernels with kv_cache_dtype auto")
    return EagerOps(onednn=can_lay_out(dtype, device))


def _choose_dtype(dtype: str, file_dtype: str) -> str:
    if dtype == "auto":
        return "float32" if file_dtype == "float32" else "bfloat16"
    return dtype
