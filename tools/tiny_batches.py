"""What the small model is trained on: vocabulary, batches of pictures with parallel questions, and the order in which they grow harder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from vflow.engines.preprocess import ImageProcessorConfig, preprocess_image
from vflow.exporter.tiny.scenes import COLORS, NUMBERS, PLURALS, SHAPES, Scene, ask, render, sample_scene

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<unk>"]
PREFIX = 3  # chat tokens before the image: im_start, user, vision_start
# Tokens of the longest question of a kind with its answer; the list has room for five objects.
BRANCH = {"list": 28, "horizontal": 19, "vertical": 19}
DEFAULT_BRANCH = 14
TARGET_TOKENS = 12_500  # tower patches + decoder tokens of one batch, about 32 images at 168 pixels
# Some small pictures are large ones scaled down, as a user sends them to save time: what that costs in answers must not be for want of training.
SHRUNK_SHARE, SHRUNK_SCALES, SHRUNK_FROM = 0.3, (0.4, 0.8), 0.3


def vocabulary() -> list[str]:
    words = ["user", "assistant", "system", "?", ".", ",", "what", "shape", "color", "is", "the", "object", "objects", "how", "many", "are"]
    words += ["there", "a", "left", "right", "of", "or", "above", "below", "list", "from", "to", "yes", "no"]
    return SPECIAL + words + list(COLORS) + list(SHAPES) + [PLURALS[s] for s in SHAPES] + list(NUMBERS)


def layout(rows: int, columns: int, branches: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Positions [3, S] and mask bool [S, S] of: the prefix, the image, vision end, then parallel branches.

    Branches see the image and themselves, never each other, and start at the same position, so that each is an
    ordinary single question; asked in turn they would teach copying from earlier answers.
    """
    h, w = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    image = torch.stack([torch.zeros_like(h), h, w]).reshape(3, -1) + PREFIX
    after = PREFIX + max(rows, columns)
    pieces = [torch.arange(PREFIX).expand(3, -1), image, torch.tensor([[after]]).expand(3, -1)]
    group = [torch.zeros(PREFIX + rows * columns + 1, dtype=torch.long)]
    for number, length in enumerate(branches):
        pieces.append((torch.arange(length) + after + 1).expand(3, -1))
        group.append(torch.full((length,), number + 1))
    positions, groups = torch.cat(pieces, 1), torch.cat(group)
    causal = torch.ones(len(groups), len(groups), dtype=torch.bool).tril()
    return positions, causal & ((groups[None] == 0) | (groups[None] == groups[:, None]))


def token_labels(scene: Scene, side: int = 28) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each visual token shows: shape and colour index (0 is background) and whether an object's centre lies in it; each [N]."""
    rows, columns = scene.height // side, scene.width // side
    shape, color = np.zeros((rows, columns), np.int64), np.zeros((rows, columns), np.int64)
    center = np.zeros((rows, columns), np.float32)
    best = np.full((rows, columns), 0.06)  # from this share of its area on a token counts as an object's; the smallest may lie across four
    for item in scene.objects:
        half = item.size * 0.42
        yy, xx = np.arange(rows) * side, np.arange(columns) * side
        oy = np.clip(np.minimum(yy + side, item.y + half) - np.maximum(yy, item.y - half), 0, side) / side
        ox = np.clip(np.minimum(xx + side, item.x + half) - np.maximum(xx, item.x - half), 0, side) / side
        cover = oy[:, None] * ox[None]
        here = cover > best
        shape[here], color[here] = SHAPES.index(item.shape) + 1, list(COLORS).index(item.color) + 1
        best = np.maximum(best, cover)
        center[min(int(item.y // side), rows - 1), min(int(item.x // side), columns - 1)] = 1
    return shape.ravel(), color.ravel(), center.ravel()


def curriculum(progress: float, rng: np.random.Generator) -> tuple[int, int, int]:
    """(width, height, most objects): from one object on the smallest picture to everything.

    With five objects from the start nothing was learned in the first twenty minutes.
    """
    if progress < 0.03:
        return 112, 112, 1
    if progress < 0.10:
        return int(rng.choice([112, 140, 168])), int(rng.choice([112, 140])), 2
    most = 3 if progress < 0.2 else 5
    large = 0.0 if progress < 0.3 else 0.4 if progress < 0.7 else 0.6  # attention over 256 tokens has to be learned on 256 tokens
    if rng.random() < large:
        return int(rng.choice([336, 448])), int(rng.choice([336, 448])), most
    return int(rng.choice([168, 196, 224])), int(rng.choice([140, 168, 224])), most


def shrink_scene(scene: Scene, width: int, height: int) -> tuple[np.ndarray, Scene]:
    """The picture of a scene scaled to ``width`` × ``height``, uint8 [height, width, 3], and the scene in its pixels."""
    image = np.asarray(Image.fromarray(render(scene)).resize((width, height), Image.Resampling.BICUBIC))
    sx, sy = width / scene.width, height / scene.height
    objects = tuple(replace(item, x=item.x * sx, y=item.y * sy, size=item.size * (sx + sy) / 2) for item in scene.objects)
    return image, replace(scene, width=width, height=height, objects=objects)


def branch_lengths(kinds: Sequence[str], questions: int) -> list[int]:
    """Lengths of the parallel branches of one image: ``questions`` short ones, and the list where it is asked."""
    short = max((BRANCH.get(kind, DEFAULT_BRANCH) for kind in kinds if kind != "list"), default=0)
    return [short] * (questions if short else 0) + ([BRANCH["list"]] if "list" in kinds else [])


def make_batch(rng: np.random.Generator, progress: float, kinds: Sequence[str], questions: int) -> dict[str, np.ndarray]:
    """B pictures of one size, N visual tokens and P = 4 N patches each, with their questions.

    Returns:
        pixels float16 [B, P, 1176]; tokens and labels int64 [B, S − N]: prefix, vision end and the branches (−100 where no answer is read); shape and
        color int64 [B, N], 0 is background; center float32 [B, N], 1 where an object's centre lies; grid: patch rows and columns.
    """
    ids = {word: i for i, word in enumerate(vocabulary())}
    width, height, most = curriculum(progress, rng)
    tokens = (width // 28) * (height // 28)
    asked = [k for k in kinds if k != "list"]
    lengths = branch_lengths(kinds, questions)
    wanted = len(lengths) - ("list" in kinds)
    size = max(4, round(TARGET_TOKENS / (5 * tokens + sum(lengths) + 5)))
    rows: dict[str, list[np.ndarray]] = defaultdict(list)
    shrunk = progress >= SHRUNK_FROM and max(width, height) <= 224 and rng.random() < SHRUNK_SHARE
    scale = rng.uniform(*SHRUNK_SCALES) if shrunk else 1.0
    while len(rows["pixels"]) < size:
        scene = sample_scene(rng, width=round(width / scale), height=round(height / scale), max_objects=most)
        chosen = []
        order = list(rng.permutation(len(asked))) * 3
        while len(chosen) < wanted and order:
            question = ask(scene, rng, asked[order.pop(0)])
            if question:
                chosen.append(question)
        if "list" in kinds:
            chosen.append(ask(scene, rng, "list"))
        if len(chosen) != len(lengths):
            continue
        text = [ids["<|im_start|>"], ids["user"], ids["<|vision_start|>"], ids["<|vision_end|>"]]
        labels = [-100] * len(text)
        for question, length in zip(chosen, lengths, strict=True):
            prompt = [ids[w] for w in question.prompt.split()] + [ids["<|im_end|>"], ids["<|im_start|>"], ids["assistant"]]
            answer = [ids[w] for w in question.answer.split()] + [ids["<|im_end|>"]]
            branch = prompt + answer
            label = [-100] * (len(prompt) - 1) + answer + [-100]
            text += branch + [ids["<|endoftext|>"]] * (length - len(branch))
            labels += label + [-100] * (length - len(branch))
        image, scene = shrink_scene(scene, width, height) if shrunk else (render(scene), scene)
        shape, color, center = token_labels(scene)
        rows["pixels"].append(preprocess_image(image, ImageProcessorConfig()).pixel_values.astype(np.float16))
        rows["tokens"].append(np.asarray(text))
        rows["labels"].append(np.asarray(labels))
        rows["shape"].append(shape)
        rows["color"].append(color)
        rows["center"].append(center)
    batch = {name: np.stack(values) for name, values in rows.items()}
    batch["grid"] = np.asarray([height // 14, width // 14])
    return batch


def feed(queue: Any, progress: Any, seed: int, kinds: Sequence[str], questions: int) -> None:
    """Make batches in a process of its own, for ever."""
    torch.set_num_threads(1)
    for number in range(10**9):
        rng = np.random.default_rng([seed, number])
        queue.put(make_batch(rng, progress.value, kinds, questions))
