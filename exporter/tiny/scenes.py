"""Generated visual question answering: coloured, grained shapes on calm backgrounds, with exact answers.

The bench of the small model: everything is drawn from a seed, so that a sample can be named by (seed, index) and made
again anywhere. Detail sits on the objects and backgrounds are smooth, as in photographs; objects are small beside the
picture, so that a tenth of the visual tokens can hold them. Needs NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COLORS",
    "KINDS",
    "SHAPES",
    "SMALL_KINDS",
    "SMALL_OBJECT",
    "Question",
    "Sample",
    "Scene",
    "SceneObject",
    "ask",
    "render",
    "sample_scene",
    "samples",
]

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 45, 45),
    "green": (45, 160, 60),
    "blue": (50, 85, 215),
    "yellow": (228, 205, 50),
    "purple": (150, 55, 180),
    "cyan": (60, 200, 210),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "ring": "rings", "cross": "crosses"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
MIN_OBJECT, MAX_OBJECT = 20, 56  # diameter in pixels, small ones as often as large ones (log-uniform); a visual token is 28
SMALL_OBJECT = 28  # pixels; a smaller object is smaller than a visual token, so that pruning one token can remove it
MIN_SEPARATION = 16  # pixels between two centres along an axis before their order along it is asked for
GAP = 4  # pixels of background between two objects


@dataclass(frozen=True)
class SceneObject:
    """One shape; ``x``, ``y`` (its centre) and ``size`` (its diameter) in pixels."""

    color: str
    shape: str
    x: float
    y: float
    size: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects and the seed of everything that is only texture."""

    width: int
    height: int
    objects: tuple[SceneObject, ...]
    texture_seed: int


@dataclass(frozen=True)
class Question:
    """A prompt with its one right answer; ``kind`` is a key of ``KINDS``."""

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """A labelled example; ``image`` uint8 [height, width, 3]."""

    image: NDArray[np.uint8]
    question: Question
    scene: Scene


def sample_scene(rng: np.random.Generator, *, width: int, height: int, max_objects: int = 5, min_objects: int = 1) -> Scene:
    """Place between ``min_objects`` and ``max_objects`` shapes (fewer where they do not fit), none touching another."""
    wanted = int(rng.integers(min_objects, max_objects + 1))
    colors, shapes = list(COLORS), list(SHAPES)
    palette = rng.permutation(len(colors))[: int(rng.integers(2, len(colors) + 1))]  # few colours make counting by colour worth asking
    placed: list[SceneObject] = []
    for _ in range(wanted * 30):
        if len(placed) == wanted:
            break
        size = float(np.exp(rng.uniform(np.log(MIN_OBJECT), np.log(MAX_OBJECT))))
        margin = size / 2 + 1
        x, y = float(rng.uniform(margin, width - margin)), float(rng.uniform(margin, height - margin))
        candidate = SceneObject(colors[int(rng.choice(palette))], shapes[int(rng.integers(len(shapes)))], x, y, size)
        if all(_apart(candidate, other) for other in placed):
            placed.append(candidate)
    return Scene(width, height, tuple(placed), int(rng.integers(2**31)))


def _apart(a: SceneObject, b: SceneObject) -> bool:
    reach = (a.size + b.size) / 2 + GAP
    return max(abs(a.x - b.x), abs(a.y - b.y)) > reach and abs(a.x - b.x) > MIN_SEPARATION / 2


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene: uint8 [height, width, 3]."""
    rng = np.random.default_rng(scene.texture_seed)
    canvas = _background(rng, scene.width, scene.height)
    for item in scene.objects:
        _draw(canvas, item, rng)
    image: NDArray[np.uint8] = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return image


def _background(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float32]:
    """A muted colour with slow waves and, in some scenes, a faint weave."""
    base = rng.uniform(85, 170) + rng.uniform(-14, 14, 3)  # near grey
    yy = np.arange(height, dtype=np.float32)[:, None]
    xx = np.arange(width, dtype=np.float32)[None, :]
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = base
    for _ in range(3):
        angle, period, phase = rng.uniform(0, np.pi), rng.uniform(150, 500), rng.uniform(0, 2 * np.pi)
        along = (np.cos(angle) * xx + np.sin(angle) * yy) * np.float32(2 * np.pi / period)
        canvas += np.sin(along + np.float32(phase))[:, :, None] * rng.uniform(-9, 9, 3).astype(np.float32)
    weave = rng.uniform(0, 3) * (rng.random() < 0.5)
    if weave:
        period = rng.uniform(5, 12)
        pattern = np.sin(xx * np.float32(2 * np.pi / period)) * np.sin(yy * np.float32(2 * np.pi / period))
        canvas += (pattern * np.float32(weave))[:, :, None]
    return canvas


def _draw(canvas: NDArray[np.float32], item: SceneObject, rng: np.random.Generator) -> None:
    height, width, _ = canvas.shape
    radius = item.size / 2
    left, right = max(int(item.x - radius - 2), 0), min(int(item.x + radius + 3), width)
    top, bottom = max(int(item.y - radius - 2), 0), min(int(item.y + radius + 3), height)
    dy = (np.arange(top, bottom, dtype=np.float32) - np.float32(item.y))[:, None]
    dx = (np.arange(left, right, dtype=np.float32) - np.float32(item.x))[None, :]
    cover = np.clip(0.5 - _distance(item.shape, dx, dy, radius), 0, 1)[:, :, None]  # one pixel of soft edge
    grain = rng.uniform(-1, 1, (bottom - top, right - left, 1)).astype(np.float32) * 34
    color = np.asarray(COLORS[item.color], np.float32) * np.float32(rng.uniform(0.88, 1.1)) + grain
    region = canvas[top:bottom, left:right]
    region += cover * (color - region)


def _distance(shape: str, dx: NDArray[np.float32], dy: NDArray[np.float32], radius: float) -> NDArray[Any]:
    """Signed distance in pixels to the outline, negative inside; all shapes fit a circle or square of that radius."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "ring":
        return np.abs(np.hypot(dx, dy) - 0.76 * radius) - 0.24 * radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.86 * radius
    if shape == "cross":
        arm, reach = 0.27 * radius, 0.98 * radius
        upright = np.maximum(np.abs(dx) - arm, np.abs(dy) - reach)
        return np.minimum(upright, np.maximum(np.abs(dx) - reach, np.abs(dy) - arm))
    if shape == "triangle":  # apex up
        sides = np.abs(dx) * 0.894 - dy * 0.447 - 0.36 * radius
        distance: NDArray[Any] = np.maximum(sides, dy - 0.8 * radius)
        return distance
    raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")


def _shape(scene: Scene, rng: np.random.Generator, below: float = math.inf) -> Question | None:
    """About an object of size under ``below`` (pixels), told apart from all others by its colour."""
    item = _pick(rng, [o for o in scene.objects if o.size < below and sum(o.color == p.color for p in scene.objects) == 1])
    return Question("shape", f"what shape is the {item.color} object ?", item.shape) if item else None


def _color(scene: Scene, rng: np.random.Generator, below: float = math.inf) -> Question | None:
    """About an object of size under ``below`` (pixels), told apart from all others by its shape."""
    item = _pick(rng, [o for o in scene.objects if o.size < below and sum(o.shape == p.shape for p in scene.objects) == 1])
    return Question("color", f"what color is the {item.shape} ?", item.color) if item else None


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    return Question("count", "how many objects are there ?", NUMBERS[len(scene.objects)])


def _count_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    present = [o.color for o in scene.objects]
    color = present[int(rng.integers(len(present)))] if rng.random() < 0.8 else list(COLORS)[int(rng.integers(len(COLORS)))]
    return Question("count_color", f"how many {color} objects are there ?", NUMBERS[present.count(color)])


def _count_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    present = [o.shape for o in scene.objects]
    shape = present[int(rng.integers(len(present)))] if rng.random() < 0.8 else SHAPES[int(rng.integers(len(SHAPES)))]
    return Question("count_shape", f"how many {PLURALS[shape]} are there ?", NUMBERS[present.count(shape)])


def _exists(scene: Scene, rng: np.random.Generator, below: float = math.inf) -> Question | None:
    """Half of the answers are yes, about an object of size under ``below`` (pixels), and nothing is asked where there is none.

    Most of the wrong pairs mix a colour and a shape that are both present.
    """
    names = [o.name for o in scene.objects]
    askable = [o.name for o in scene.objects if o.size < below]
    if not askable:
        return None
    if rng.random() < 0.5:
        return Question("exists", f"is there a {askable[int(rng.integers(len(askable)))]} ?", "yes")
    for _ in range(20):
        if rng.random() < 0.7:
            color, shape = _pick(rng, scene.objects).color, _pick(rng, scene.objects).shape  # type: ignore[union-attr]  # never empty here
        else:
            color, shape = list(COLORS)[int(rng.integers(len(COLORS)))], SHAPES[int(rng.integers(len(SHAPES)))]
        if f"{color} {shape}" not in names:
            return Question("exists", f"is there a {color} {shape} ?", "no")
    return None


def _horizontal(scene: Scene, rng: np.random.Generator) -> Question | None:
    pair = _pair(scene, rng, lambda o: o.x)
    if pair is None:
        return None
    first, second = pair
    return Question("horizontal", f"is the {first.name} left or right of the {second.name} ?", "left" if first.x < second.x else "right")


def _vertical(scene: Scene, rng: np.random.Generator) -> Question | None:
    pair = _pair(scene, rng, lambda o: o.y)
    if pair is None:
        return None
    first, second = pair
    return Question("vertical", f"is the {first.name} above or below the {second.name} ?", "above" if first.y < second.y else "below")


def _list(scene: Scene, rng: np.random.Generator) -> Question | None:
    ordered = sorted(scene.objects, key=lambda o: o.x)
    return Question("list", "list the objects from left to right .", " , ".join(o.name for o in ordered))


def _pair(scene: Scene, rng: np.random.Generator, along: Callable[[SceneObject], float]) -> tuple[SceneObject, SceneObject] | None:
    names = [o.name for o in scene.objects]
    unique = [o for o in scene.objects if names.count(o.name) == 1]
    pairs = [(a, b) for a in unique for b in unique if abs(along(a) - along(b)) >= MIN_SEPARATION]
    return pairs[int(rng.integers(len(pairs)))] if pairs else None


def _pick(rng: np.random.Generator, items: Sequence[SceneObject]) -> SceneObject | None:
    return items[int(rng.integers(len(items)))] if items else None


def _small(question: Callable[[Scene, np.random.Generator, float], Question | None]) -> Callable[[Scene, np.random.Generator], Question | None]:
    """The same question about an object smaller than a visual token, as a kind of its own."""

    def small(scene: Scene, rng: np.random.Generator) -> Question | None:
        asked = question(scene, rng, SMALL_OBJECT)
        return asked and replace(asked, kind=f"small_{asked.kind}")

    return small


# The words of three other kinds, about small objects: for evaluation, since training on both would only ask those three more often.
SMALL_KINDS = {"small_shape": _small(_shape), "small_color": _small(_color), "small_exists": _small(_exists)}
KINDS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "shape": _shape,
    "color": _color,
    "count": _count,
    "count_color": _count_color,
    "count_shape": _count_shape,
    "exists": _exists,
    "horizontal": _horizontal,
    "vertical": _vertical,
    "list": _list,
    **SMALL_KINDS,
}


def ask(scene: Scene, rng: np.random.Generator, kind: str) -> Question | None:
    """One question of a kind about a scene; None where the scene allows none without ambiguity."""
    return KINDS[kind](scene, rng)


def samples(
    *, seed: int, count: int, kinds: Sequence[str], width: int = 448, height: int = 448, min_objects: int = 1, max_objects: int = 5
) -> Iterator[Sample]:
    """``count`` labelled samples, kinds in turn; sample i depends on ``seed`` and i alone.

    Seeds below 1,000,000 are for training; held-out data uses larger ones (the trainer refuses them).
    """
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        question = None
        while question is None:
            scene = sample_scene(rng, width=width, height=height, min_objects=min_objects, max_objects=max_objects)
            question = ask(scene, rng, kinds[index % len(kinds)])
        yield Sample(render(scene), question, scene)
