"""A picture of the predicted schedule of one block."""

from __future__ import annotations

import os

from monoformer_jax.errors import InputError
from monoformer_jax.planning.schedule import Prediction, Span


def save_schedule(path: str | os.PathLike, prediction: Prediction) -> None:
    """Draws one iteration of the loop that takes longest, which is a block's backward pass, as a PNG:
    compute above, collectives below; the gaps in the compute are exposed communication.

    Raises:
      InputError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("--picture needs matplotlib: pip install matplotlib") from None
    loops = {name: spans for name, spans in prediction.spans.items() if name != "ENTRY" and spans}
    spans = max(loops.values(), key=lambda spans: spans[-1].end, default=prediction.spans["ENTRY"])
    figure, axis = plt.subplots(figsize=(12, 3.2))
    names = sorted({(span.collective, span.label) for span in spans})
    colours = plt.get_cmap("tab20").colors
    for number, (collective, label) in enumerate(names):
        found = [s for s in spans if (s.collective, s.label) == (collective, label)]
        bars = [(1e3 * s.begin, 1e3 * (s.end - s.begin)) for s in found]
        place = (0, 0.8) if collective else (1, 0.8)
        axis.broken_barh(bars, place, color=colours[number % 20], label=_legend(label, found))
    axis.set_yticks([0.4, 1.4], ["collectives", "compute"])
    axis.set_xlabel("ms, predicted from the compiler's schedule; nothing was timed")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _legend(label: str, spans: list[Span]) -> str:
    return f"{label} {1e3 * sum(span.end - span.begin for span in spans):.2f} ms"
