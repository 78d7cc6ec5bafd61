"""Draw the pictures of the README, docs/method.svg and docs/study.svg: python docs/figures.py"""

import base64
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from data import AUGMENTATIONS, make_views, view_parameters  # noqa: E402
from demo.study import ARMS, T95, finished, read_lines, values  # noqa: E402
from demo.tissue import CLASSES, render  # noqa: E402
from demo.truth import DEMO_BANK  # noqa: E402
from describe import read_bank_file  # noqa: E402
from losses import LEVELS  # noqa: E402

STYLE = """<style>
text { font: 12px sans-serif; fill: #222 } .small { font-size: 11px; fill: #666 }
.grid { stroke: #ddd } .seed { fill: #8aa } .mean { stroke: #0a5; stroke-width: 3 }
.control { stroke: #c60; stroke-width: 3 } .other { stroke: #36c; stroke-width: 3 }
.title { font-weight: bold } .middle { text-anchor: middle }
.box { fill: none; stroke: #999 } .loss { fill: none; stroke: #0a5; stroke-width: 2 }
.words { fill: none; stroke: #c60; stroke-width: 1.5 } .arrow { fill: none; stroke: #666 }
.head { fill: #666 } .attract { fill: #0a5 } .itself { fill: #999 } .repel { fill: #e4e4e4 }
@media (prefers-color-scheme: dark) {
  text { fill: #eee } .small { fill: #aaa } .grid { stroke: #444 } .seed { fill: #799 }
  .mean { stroke: #3d8 } .control { stroke: #f93 } .other { stroke: #7af }
  .box { stroke: #888 } .loss { stroke: #3d8 } .words { stroke: #f93 } .arrow { stroke: #aaa }
  .head { fill: #aaa } .attract { fill: #3d8 } .repel { fill: #333 }
}
</style>"""
PANELS = {  # metric: (title, lowest, highest), in percent
    "knn200": ("kNN on z, slides", 40, 90),
    "attributes": ("linear on attribute scores, slides", 40, 90),
    "zero-shot": ("zero-shot, slides", 20, 90),
    "auc": ("AUC of the attributes", 50, 95),
}
EXAMPLES = {  # an attribute of each level, whose first sentence is shown
    "patch": "sparse nuclei",
    "slide": "broad necrotic zones",
    "patient": "smooth matrix across slides",
}
SIDE = 32  # pixels of a view in the figure of the method
GAP = 45  # pixels from one panel to the next


def label(x, y, words, kind=""):
    """A line of text; kind: classes of STYLE."""
    return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'


def box(x, y, width, height, lines=(), kind="box"):
    """A rounded box with lines of text in its middle."""
    parts = [f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>']
    first = y + height / 2 + 4 - 8 * (len(lines) - 1)
    for i, words in enumerate(lines):
        parts.append(label(x + width / 2, first + 16 * i, words, "middle small" if i else "middle"))
    return "".join(parts)


def arrow(*points):
    """A line through these points (x, y), with a head at the last of them."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline class="arrow" marker-end="url(#head)" points="{path}"/>'


def thumbnails():
    """16 views of demo tissue, two of each patch, as addresses of small pictures; and their ids
    [16, 3]: patch, slide and patient of each."""
    rng = np.random.default_rng(3)
    patches = []
    for mean in (CLASSES["spindle"], CLASSES["high_grade"]):
        stain = np.array((1, 1, 0)) + rng.normal(0, (0.15, 0.15, 0.05))
        patches += [render(mean, rng, stain) for _ in range(4)]
    patches = torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2)
    numbers = view_parameters(AUGMENTATIONS["demo"], seed=1, step=1, places=range(8), views_each=2)
    views = make_views(patches, numbers, 2 * SIDE)
    addresses = []
    for view in views.permute(0, 2, 3, 1):
        file = io.BytesIO()
        Image.fromarray((255 * view).byte().numpy()).save(file, "JPEG", quality=80)
        text = base64.b64encode(file.getvalue()).decode()
        addresses.append(f"data:image/jpeg;base64,{text}")
    row = np.arange(16)
    return addresses, np.stack([row // 2, row // 4, row // 8], axis=1)


def hierarchy(addresses):
    """Two patients, in each two slides, in each two patches, in each two views."""
    parts = [label(10, 18, "A batch: patients, slides, patches, views", "title")]
    for p in range(2):
        y = 30 + 108 * p
        parts.append(box(10, y, 352, 100))
        parts.append(label(18, y + 16, f"patient {p + 1}"))
        for s in range(2):
            x = 18 + 172 * s
            parts.append(box(x, y + 24, 164, 68))
            parts.append(label(x + 7, y + 39, f"slide {s + 1}", "small"))
            for b in range(2):
                left = x + 5 + 79 * b
                parts.append(box(left, y + 45, 75, 42))
                for v in range(2):
                    address = addresses[8 * p + 4 * s + 2 * b + v]
                    place = f'x="{left + 4 + 35 * v}" y="{y + 50}"'
                    parts.append(
                        f'<image {place} width="{SIDE}" height="{SIDE}" href="{address}"/>'
                    )
    parts.append(
        label(10, 258, "each small box is a patch, with two augmented views of it", "small")
    )
    return parts


def positives(ids):
    """Which images attract each other: of ids [n], a mask [n, n] as `losses.supcon` has it."""
    return (ids[:, None] == ids) & ~np.eye(len(ids), dtype=bool)


def masks(ids):
    """The positives of each level, image by image."""
    parts = [label(400, 18, "Which images attract each other, at each level", "title")]
    cell = 9.5
    for column, level in enumerate(LEVELS):
        left = 400 + 176 * column
        attract = positives(ids[:, column])
        parts.append(label(left, 40, f"same {level}: on p_{level}"))
        for i in range(16):
            for j in range(16):
                kind = "itself" if i == j else "attract" if attract[i, j] else "repel"
                place = f'x="{left + cell * j}" y="{50 + cell * i}"'
                size = f'width="{cell - 1}" height="{cell - 1}"'
                parts.append(f'<rect class="{kind}" {place} {size}/>')
    x = 400
    for kind, words in (("attract", "attract"), ("repel", "repel"), ("itself", "itself: left out")):
        parts.append(f'<rect class="{kind}" x="{x}" y="219" width="10" height="10"/>')
        parts.append(label(x + 16, 228, words, "small"))
        x += 80
    return parts


def road():
    """From images and sentences to the two losses."""
    parts = [label(10, 300, "For each level l: patch, slide, patient", "title")]
    parts += [
        box(10, 315, 90, 44, ["images x", "[N, 3, S, S]"]),
        arrow((100, 337), (128, 337)),
        box(130, 315, 110, 44, ["image tower"]),
        arrow((240, 337), (298, 337)),
        box(300, 315, 90, 44, ["z", "[N, D]"]),
        arrow((390, 337), (438, 337)),
        box(440, 315, 110, 44, ["W_l z + b_l"]),
        arrow((550, 337), (588, 337)),
        box(590, 315, 80, 44, ["p_l", "[N, K_l]"]),
        arrow((670, 337), (698, 337)),
        box(
            700,
            315,
            210,
            44,
            ["L_HVC: same id, attract", "sum_l lambda_l SupCon(p_l, ids_l)"],
            "loss",
        ),
        arrow((345, 359), (345, 383)),
        box(258, 385, 174, 44, ["L_HA: to the nearest t*", "KL of z and t*, both ways"], "loss"),
        arrow((345, 455), (345, 431)),
        box(10, 455, 150, 50, ["four sentences for", "each of K_l attributes"], "words"),
        arrow((160, 480), (183, 480)),
        box(185, 455, 90, 50, ["text tower", "frozen"], "words"),
        arrow((275, 480), (298, 480)),
        box(300, 455, 90, 50, ["bank t_l", "[K_l, D], frozen"], "words"),
        arrow((390, 480), (495, 480), (495, 361)),
        label(503, 420, "W_l starts as t_l", "small"),
        label(700, 385, "L = L_HVC + lambda_HA L_HA"),
        label(560, 450, "Sentences of the demo's bank", "title"),
    ]
    for row, level in enumerate(LEVELS):
        sentence = read_bank_file(DEMO_BANK)["levels"][level][EXAMPLES[level]][0]
        parts.append(label(560, 470 + 17 * row, f"{level}: {sentence}", "small"))
    return parts


def method():
    """The method in one picture: a batch, its positives, and the road to the losses."""
    addresses, ids = thumbnails()
    head = '<marker id="head" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="7" markerHeight="7" '
    head += 'orient="auto"><path class="head" d="M0 0L6 3L0 6z"/></marker>'
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 930 515">', STYLE]
    parts += [f"<defs>{head}</defs>", *hierarchy(addresses), *masks(ids), *road()]
    return "\n".join([*parts, "</svg>\n"])


def study(world="four captions"):
    """One panel for each metric, a row for each arm: a dot for each seed, the mean, and its 95%
    interval by Student's t."""
    lines = finished(read_lines())
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
            found = 100 * np.array(list(values(lines, world, arm, metric).values()))
            if len(found) < 2:
                continue
            y = 50 + row * i
            half = T95[len(found)] * found.std(ddof=1) / len(found) ** 0.5
            ends = np.clip([found.mean() - half, found.mean() + half], low, high)
            x1, x2, middle, *seeds = x0 + width * (
                np.array([*ends, found.mean(), *np.clip(found, low, high)]) - low
            ) / (high - low)
            kind = (
                "control"
                if "rotated" in arm or "random" in arm
                else "mean"
                if "AR" in arm
                else "other"
            )
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
    (HERE / "method.svg").write_text(method())
    (HERE / "study.svg").write_text(study())
