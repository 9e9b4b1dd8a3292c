"""The pruned model written once more, from the method's description alone: explicit maps, Python loops, float64.

Takes nothing from plugins/ or exporter/ but the schedule as data, so that it is an independent check of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def weights_of(model: Any) -> Weights:
    return {name.removeprefix("model."): tensor.detach().double() for name, tensor in model.state_dict().items()}


def count_of(tokens: int, keep: int) -> int:
    return math.ceil(Fraction(tokens * keep, 1024))


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(1, dtype=torch.float64))


def tower_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    """A layer norm, or where there is no bias a root-mean-square norm."""
    if f"{name}.bias" not in weights:
        return rms_norm(x, weights[f"{name}.weight"], 1e-6)
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [S, H, D], angles [S, D/2]: pairs (i, i + D/2) turn by the angle i."""
    half = x.shape[-1] // 2
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attention_map(query: Tensor, key: Tensor, *, causal: bool = False, bias: list[float] | None = None, windows: list[Any] | None = None) -> Tensor:
    """[H, S, S] from query [S, H, D] and key [S, KV, D]; ``bias`` [S] is added to the scores of each key; nobody looks out of its own of ``windows``
    [S]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(query.shape[-1])
    if bias is not None:
        scores = scores + torch.tensor(bias, dtype=torch.float64)
    if causal:
        size = scores.shape[-1]
        for i in range(size):
            scores[:, i, i + 1 :] = -math.inf
    if windows is not None:
        scores = scores.masked_fill(torch.tensor([[a != b for b in windows] for a in windows]), -math.inf)
    return scores.softmax(-1)


def mix(attention: Tensor, value: Tensor) -> Tensor:
    value = value.repeat_interleave(attention.shape[0] // value.shape[1], 1)
    return torch.einsum("hij,jhd->ihd", attention, value).flatten(1)


def relevance(attention: Tensor, threshold: float, score_rows: int) -> Tensor:
    """Section 1, points 2 to 4, from the map [heads, P, P]; received attention from evenly spaced rows."""
    mean_map = attention.mean(0)
    sampled = [mean_map[i * 1024 // score_rows] for i in range(math.ceil(len(mean_map) * score_rows / 1024))]
    received = torch.stack(sampled).mean(0) * len(mean_map)
    if threshold == 0:
        return received / len(mean_map)
    rows = [j for j in range(len(received)) if received[j] > threshold]
    return mean_map[rows or [int(received.argmax())]].mean(0)


def prune(
    features: Tensor,
    score: list[float],
    stands: list[int],
    index: list[int],
    count: int,
    recycle: float | None,
    rows: int,
    columns: int,
    carried: str,
) -> tuple[Tensor, list[float], list[int], list[int]]:
    """Section 2: features [tokens, F], each of which ``stands`` for so many; returns survivors' features, what they carry on, for how many they
    stand, and their places."""
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))
    if recycle is None:
        places = sorted(order[:count])
        return features[places], [score[i] for i in places], [stands[i] for i in places], places
    side = Fraction(round(recycle * 1024), 1024)
    cell = [(math.floor(Fraction(i // columns) / side), math.floor(Fraction(i % columns) / side)) for i in index]
    cells = (math.floor(Fraction(rows - 1) / side) + 1) * (math.floor(Fraction(columns - 1) / side) + 1)
    kept = order[: max(0, count - cells)]
    representative: dict[tuple[int, int], int] = {}
    for i in order:
        if i not in kept:
            representative.setdefault(cell[i], i)
    ranked = kept + [i for i in order if i in representative.values()]
    ranked += [i for i in order if i not in ranked]
    places = sorted(ranked[:count])
    merged, importance, together = [], [], []
    for i in places:
        group = [i] + [j for j in range(len(score)) if j not in places and representative[cell[j]] == i]
        weights = [max(score[j], 0.0) + 1e-8 for j in group]
        merged.append(sum(w * features[j] for w, j in zip(weights, group, strict=True)) / sum(weights))
        own = score[i] if len(group) == 1 else {"own": score[i], "sum": sum(score[j] for j in group), "protected": 1e30}[carried]
        importance.append(own)
        together.append(sum(stands[j] for j in group))
    return torch.stack(merged), importance, together, places


def tower_mlp(x: Tensor, weights: Weights, name: str) -> Tensor:
    if f"{name}.gate_proj.weight" in weights:
        gate = torch.nn.functional.silu(linear(x, weights, f"{name}.gate_proj"))
        return linear(gate * linear(x, weights, f"{name}.up_proj"), weights, f"{name}.down_proj")
    if f"{name}.linear_fc1.weight" in weights:
        return linear(torch.nn.functional.gelu(linear(x, weights, f"{name}.linear_fc1"), approximate="tanh"), weights, f"{name}.linear_fc2")
    hidden = linear(x, weights, f"{name}.fc1")
    return linear(hidden * torch.sigmoid(1.702 * hidden), weights, f"{name}.fc2")


def learned_place(table: Tensor, row: int, column: int, height: int, width: int) -> Tensor:
    """The learned embedding of a patch's place in an image of ``height`` × ``width`` patches, between the four of a square table around it."""
    side = math.isqrt(len(table))
    result = torch.zeros(table.shape[1], dtype=torch.float64)
    at_row = row * (side - 1) / (height - 1) if height > 1 else 0.0
    at_column = column * (side - 1) / (width - 1) if width > 1 else 0.0
    for r in range(side):
        for c in range(side):
            result += max(0.0, 1 - abs(at_row - r)) * max(0.0, 1 - abs(at_column - c)) * table[r * side + c]
    return result


def merger(x: Tensor, tokens: int, weights: Weights, name: str) -> Tensor:
    """All patches of a token to one row: norm before (of each patch, or DeepStack's of the whole row) and two layers with a GELU between."""
    if f"{name}.ln_q.weight" in weights:
        return merger_mlp(tower_norm(x, weights, f"{name}.ln_q").reshape(tokens, -1), weights, f"{name}.mlp.0", f"{name}.mlp.2")
    whole = len(weights[f"{name}.norm.weight"]) > x.shape[1]
    rows = tower_norm(x.reshape(tokens, -1), weights, f"{name}.norm") if whole else tower_norm(x, weights, f"{name}.norm").reshape(tokens, -1)
    return merger_mlp(rows, weights, f"{name}.linear_fc1", f"{name}.linear_fc2")


def merger_mlp(rows: Tensor, weights: Weights, first: str, second: str) -> Tensor:
    return linear(torch.nn.functional.gelu(linear(rows, weights, first)), weights, second)


def vision(model: Any, schedule: Any, pixels: Tensor, entropy: Tensor, budget: int) -> tuple[Tensor, list[float], list[int], list[int]]:
    """One image [rows, columns, G, patch_dim] through tower, merger and first stage: embeds [M, H], behind each what decoder layers
    0, 1, … add to it, importance, index, how many each stands for."""
    w, config = weights_of(model), model.config.vision_config
    rows, columns, group, _ = pixels.shape
    side, heads = config.spatial_merge_size, config.num_heads
    width = w["visual.patch_embed.proj.weight"].shape[0]
    head_dim = width // heads
    looking_everywhere = getattr(config, "fullatt_block_indexes", range(config.depth))
    window = getattr(config, "window_size", 0) // (config.patch_size * side)  # in tokens
    x = pixels.double().reshape(-1, pixels.shape[-1]) @ w["visual.patch_embed.proj.weight"].flatten(1).T
    patches, bits = pixels.double().reshape(rows * columns, -1), entropy.double().reshape(rows * columns, group)
    places = [(r * side + g // side, c * side + g % side) for r in range(rows) for c in range(columns) for g in range(group)]
    if "visual.pos_embed.weight" in w:
        table = w["visual.pos_embed.weight"]
        x = x + w["visual.patch_embed.proj.bias"] + torch.stack([learned_place(table, r, c, rows * side, columns * side) for r, c in places])
    giving = list(getattr(config, "deepstack_visual_indexes", []))
    given = torch.zeros(rows * columns, 0, dtype=torch.float64)  # to the decoder's layers, by the blocks passed
    frequencies = [10_000.0 ** (-k / (head_dim // 4)) for k in range(head_dim // 4)]
    angles = torch.tensor([[r * f for f in frequencies] + [c * f for f in frequencies] for r, c in places], dtype=torch.float64)
    index, score, stands = list(range(rows * columns)), [0.0] * (rows * columns), [1] * (rows * columns)
    ranked_from = [stage.layer - 1 for stage in schedule.stages if stage.part == "tower" and stage.layer > 0]
    if any(stage.part == "decoder" for stage in schedule.stages):
        ranked_from.append(schedule.importance.vision_layer % config.depth)
    ranking = {max(b for b in looking_everywhere if b <= seen) for seen in ranked_from}

    def take(tensor: Tensor, kept: list[int]) -> Tensor:
        return tensor.reshape(-1, group, tensor.shape[-1])[kept].flatten(0, 1)

    for number in range(config.depth):
        for stage in schedule.stages:
            if stage.part == "tower" and stage.layer == number:
                if number == 0:
                    score = [float(patches[i].std(correction=0) + bits[i].mean() / 8) for i in index]
                wide = torch.cat([x.reshape(len(index), -1), given], 1)
                wide, score, stands, kept = prune(wide, score, stands, index, count_of(budget, stage.keep), stage.recycle, rows, columns, "own")
                x, given, angles = wide[:, : group * width].reshape(-1, width), wide[:, group * width :], take(angles, kept)
                index = [index[i] for i in kept]
        name = f"visual.blocks.{number}"
        qkv = linear(tower_norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv").reshape(-1, 3, heads, head_dim)
        windows = [(i // columns // window, i % columns // window) for i in index for _ in range(group)] if number not in looking_everywhere else None
        attention = attention_map(rotate(qkv[:, 0], angles), rotate(qkv[:, 1], angles), windows=windows)
        if number in ranking:
            s = relevance(attention, schedule.importance.global_threshold, schedule.importance.score_rows)
            s = s + schedule.importance.entropy_weight * bits[index].flatten().softmax(0)
            score = s.reshape(-1, group).mean(1).tolist()
        x = x + linear(mix(attention, qkv[:, 2]), w, f"{name}.attn.proj")
        x = x + tower_mlp(tower_norm(x, w, f"{name}.norm2"), w, f"{name}.mlp")
        if number in giving:
            given = torch.cat([given, merger(x, len(index), w, f"visual.deepstack_merger_list.{giving.index(number)}")], 1)
    embeds = torch.cat([merger(x, len(index), w, "visual.merger"), given], 1)
    first = next((s for s in schedule.stages if s.part == "decoder" and s.layer == 0), None)
    if first is not None:
        count, carried = count_of(budget, first.keep), schedule.recycled_importance
        embeds, score, stands, kept = prune(embeds, score, stands, index, count, first.recycle, rows, columns, carried)
        index = [index[i] for i in kept]
    return embeds, score, index, stands


def language(
    model: Any, schedule: Any, input_ids: list[int], position_ids: Tensor, embeds: Tensor, columns: list[int], importance: list[float],
    stands: list[int], budget: int,
) -> tuple[Tensor, Tensor, list[list[int]]]:  # fmt: skip
    """One prefill without caches: logits and last hidden state of the last token, and the columns alive in each layer."""
    w, config = weights_of(model), model.config.text_config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim, epsilon, rope = getattr(config, "head_dim", config.hidden_size // heads), config.rms_norm_eps, config.rope_parameters
    width = config.hidden_size
    x = w["language_model.embed_tokens.weight"][input_ids]
    score = dict(zip(columns, importance, strict=True))
    size = dict(zip(columns, stands, strict=True))
    for place, column in enumerate(columns):
        x[column] = embeds[place, :width].double()
    axis = [a for a, size in enumerate(rope["mrope_section"]) for _ in range(size)]
    if rope.get("mrope_interleaved"):
        left = list(rope["mrope_section"])  # turns of each axis; time has those that the others leave
        for k in range(head_dim // 2):
            axis[k] = k % 3 if left[k % 3] else 0
            left[axis[k]] -= 1
    angles = torch.tensor(
        [[float(position_ids[axis[k], s]) * rope["rope_theta"] ** (-2 * k / head_dim) for k in range(head_dim // 2)] for s in range(len(input_ids))],
        dtype=torch.float64,
    )
    alive, per_layer = list(range(len(input_ids))), []
    attention = torch.zeros(0)
    beta = schedule.guidance_weight
    for number in range(config.num_hidden_layers):
        for stage in schedule.stages:
            if stage.part == "decoder" and stage.layer == number and number > 0:
                visual = [c for c in alive if c in score]
                if visual:
                    weights = attention[:, -1, [alive.index(c) for c in visual]]  # [heads, visual], a share of all
                    guide = (weights / weights.sum(-1, keepdim=True)).mean(0).tolist()
                    rank = {c: score[c] if score[c] > 1e29 else (1 - beta) * score[c] + beta * g for c, g in zip(visual, guide, strict=True)}
                    chosen = sorted(visual, key=lambda c: (-rank[c], c))[: count_of(budget, stage.keep)]
                    keep = [i for i, c in enumerate(alive) if c not in score or c in chosen]
                    x, angles, alive = x[keep], angles[keep], [alive[i] for i in keep]
        per_layer.append(alive)
        name = f"language_model.layers.{number}"
        normed = rms_norm(x, w[f"{name}.input_layernorm.weight"], epsilon)
        query = linear(normed, w, f"{name}.self_attn.q_proj").reshape(-1, heads, head_dim)
        key = linear(normed, w, f"{name}.self_attn.k_proj").reshape(-1, kv_heads, head_dim)
        if f"{name}.self_attn.q_norm.weight" in w:
            query = rms_norm(query, w[f"{name}.self_attn.q_norm.weight"], epsilon)
            key = rms_norm(key, w[f"{name}.self_attn.k_norm.weight"], epsilon)
        query, key = rotate(query, angles), rotate(key, angles)
        value = linear(normed, w, f"{name}.self_attn.v_proj").reshape(-1, kv_heads, head_dim)
        attention = attention_map(query, key, causal=True)  # what guidance goes by
        bias = [schedule.proportional_attention * math.log(size.get(c, 1)) for c in alive]
        x = x + linear(mix(attention_map(query, key, causal=True, bias=bias), value), w, f"{name}.self_attn.o_proj")
        normed = rms_norm(x, w[f"{name}.post_attention_layernorm.weight"], epsilon)
        gate = torch.nn.functional.silu(linear(normed, w, f"{name}.mlp.gate_proj"))
        x = x + linear(gate * linear(normed, w, f"{name}.mlp.up_proj"), w, f"{name}.mlp.down_proj")
        for place, column in enumerate(columns):
            if column in alive and (number + 2) * width <= embeds.shape[1]:
                x[alive.index(column)] += embeds[place, (number + 1) * width : (number + 2) * width].double()
    last = rms_norm(x[-1], w["language_model.norm.weight"], epsilon)
    head = w.get("lm_head.weight", w["language_model.embed_tokens.weight"])
    return head @ last, last, per_layer
