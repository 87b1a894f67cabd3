"""The training tool: what the weights start with, what a step reads, and that the exported file is what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import model
from tools.builtin_model import export, train
from tools.builtin_model.initial import MATCHES, NEIGHBOURS, write_initial
from tools.builtin_model.layout import make_layout
from tools.builtin_model.network import Network, attention_bias
from tools.builtin_model.optimiser import Optimiser, Rates, orthogonalised
from tools.builtin_model.schedule import Schedule
from tools.builtin_model.shape import hub_config, read_config
from tools.builtin_model.state import MIXES, open_data, read_checkpoint
from tools.builtin_model.windows import Mix, Windows

BOS, EOS = 0, 1
CONFIG = read_config(hub_config(BOS, EOS))
LAYOUT = make_layout(CONFIG)
TEXTS = [f"word{token}" for token in range(CONFIG.vocab_size)]


def initial(texts: list[str] = TEXTS) -> dict[str, Tensor]:
    flat = torch.zeros(LAYOUT.size)
    write_initial(CONFIG, LAYOUT, flat, texts, seed=7)
    return LAYOUT.views(flat)


def made_up_mix(seed: int, documents: int = 60, bos: int = BOS, vocab: int = 3000) -> Mix:
    """Documents of 8 to 60 tokens, whose second half is what is trained."""
    random = np.random.default_rng(seed)
    tokens, weights, starts = [], [], [0]
    for size in random.integers(8, 60, documents):
        tokens += [bos, *random.integers(2, vocab, size - 1).tolist()]
        weights += [0] * (size - size // 2) + [10] * (size // 2)
        starts.append(len(tokens))
    return Mix(np.array(tokens, np.uint16), np.array(weights, np.uint8), np.array(starts, np.int64))


@torch.inference_mode()
def test_heads_match_a_repeated_random_text_from_the_start() -> None:
    weights, network, size = initial(), Network(CONFIG, torch.float32), 100
    text = torch.randperm(CONFIG.vocab_size - 2, generator=torch.Generator().manual_seed(1))[:size] + 2
    token_ids = torch.cat((torch.tensor([BOS]), text, text))[None]
    bias = attention_bias(torch.zeros_like(token_ids), torch.float32)
    repeated = torch.arange(size + 5, 2 * size)
    h = weights["embed_tokens"][token_ids]
    for layer in range(max(match.layer for match in MATCHES) + 1):
        name = f"layers.{layer}"
        x = network.norm(h, weights[f"{name}.input_layernorm"])
        queries, keys, _ = network.projections(weights, layer, x)
        shares = (queries @ keys.transpose(2, 3) + bias).softmax(-1)[0]
        if layer == 0:
            for head in range(NEIGHBOURS):
                assert shares[head, repeated, repeated - head - 1].mean() > 0.9
        for match in MATCHES:
            if match.layer == layer:
                assert shares[0, repeated, repeated - size + match.key_back - match.query_back].mean() > 0.8
        h = h + network.attention(weights, layer, x, bias)
        x = network.norm(h, weights[f"{name}.post_attention_layernorm"])
        if CONFIG.is_moe_layer(layer):
            h = h + network.mixture(weights, f"{name}.mlp", x[0])[0]
        else:
            h = h + network.swiglu(weights, f"{name}.mlp", x)


def test_forms_of_a_word_start_alike() -> None:
    embedding = initial([" Dublin", "Dublin", " dublin", *TEXTS[3:]])["embed_tokens"][:, 1:]
    alike = torch.nn.functional.cosine_similarity(embedding[:1], embedding[1:4])
    assert alike[:2].min() > 0.65
    assert alike[2].abs() < 0.3


def test_updates_have_singular_values_near_one() -> None:
    update = orthogonalised(torch.randn(2, 64, 96, generator=torch.Generator().manual_seed(1))).float()
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.2
    assert values.max() < 1.5


def test_windows_hold_whole_documents_that_no_other_process_gets() -> None:
    mix = made_up_mix(1)
    stored = [tuple(mix.tokens[start:stop]) for start, stop in zip(mix.starts, mix.starts[1:], strict=False)]
    seen = []
    for rank in range(2):
        windows = Windows({"a": mix}, {"a": 1.0}, (2, 64), rank=rank, processes=2, seed=3)
        of_rank = set()
        for _ in range(20):
            batch = windows.next_batch()
            for tokens, documents in zip(batch.token_ids, batch.documents, strict=True):
                of_rank |= {tuple(tokens[documents == number].tolist()) for number in documents.unique() if number}
            aimed = batch.positions[batch.weights > 0]
            assert torch.equal(batch.token_ids.flatten()[aimed + 1], batch.targets[batch.weights > 0])
            assert (batch.targets[batch.weights > 0] != BOS).all()
        assert of_rank <= set(stored)
        seen.append(of_rank)
    assert seen[0]
    assert not seen[0] & seen[1]


def test_rates_fall_over_the_last_tokens_only() -> None:
    schedule = Schedule(60_000_000)
    assert [schedule.phase(done).name for done in (0, 4_000_000, 45_000_000)] == ["short", "long", "recall"]
    rates = [schedule.rates(done, 100).matrices for done in (0, 41_000_000, 51_000_000, 60_000_000)]
    assert rates == pytest.approx([0.010, 0.005, 0.0025, 0.0001])
    assert schedule.rates(0, 0).matrices == pytest.approx(0.010 / 20)
    assert Schedule(60_000_000, from_checkpoint=True).phase(0).name == "long"


def test_export_computes_what_was_trained(tmp_path: Path) -> None:
    flat, gradients = torch.zeros(LAYOUT.size), torch.zeros(1, LAYOUT.size)
    write_initial(CONFIG, LAYOUT, flat, TEXTS, seed=7)
    average = flat.clone()
    weights = {name: view.requires_grad_() for name, view in LAYOUT.views(flat).items()}
    optimiser, network = Optimiser(LAYOUT, flat, average, gradients, rank=0), Network(CONFIG, torch.bfloat16)
    mix, losses = made_up_mix(1, documents=8), []
    windows = Windows({"a": mix}, {"a": 1.0}, (4, 64), rank=0, processes=1, seed=3)
    for _ in range(4):
        batch = windows.next_batch()
        total, likelihood, _ = network.loss(weights, batch, attention_bias(batch.documents, torch.bfloat16))
        for own, gradient in zip(
            LAYOUT.views(gradients[0]).values(), torch.autograd.grad(total, list(weights.values())), strict=True
        ):
            own.copy_(gradient)
        with torch.no_grad():
            optimiser.step(Rates(0.01, 2e-3))
        losses.append(likelihood.item())
    assert losses[-1] < losses[0] - 0.3
    assert not torch.equal(average, flat)
    export.write_checkpoint(tmp_path, CONFIG, LAYOUT, average, BOS, EOS)
    assert export.check_checkpoint(tmp_path, CONFIG, LAYOUT, average, made_up_mix(2, documents=5)) < export.TOLERANCE
    again = torch.full_like(average, torch.nan)
    read_checkpoint(tmp_path, LAYOUT, again)
    assert torch.equal(again, average.bfloat16().float())
    with pytest.raises(SystemExit, match="computes other logits"):
        export.check_checkpoint(tmp_path, CONFIG, LAYOUT, average * 1.1, made_up_mix(2, documents=5))


@pytest.mark.slow
def test_two_processes_train_and_go_on(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    shutil.copy(Path(model.__file__).parent / "builtin/tokenizer.json", data)
    bos = json.loads((Path(model.__file__).parent / "builtin/config.json").read_text())["bos_token_id"]
    for number, name in enumerate(MIXES):
        mix = made_up_mix(number, bos=bos)
        np.save(data / f"{name}.tokens.npy", mix.tokens)
        np.save(data / f"{name}.weights.npy", mix.weights)
    parser = train.argparse.ArgumentParser()
    train.add_arguments(parser)
    for tokens, more in (("8192", []), ("16384", ["--resume"])):
        train.run(parser.parse_args(["--data", str(data), "--out", str(out), "--tokens", tokens, "--eager", *more]))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines if "validation" in line] == [8192, 16384]
    assert (out / "loss.svg").read_text().startswith("<svg")
    assert open_data(data).layout.size == len(train.load_state(out).weights)
