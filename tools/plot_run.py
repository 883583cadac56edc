#!/usr/bin/env python3
"""Draws the log-probabilities of chosen and rejected answers over a run's steps, one panel a run, as SVG.

    python3 tools/plot_run.py ORPO=out-orpo SFT=out-sft --svg curves.svg [--smooth 10]

Each run is a folder with metrics.jsonl, or such a file, with a title before `=` if wanted.  Thin lines are training
batches (a running mean), thick lines with dots the held-out pairs.  Panels share their axes, so that runs can be
compared by eye.  Standard library only.
"""
import argparse
import json
import math
import sys
from html import escape
from pathlib import Path

SERIES = {"chosen": "#0a7d55", "rejected": "#c2410c"}
PANEL, HEIGHT, LEFT, TOP, GAP, BOTTOM = 420, 300, 58, 64, 28, 46
INK, FAINT = "#1f2933", "#d9dee4"


def fail(message):
    print(f"plot_run: {message}", file=sys.stderr)
    sys.exit(2)


def read_run(path):
    """{(part, side): [(step, value)]} for part train or eval and side chosen or rejected."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        fail(f"{file}: {error.strerror}: give a run's output folder or its metrics.jsonl")
    except json.JSONDecodeError as error:
        fail(f"{file}: not JSON Lines: {error}")
    curves = {}
    for part, prefix in (("train", ""), ("eval", "eval_")):
        for side in SERIES:
            name = f"{prefix}logps/{side}"
            points = [(entry["step"], entry[name]) for entry in entries if isinstance(entry.get(name), (int, float))]
            if points:
                curves[part, side] = points
    if not curves:
        fail(f"{file}: no logps/chosen in it")
    return curves


def running_mean(points, width):
    return [(step, sum(value for _, value in points[max(0, i + 1 - width):i + 1]) / min(width, i + 1))
            for i, (step, _) in enumerate(points)]


def ticks(low, high, count=5):
    """Round numbers that cover [low, high]."""
    raw = (high - low) / count or 1
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


class Drawing:
    def __init__(self, width, height):
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                      f'height="{height}" font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
                      '<rect width="100%" height="100%" fill="#fff"/>']

    def line(self, points, color, width, opacity=1.0):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" '
                          f'stroke-linejoin="round" opacity="{opacity}"/>')

    def dot(self, x, y, color):
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{color}"/>')

    def text(self, x, y, text, anchor="start", extra=""):
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(text)}</text>')

    def finish(self):
        return "\n".join(self.parts) + "\n</svg>\n"


def draw_panel(drawing, left, title, curves, x_ticks, y_ticks, first):
    def x(step):
        return left + PANEL * (step - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def y(value):
        return TOP + HEIGHT * (y_ticks[-1] - value) / (y_ticks[-1] - y_ticks[0])

    drawing.text(left, TOP - 12, title, extra='font-weight="600" font-size="14"')
    for tick in y_ticks:
        drawing.line([(left, y(tick)), (left + PANEL, y(tick))], FAINT, 1)
        if first:
            drawing.text(left - 8, y(tick) + 4, f"{tick:g}".replace("-", "\u2212"), "end")
    for tick in x_ticks:
        drawing.text(x(tick), TOP + HEIGHT + 18, f"{tick:g}", "middle")
    drawing.text(left + PANEL / 2, TOP + HEIGHT + 38, "step", "middle")
    for (part, side), points in curves.items():
        placed = [(x(step), y(value)) for step, value in points]
        drawing.line(placed, SERIES[side], 2.2 if part == "eval" else 1, 1 if part == "eval" else 0.55)
        if part == "eval":
            for at in placed:
                drawing.dot(*at, SERIES[side])


def draw(runs, smooth):
    runs = [(title, {key: running_mean(points, smooth) if key[0] == "train" else points
                     for key, points in curves.items()}) for title, curves in runs]
    every = [point for _, curves in runs for points in curves.values() for point in points]
    x_ticks = ticks(min(step for step, _ in every), max(step for step, _ in every))
    y_ticks = ticks(min(value for _, value in every), max(value for _, value in every), 6)
    width = LEFT + len(runs) * (PANEL + GAP)
    drawing = Drawing(width, TOP + HEIGHT + BOTTOM)
    at = LEFT
    for side, color in SERIES.items():
        drawing.line([(at, 18), (at + 24, 18)], color, 2.2)
        drawing.dot(at + 12, 18, color)
        drawing.text(at + 30, 22, f"{side}, held out")
        drawing.line([(at + 142, 18), (at + 162, 18)], color, 1, 0.55)
        drawing.text(at + 167, 22, "training")
        at += 226
    drawing.text(16, TOP + HEIGHT / 2, "mean log-probability of a response token", "middle",
                 f'transform="rotate(-90 16 {TOP + HEIGHT / 2})"')
    for i, (title, curves) in enumerate(runs):
        draw_panel(drawing, LEFT + i * (PANEL + GAP), title, curves, x_ticks, y_ticks, i == 0)
    return drawing.finish()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="[TITLE=]RUN")
    parser.add_argument("--svg", type=Path, required=True, metavar="FILE")
    parser.add_argument("--smooth", type=int, default=10, metavar="STEPS", help="width of the training lines' mean")
    args = parser.parse_args()
    if args.smooth < 1:
        fail(f"--smooth {args.smooth}: must be at least 1")
    runs = []
    for run in args.runs:
        title, _, path = run.rpartition("=")
        runs.append((title or Path(path).name, read_run(Path(path))))
    args.svg.write_text(draw(runs, args.smooth), encoding="utf-8")
    print(f"wrote {args.svg}")


if __name__ == "__main__":
    main()
