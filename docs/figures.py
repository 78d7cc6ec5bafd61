"""Draw the pictures of the README: python docs/figures.py writes docs/study.svg."""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from demo.study import T95, read_lines, values  # noqa: E402

STYLE = """<style>
text { font: 12px sans-serif; fill: #222 } .small { font-size: 11px; fill: #666 }
.grid { stroke: #ddd } .seed { fill: #8aa } .mean { stroke: #0a5; stroke-width: 3 }
.control { stroke: #c60; stroke-width: 3 } .other { stroke: #36c; stroke-width: 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #eee } .small { fill: #aaa } .grid { stroke: #444 } .seed { fill: #799 }
  .mean { stroke: #3d8 } .control { stroke: #f93 } .other { stroke: #7af }
}
</style>"""
PANELS = {  # metric: (title, lowest, highest), in percent
    "knn200": ("kNN on z, slides", 40, 90),
    "attributes": ("linear on attribute scores, slides", 40, 90),
    "zero-shot": ("zero-shot, slides", 20, 90),
    "auc": ("AUC of the attributes", 50, 95),
}
GAP = 45  # pixels from one panel to the next
ARMS = ("start", "SimCLR", "HiDisc", "HLSS", "HVC", "HiDisc + AR", "HiDisc + AR, control")
ARMS += ("HVC + AR", "HVC + AR, control")


def study(setting="centre"):
    """One panel for each metric, a row for each arm: a dot for each seed, the mean, and its 95%
    interval by Student's t."""
    lines = read_lines()
    left, width, row = 150, 190, 22  # pixels
    height = 60 + row * len(ARMS)
    total = left + len(PANELS) * (width + GAP)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}">', STYLE]
    for i, arm in enumerate(ARMS):
        parts.append(f'<text x="{left - 10}" y="{54 + row * i}" text-anchor="end">{arm}</text>')
    for column, (metric, (title, low, high)) in enumerate(PANELS.items()):
        x0 = left + column * (width + GAP)
        parts.append(f'<text x="{x0}" y="16">{title}</text>')
        for tick in range(low, high + 1, 10):
            x = x0 + width * (tick - low) / (high - low)
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="38" y2="{height - 20}"/>')
            parts.append(f'<text class="small" x="{x}" y="32" text-anchor="middle">{tick}</text>')
        for i, arm in enumerate(ARMS):
            found = 100 * np.array(list(values(lines, setting, arm, metric).values()))
            if len(found) < 2:
                continue
            y = 50 + row * i
            half = T95[len(found)] * found.std(ddof=1) / len(found) ** 0.5
            ends = np.clip([found.mean() - half, found.mean() + half], low, high)
            x1, x2, middle, *seeds = x0 + width * (
                np.array([*ends, found.mean(), *np.clip(found, low, high)]) - low
            ) / (high - low)
            kind = "control" if "control" in arm else "mean" if "AR" in arm else "other"
            parts += [f'<circle class="seed" cx="{x:.1f}" cy="{y + 5}" r="2"/>' for x in seeds]
            parts.append(
                f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y - 2}" y2="{y - 2}"/>'
            )
            parts.append(
                f'<line class="{kind}" x1="{middle:.1f}" x2="{middle:.1f}" y1="{y - 7}" '
                f'y2="{y + 3}"/>'
            )
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    (HERE / "study.svg").write_text(study())
