"""Draw docs/images/demo.png, the figure of the README, from the folder of a finished demo run.

    python scripts/demo_figure.py runs/demo

Training loss and held-out bits per byte over tokens, with a line at the bits per byte of xz -9e on the full corpus.
"""

import lzma
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusedlm.config import load_recipe
from fusedlm.data.sources import open_source
from fusedlm.report.history import half_life, read_history, smooth

PICTURE = Path(__file__).resolve().parent.parent / "docs/images/demo.png"
INK, FAINT, RAW, LINE, SECOND = "#24292f", "#d8dee4", "#a9c4e6", "#1f5fad", "#c9762b"


def main() -> int:
    run = Path(sys.argv[1])
    history = read_history(run)
    source = open_source(load_recipe(run / "recipe.yaml").data.source)
    text = "".join(document.text for document in source.documents()).encode()
    xz = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)

    figure = Figure(figsize=(9.2, 3.1), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    millions, loss = history.steps["tokens"] / 1e6, history.steps["loss"]
    left.plot(millions, loss, color=RAW, linewidth=0.8)
    left.plot(millions, smooth(loss, half_life(len(loss))), color=LINE, linewidth=1.8)
    left.set_ylabel("Training loss (nats per token)")
    bpb = history.validation["val_bpb"]
    right.plot(history.validation["tokens"] / 1e6, bpb, color=LINE, linewidth=1.8, marker="o", clip_on=False)
    end = (history.validation["tokens"][-1] / 1e6, bpb[-1])
    right.annotate(f"{bpb[-1]:.3f}", end, (-12, -4), textcoords="offset points", ha="right", fontsize=9, color=LINE)
    right.axhline(xz, color=SECOND, linewidth=1.2, linestyle="--")
    label = f"xz -9e, whole corpus: {xz:.2f}"
    right.annotate(label, (end[0], xz), (0, 4), textcoords="offset points", ha="right", fontsize=9, color=SECOND)
    right.set_ylabel("Held-out bits per byte")
    right.set_ylim(bottom=min(bpb.min(), xz) - 0.15)
    for axes in (left, right):
        axes.set_xlim(0, millions[-1])
        axes.set_xlabel("Tokens (millions)")
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(labelcolor=INK, labelsize=8.5, color=FAINT)
        axes.xaxis.label.set_fontsize(9)
        axes.yaxis.label.set_fontsize(9)
    figure.savefig(PICTURE, metadata={"Software": None})
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
