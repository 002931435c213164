"""Flame graphs from folded stacks (`frame;frame;… samples` a line, as py-spy writes them): a
picture (SVG, no script, so it is shown wherever a picture is) and a table of the dearest frames.

Frames are functions, without line numbers, and their files are told from the package on: nothing of
the machine on which they were taken is left in them.
"""

from __future__ import annotations

import colorsys
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape

#: A picture is at most so large; frames that are too narrow are left out until it is.
SVG_BYTES_MAX = 300_000
_WIDTH, _ROW, _CHARACTER = 1_200.0, 16, 6.3
_NARROW = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)
_FRAME = re.compile(r"(?P<function>.*) \((?P<file>[^()]*?)(?::\d+)?\)")
_BEFORE_PACKAGES = re.compile(
    r".*/(?:site-packages|dist-packages)/|.*/python3\.\d+/(?:lib-dynload/)?|.*/Lib/"
)

#: Where threads of ours, Ray, uvloop and pools stand while they wait; py-spy cannot always tell
#: that from work. What uvloop does in C (reading, writing) is taken for waiting, too.
WAITS = frozenset(
    {
        "Condition.wait (threading.py)",
        "Event.wait (threading.py)",
        "Thread.run (threading.py)",
        "Worker.main_loop (ray/_private/worker.py)",
        "_worker (concurrent/futures/thread.py)",
        "EpollSelector.select (selectors.py)",
        "select (selectors.py)",
        "RoleActor._watch (actors/runtime.py)",
        "_read (storage/engine/child_frames.py)",
    }
)

Stacks = Counter[tuple[str, ...]]


def at_work(stacks: Stacks) -> Stacks:
    """Without those that wait."""

    return Counter({stack: n for stack, n in stacks.items() if stack[-1] not in WAITS})


def read_folded(text: str, *, checkout: str = "") -> Stacks:
    """`checkout`: the folder whose paths are told from there on."""

    found: Stacks = Counter()
    for line in text.splitlines():
        stack, _, samples = line.rpartition(" ")
        if stack and samples.isdigit():
            frames = tuple(frame_of(one, checkout=checkout) for one in stack.split(";"))
            found[frames] += int(samples)
    return found


def frame_of(text: str, *, checkout: str = "") -> str:
    matched = _FRAME.fullmatch(text)
    if matched is None:
        # A process or thread of its own: what stands behind its name may be a path.
        return re.sub(r"/\S*/", "", text)
    function, file = matched["function"], matched["file"]
    if checkout and file.startswith(checkout.rstrip("/") + "/"):
        file = file[len(checkout.rstrip("/")) + 1 :]
    else:
        file = _BEFORE_PACKAGES.sub("", file)
        if file.startswith("/"):
            file = file.rpartition("/")[2]
    return f"{function} ({file})"


# --- the table -------------------------------------------------------------------------------


def table(stacks: Stacks, *, most: int = 15) -> list[str]:
    """The frames that take most by themselves, and those in whose calls most time goes by."""

    total = sum(stacks.values()) or 1
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for stack, samples in stacks.items():
        own[stack[-1]] += samples
        for frame in set(stack):  # once a stack: a function may call itself
            whole[frame] += samples
    by_own = own.most_common(most)
    shown = {frame for frame, _ in by_own}
    by_whole = [item for item in whole.most_common(3 * most) if item[0] not in shown][:most]
    return [
        "| frame | self | with what it calls |",
        "|---|---|---|",
        *(_line(frame, samples, whole[frame], total) for frame, samples in by_own),
        "",
        "Dearest with what they call, beyond those:",
        "",
        "| frame | self | with what it calls |",
        "|---|---|---|",
        *(_line(frame, own[frame], samples, total) for frame, samples in by_whole),
    ]


def _line(frame: str, own: int, whole: int, total: int) -> str:
    name = frame.replace("|", "\\|")
    return f"| `{name}` | {own / total:.1%} | {whole / total:.1%} |"


# --- the picture -----------------------------------------------------------------------------


@dataclass(slots=True)
class _Node:
    samples: int = 0
    below: dict[str, _Node] = field(default_factory=dict)


def picture(stacks: Stacks, *, title: str) -> str:
    """Callers above, what they call below them; as wide as the samples in which they were seen."""

    root = _Node()
    for stack, samples in sorted(stacks.items()):
        root.samples += samples
        node = root
        for frame in stack:
            node = node.below.setdefault(frame, _Node())
            node.samples += samples
    for narrow in _NARROW:
        text = _svg(root, title, narrow)
        if len(text.encode()) < SVG_BYTES_MAX:
            break
    return text


def _svg(root: _Node, title: str, narrow: float) -> str:
    boxes: list[str] = []
    total = root.samples or 1
    depth = _boxes(root.below, 0.0, 1, total, narrow, boxes)
    height = (depth + 1) * _ROW + 24
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {height}"'
            f' width="{_WIDTH:.0f}" height="{height}" font-family="monospace" font-size="10">',
            f'<rect width="{_WIDTH:.0f}" height="{height}" fill="#ffffff"/>',
            f'<text x="4" y="14" font-size="12">{escape(title)}</text>',
            *boxes,
            "</svg>",
            "",
        ]
    )


def _boxes(
    nodes: Mapping[str, _Node], x: float, level: int, total: int, narrow: float, boxes: list[str]
) -> int:
    """Draws a level and what is below it; the deepest level that was drawn."""

    deepest = level - 1
    for frame, node in nodes.items():
        width = _WIDTH * node.samples / total
        if node.samples / total >= narrow:
            boxes.append(_box(frame, node.samples / total, x, level, width))
            below = _boxes(node.below, x, level + 1, total, narrow, boxes)
            deepest = max(deepest, below)
        x += width
    return deepest


def _box(frame: str, share: float, x: float, level: int, width: float) -> str:
    y = level * _ROW + 8
    letters = int((width - 4) / _CHARACTER)
    text = ""
    if letters >= 3:
        name = frame if len(frame) <= letters else frame[: letters - 1] + "…"
        text = f'<text x="{x + 2:.1f}" y="{y + 11}">{escape(name)}</text>'
    return (
        f'<g><title>{escape(frame)}: {share:.1%}</title><rect x="{x:.1f}" y="{y}"'
        f' width="{max(width - 0.3, 0.2):.1f}" height="{_ROW - 1}" fill="{_color(frame)}"/>'
        f"{text}</g>"
    )


def _color(frame: str) -> str:
    """Of a file always the same."""

    file = frame.rpartition("(")[2]
    red, green, blue = colorsys.hls_to_rgb(zlib.crc32(file.encode()) % 360 / 360, 0.78, 0.55)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
