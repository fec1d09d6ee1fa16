"""The course of a match as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from c2m3_fl.core.result import Step


def draw_convergence(steps: Sequence[Step], file: Path) -> None:
    """Agreement, duality gap or gain, and step size against the steps that a callback has collected.

    Steps of tried reheatings are left out; a reheating that raised the agreement is one step.

    Parameters
    ----------
    steps : sequence of Step
        The steps that `match` gave its callback, at least one.
    file : Path
        Where the picture goes; its suffix decides the format.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    steps = [step for step in steps if not step.trial]
    numbers = [step.step for step in steps]
    figure, panels = plt.subplots(3, 1, figsize=(6.4, 6.4), sharex=True, layout="constrained")
    panels[0].plot(numbers, [step.objective for step in steps], ".-", color="#0072B2")
    panels[0].set_ylabel("agreement")
    gaps = [(step.step, step.gap) for step in steps if step.gap is not None and step.gap > 0]
    gains = [(step.step, step.gain) for step in steps if step.gain > 0]
    for points, mark, colour, label in ((gaps, ".-", "#D55E00", "gap before"), (gains, "x", "#009E73", "gain")):
        if points:
            panels[1].semilogy(*zip(*points, strict=True), mark, color=colour, label=label)
    panels[1].set_ylabel("relative to the scale")
    if gaps or gains:
        panels[1].legend(frameon=False)
    panels[2].plot(numbers, [step.step_size for step in steps], ".", color="#333333", label="step size")
    panels[2].plot(numbers, [step.share_moved for step in steps], "-", color="#CC79A7", label="share of units moved")
    panels[2].set(xlabel="step", ylim=(-0.02, 1.05))
    panels[2].legend(frameon=False)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.8)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(file, dpi=150)
    plt.close(figure)
