"""The loss curve of a run as an SVG file, from its log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, MARGIN = 900, 420, 50
LOSS_RANGE = (0.02, 10.0)


def write_plot(run: Path) -> None:
    """RUN/log.jsonl -> RUN/loss.svg: training loss (thin) and validation loss (dots) over tokens, on a log scale."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = max(line["tokens"] for line in lines)
    low, high = map(math.log, LOSS_RANGE)

    def place(tokens: float, loss: float) -> tuple[float, float]:
        height = (math.log(min(max(loss, LOSS_RANGE[0]), LOSS_RANGE[1])) - low) / (high - low)
        return MARGIN + tokens / last * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - height * (HEIGHT - 2 * MARGIN)

    trained = [place(line["tokens"], line["loss"]) for line in lines if "loss" in line]
    validated = [place(line["tokens"], line["validation"]) for line in lines if "validation" in line]
    parts = [f'<polyline fill="none" stroke="#48c" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in trained)}"/>']
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#c33"/>' for x, y in validated]
    for loss in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10):
        x, y = place(0, loss)
        parts.append(f'<path d="M{x} {y:.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4:.1f}" text-anchor="end">{loss}</text>')
    parts += _phase_marks(lines, place)
    parts.append(f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 20}" text-anchor="end">{last / 1e6:.1f}M tokens</text>')
    parts.append(f'<text x="{MARGIN}" y="24">loss: training (line), validation (dots)</text>')
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
    svg += 'font-size="12"><rect width="100%" height="100%" fill="#fff"/>' + "\n".join(parts) + "</svg>\n"
    (run / "loss.svg").write_text(svg, encoding="utf-8")


def _phase_marks(lines: list[dict[str, Any]], place: Any) -> list[str]:
    marks, phase = [], None
    for line in lines:
        if line.get("phase", phase) != phase:
            phase = line["phase"]
            x, _ = place(line["tokens"], 1.0)
            marks.append(f'<path d="M{x:.1f} {MARGIN}V{HEIGHT - MARGIN}" stroke="#999" stroke-dasharray="4"/>')
            marks.append(f'<text x="{x + 4:.1f}" y="{MARGIN}">{phase}</text>')
    return marks
