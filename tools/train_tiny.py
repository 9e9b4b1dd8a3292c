"""Train the small Qwen2-VL, Qwen2.5-VL or Qwen3-VL that ships with vflow-export, on generated visual question answering.

    python tools/train_tiny.py --output exporter/tiny/checkpoint --minutes 110
    python tools/train_tiny.py --output exporter/tiny/checkpoint-2.5 --family qwen2_5_vl --start exporter/tiny/checkpoint \\
        --minutes 84 --begin-at 6 --decoder-warm-up 500 --kinds shape,color,count,count_color,count_shape,exists
    python tools/train_tiny.py --output DIR --family qwen3_vl --start exporter/tiny/checkpoint …  # in two pieces: docs/quality.md

Writes a Hugging Face checkpoint (config.json, model.safetensors in fp16, tokenizer, processor, chat template), and
beside it training_log.jsonl and accuracy.json. What makes it converge on two CPU cores is stated where it is done; where
the cores are shared, OMP_WAIT_POLICY=PASSIVE keeps a step from taking ten times as long, or give it ``--threads 1``. The
sources are the Qwen2-VL, Qwen2.5-VL and Qwen3-VL reports (arXiv 2409.12191, 2502.13923, 2511.21631) for the models and Muon (Jordan et al.,
2024) for the optimiser.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from muon import Muon
from tiny_batches import BRANCH, PREFIX, SPECIAL, branch_lengths, feed, layout, vocabulary
from tiny_tower import WINDOW, TowerLayout, run_tower, tower_layout
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from vflow.engines.preprocess import ImageProcessorConfig, preprocess_image
from vflow.exporter.models import FAMILIES, ModelConfig, model_shape
from vflow.exporter.tiny.scenes import COLORS, KINDS, SHAPES, samples

TRAINING_SEEDS = 1_000_000  # seeds below are for training, the others for held-out data
HELD_OUT_SEED = 7_000_000
Model: TypeAlias = Qwen2VLForConditionalGeneration | Qwen2_5_VLForConditionalGeneration | Qwen3VLForConditionalGeneration
PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %} <|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
DECODER_AUX_LAYER = 2  # after this many layers visual tokens must know where they are


def tower_config(args: argparse.Namespace) -> dict[str, Any]:
    if args.family == "qwen2_vl":
        return {
            "depth": args.tower_blocks,
            "embed_dim": args.tower_size,
            "hidden_size": args.hidden_size,
            "num_heads": args.tower_heads,
            "mlp_ratio": 4,
        }
    common = {
        "depth": args.tower_blocks,
        "hidden_size": args.tower_size,
        "out_hidden_size": args.hidden_size,
        "num_heads": args.tower_heads,
    }
    if args.family == "qwen3_vl":
        return {
            **common,
            "intermediate_size": 4 * args.tower_size,
            "patch_size": 14,  # of the other families, whose pictures and processor these are
            "num_position_embeddings": 16**2,
            "deepstack_visual_indexes": args.deepstack_blocks,
        }
    return {
        **common,
        "intermediate_size": 8 * round(args.tower_size * 3420 / 1280 / 8),  # the published towers' ratio
        "window_size": 28 * WINDOW,
        "fullatt_block_indexes": args.full_blocks,
    }


def model_config(args: argparse.Namespace) -> ModelConfig:
    ids = {word: i for i, word in enumerate(vocabulary())}
    head_dim = args.hidden_size // args.heads
    # On a still image the temporal section never turns, so it carries content; width has the lowest frequencies, and at the usual theta left and
    # right cannot be told apart on a grid of 8 to 16 tokens. Interleaved, both axes get high ones and low ones: the lowest turns half round in 16.
    rope = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [head_dim // 4, head_dim // 8, head_dim // 8]}
    own = {"head_dim": head_dim} if args.family == "qwen3_vl" else {}
    return FAMILIES[args.family].config(
        text_config={
            "vocab_size": len(ids),
            "hidden_size": args.hidden_size,
            "intermediate_size": 3 * args.hidden_size,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.heads // 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": rope | ({"mrope_interleaved": True} if FAMILIES[args.family].interleaved else {}),
            **own,
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config=tower_config(args),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        initializer_range=0.04,
    )


# ------------------------------------------------------------------------------------------------------------------ model


class Heads(nn.Module):
    """Dense targets on the visual tokens, thrown away after training; without them the decoder sits on a plateau."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.tower = nn.Linear(hidden, len(SHAPES) + len(COLORS) + 3)
        self.position = nn.Linear(hidden, 2)


class Trainee(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.heads = Heads(model.config.text_config.hidden_size)

    def forward(self, pixels: Tensor, tokens: Tensor, labels: Tensor, shape: Tensor, color: Tensor, center: Tensor,
                grid_xy: Tensor, grid: TowerLayout, rope: tuple[Tensor, Tensor], mask: Tensor) -> dict[str, Tensor]:  # fmt: skip
        language = self.model.model.language_model
        visual, *deepstack = run_tower(self.model.model.visual, pixels, grid)
        text = language.embed_tokens(tokens)
        hidden = torch.cat([text[:, :PREFIX], visual.to(text.dtype), text[:, PREFIX:]], 1)
        count = visual.shape[1]
        position_loss = hidden.new_zeros(())
        for number, layer in enumerate(language.layers):
            if number == DECODER_AUX_LAYER:
                guess = self.heads.position(hidden[:, PREFIX : PREFIX + count])
                position_loss = F.mse_loss(guess.float(), grid_xy.expand_as(guess))
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rope)
            if number < len(deepstack):
                hidden = hidden + F.pad(deepstack[number].to(hidden.dtype), (0, 0, PREFIX, hidden.shape[1] - PREFIX - count))
        hidden = language.norm(torch.cat([hidden[:, :PREFIX], hidden[:, PREFIX + count :]], 1))
        logits = self.model.lm_head(hidden)
        guess = self.heads.tower(visual)
        kinds, colors = len(SHAPES) + 1, len(COLORS) + 1
        weight = torch.ones(kinds), torch.ones(colors)
        weight[0][0] = weight[1][0] = 0.2
        return {
            "answer": F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100),
            "shape": F.cross_entropy(guess[..., :kinds].flatten(0, 1).float(), shape.flatten(), weight[0]),
            "color": F.cross_entropy(guess[..., kinds:-1].flatten(0, 1).float(), color.flatten(), weight[1]),
            "center": F.binary_cross_entropy_with_logits(guess[..., -1].float(), center, pos_weight=torch.tensor(4.0)),
            "position": position_loss,
        }


def decoder_angles(positions: Tensor, config: ModelConfig) -> Tensor:
    """Angles of positions [3, S] as decoder layers take their tables: [3, 1, S, head_dim], or [1, S, head_dim] where the axes are interleaved."""
    rope, half = config.text_config.rope_parameters, model_shape(config).decoder.head_dim // 2
    angles = positions[..., None] / rope["rope_theta"] ** (torch.arange(half).float() / half)
    if rope.get("mrope_interleaved"):
        axis = torch.zeros(half, dtype=torch.long)
        for number in (1, 2):
            axis[number : 3 * rope["mrope_section"][number] : 3] = number
        angles = angles[axis, :, torch.arange(half)].T
    return angles.repeat(*[1] * (angles.ndim - 1), 2).unsqueeze(-3)


class Ropes:
    """Rotary tables and windows by grid, computed once."""

    def __init__(self, config: ModelConfig, branches: Sequence[int]) -> None:
        self.config, self.branches, self.known = config, branches, {}

    def __call__(self, rows: int, columns: int) -> tuple[Any, ...]:
        if (rows, columns) not in self.known:
            tower = tower_layout(rows, columns, model_shape(self.config).tower)
            positions, mask = layout(rows // 2, columns // 2, self.branches)
            table = decoder_angles(positions, self.config)
            gh, gw = torch.meshgrid(torch.arange(rows // 2), torch.arange(columns // 2), indexing="ij")
            grid_xy = torch.stack([gh, gw], -1).reshape(-1, 2).float() / 8 - 1
            self.known[rows, columns] = (grid_xy, tower, (table.cos(), table.sin()), mask[None, None])
        return self.known[rows, columns]


# ------------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def answers(model: Model, items: Sequence[Any], batch: int = 16) -> list[str]:
    """Greedy answers of the unpruned model, images of one size, batched by prompt length."""
    words = vocabulary()
    ids = {word: i for i, word in enumerate(words)}
    end = ids["<|im_end|>"]
    ropes = Ropes(model.config, [])
    result: dict[int, str] = {}
    by_length: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        by_length[(*item.image.shape[:2], len(item.question.prompt.split()))].append(index)
    for (height, width, _), indices in by_length.items():
        rows, columns = height // 28, width // 28
        for start in range(0, len(indices), batch):
            chosen = indices[start : start + batch]
            pixels = np.stack([preprocess_image(items[i].image, ImageProcessorConfig()).pixel_values for i in chosen])
            visual, *deepstack = run_tower(model.model.visual, torch.from_numpy(pixels), ropes(rows * 2, columns * 2)[1])
            prompts = [["<|im_start|>", "user", "<|vision_start|>", "<|vision_end|>", *items[i].question.prompt.split()] for i in chosen]
            tokens = torch.tensor([[ids[w] for w in [*p, "<|im_end|>", "<|im_start|>", "assistant"]] for p in prompts])
            text = model.model.language_model.embed_tokens(tokens)
            embeds = torch.cat([text[:, :PREFIX], visual, text[:, PREFIX:]], 1)
            positions, _ = layout(rows, columns, [tokens.shape[1] - 4])
            cache, step_positions = None, positions[:, None].expand(3, len(chosen), -1)
            added: dict[str, Any] = {}  # to visual tokens, in the prefill step alone
            if deepstack:
                added["visual_pos_masks"] = torch.zeros(embeds.shape[:2], dtype=torch.bool)
                added["visual_pos_masks"][:, PREFIX : PREFIX + rows * columns] = True
                added["deepstack_visual_embeds"] = [features.flatten(0, 1) for features in deepstack]
            out: list[list[int]] = [[] for _ in chosen]
            done = [False] * len(chosen)
            for _ in range(BRANCH["list"]):
                decoder = model.model.language_model
                step = decoder(inputs_embeds=embeds, position_ids=step_positions, past_key_values=cache, use_cache=True, **added)
                cache, added = step.past_key_values, {}
                token = model.lm_head(step.last_hidden_state[:, -1]).argmax(-1)
                for row, value in enumerate(token.tolist()):
                    done[row] = done[row] or value == end
                    if not done[row]:
                        out[row].append(value)
                if all(done):
                    break
                embeds = model.model.language_model.embed_tokens(token[:, None])
                step_positions = step_positions[:, :, -1:] + 1
            for row, index in enumerate(chosen):
                result[index] = " ".join(words[t] for t in out[row])
    return [result[i] for i in range(len(items))]


def accuracy(model: Model, kinds: Sequence[str], *, count: int, side: int = 448, seed: int = HELD_OUT_SEED) -> dict[str, float]:
    items = list(samples(seed=seed, count=count, kinds=kinds, width=side, height=side))
    right: dict[str, list[bool]] = defaultdict(list)
    for item, answer in zip(items, answers(model, items), strict=True):
        right[item.question.kind].append(answer == item.question.answer)
    table = {kind: sum(values) / len(values) for kind, values in right.items()}
    return {"all": sum(map(sum, right.values())) / len(items), **table}


# ------------------------------------------------------------------------------------------------------------- checkpoint


def save_checkpoint(model: Model, folder: Path) -> None:
    """Write what Hugging Face's ``from_pretrained`` reads, weights in fp16."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?.,!]"), "isolated")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=[w for w in SPECIAL if w not in ("<unk>", "<|im_end|>", "<|endoftext|>")],
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    half = {name: value.detach().half() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=half)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float16"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor = ImageProcessorConfig()
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": PROCESSORS[model.config.model_type],
        "min_pixels": processor.min_pixels, "max_pixels": processor.max_pixels, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": processor.image_mean, "image_std": processor.image_std, "do_resize": True, "do_rescale": True, "do_normalize": True,
        "do_convert_rgb": True, "resample": 3, "rescale_factor": 1 / 255,
    }, indent=2) + "\n")  # fmt: skip
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": words.index("<|im_end|>"), "pad_token_id": 0, "do_sample": False}, indent=2) + "\n"
    )


def common_name(name: str) -> str:
    """Qwen3-VL's name of a parameter of the tower that the others have as well."""
    renamed = {
        "mlp.fc": "mlp.linear_fc",
        "merger.ln_q.": "merger.norm.",
        "merger.mlp.0.": "merger.linear_fc1.",
        "merger.mlp.2.": "merger.linear_fc2.",
    }
    for theirs, ours in renamed.items():
        name = name.replace(theirs, ours)
    return name


def copy_matching(model: Model, folder: Path) -> int:
    """Copy from the checkpoint in ``folder``, of any family, every parameter whose name and shape match; returns how many."""
    source = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    source = {common_name(name): value for name, value in source.items()}
    wanted = {name: (parameter, source.get(common_name(name))) for name, parameter in model.state_dict().items()}
    matching = {name: value for name, (parameter, value) in wanted.items() if value is not None and value.shape == parameter.shape}
    model.load_state_dict(matching, strict=False)
    return len(matching)


@torch.no_grad()
def prepare(model: Model) -> None:
    """Values to begin from that Hugging Face's initialisation of Qwen3-VL does not have."""
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:  # at one no score is above √head_dim, which is not enough to pick a token of 256
            parameter.fill_(2.0)
        if "deepstack" in name and "linear_fc2" in name:  # a decoder from elsewhere does not know what is added
            parameter.zero_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen2_vl")
    parser.add_argument("--minutes", type=float, default=110, help="training time; the schedule follows the clock")
    parser.add_argument("--steps", type=int, help="number of steps instead of --minutes: same data order and schedule on every machine")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(k for k in KINDS if not k.startswith("small_")), help="question kinds, comma-separated")
    parser.add_argument("--questions", type=int, default=8, help="questions an image, the list not counted")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tower-size", type=int, default=128)
    parser.add_argument("--tower-blocks", type=int, help="default: 4 of qwen2_vl, 6 of the others")
    parser.add_argument("--full-blocks", default="2,5", help="tower blocks of qwen2_5_vl without windows, comma-separated")
    parser.add_argument("--deepstack-blocks", default="1,3", help="tower blocks of qwen3_vl that give to the decoder's first layers, comma-separated")
    parser.add_argument("--tower-heads", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile the step (needs a C++ compiler)")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--resume", type=Path, help="a training_state.pt of the same options")
    origin.add_argument("--start", type=Path, help="a checkpoint of any family, from which parameters of the same name and shape are copied")
    parser.add_argument("--begin-at", "--resume-at", type=float, help="begin with the clock at this minute (rate and curriculum follow it)")
    parser.add_argument(
        "--decoder-warm-up", type=int, default=60, help="steps until the decoder learns at the full rate; more spare one that can see"
    )
    parser.add_argument("--evaluate-every", type=float, default=10, help="minutes between evaluations and saves")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    unknown = set(kinds) - set(KINDS)
    if unknown:
        parser.error(f"--kinds: unknown {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
    if not 0 <= args.seed < TRAINING_SEEDS:
        parser.error(f"--seed must be below {TRAINING_SEEDS}: larger seeds are held-out data")
    if args.begin_at is not None and args.steps:
        parser.error("--begin-at sets the clock, which --steps does not follow")
    args.tower_blocks = args.tower_blocks or (4 if args.family == "qwen2_vl" else 6)
    args.full_blocks = [int(number) for number in args.full_blocks.split(",")]
    if args.family == "qwen2_5_vl" and not all(0 <= number < args.tower_blocks for number in args.full_blocks):
        parser.error(f"--full-blocks must be of the tower's {args.tower_blocks} blocks, 0 to {args.tower_blocks - 1}")
    args.deepstack_blocks = [int(number) for number in args.deepstack_blocks.split(",")]
    problem = FAMILIES[args.family].check(model_config(args))
    if problem:
        parser.error(problem)
    train(args, kinds)


def train(args: argparse.Namespace, kinds: Sequence[str]) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    model_class = FAMILIES[args.family].model
    model = model_class._from_config(model_config(args), dtype=torch.float32)
    prepare(model)
    trainee = Trainee(model)
    ropes = Ropes(model.config, branch_lengths(kinds, args.questions))
    # Tower and heads, then the decoder: a decoder from elsewhere has a warm-up of its own.
    parts = [[(n, p) for n, p in trainee.named_parameters() if ("language_model" in n) == decoder] for decoder in (False, True)]
    is_matrix = {n: p.ndim == 2 and ("blocks" in n or "layers" in n or "merger" in n) for n, p in trainee.named_parameters()}
    muons = [Muon([p for n, p in part if is_matrix[n]]) for part in parts]
    others = [p for n, p in trainee.named_parameters() if not is_matrix[n]]
    groups = [{"params": [p for n, p in part if not is_matrix[n]]} for part in parts]
    adam = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    step, spent = 0, 0.0
    if args.start:
        print(f"{copy_matching(model, args.start)} of {len(model.state_dict())} parameters are of {args.start}", flush=True)
    if args.resume:
        state = torch.load(args.resume, weights_only=True)
        trainee.load_state_dict(state["trainee"])
        adam.load_state_dict(state["adam"])
        for muon, moments in zip(muons, state["muon"], strict=True):
            muon.moments = dict(zip(muon.moments, moments, strict=True))
        step, spent = state["step"], state["spent"]
    spent = spent if args.begin_at is None else args.begin_at

    context = multiprocessing.get_context("spawn")
    queue, shared = context.Queue(maxsize=6), context.Value("d", 0.0)
    feeder = context.Process(target=feed, args=(queue, shared, args.seed + 131 * step, kinds, args.questions), daemon=True)
    feeder.start()
    run = torch.compile(trainee, dynamic=False) if args.compile else trainee
    args.output.mkdir(parents=True, exist_ok=True)
    log = (args.output / "training_log.jsonl").open("a" if args.resume else "w")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    clock, evaluated, sums = time.monotonic(), spent, defaultdict(float)
    since = 0
    while True:
        elapsed = spent + (time.monotonic() - clock) / 60
        progress = step / args.steps if args.steps else elapsed / args.minutes
        if progress >= 1:
            break
        shared.value = progress
        batch = {name: torch.from_numpy(value) for name, value in queue.get().items()}
        # Constant for 40 % of the time, then 1 − √ of the rest to zero (Hägele et al., arXiv 2405.18392): large pictures leave few a batch, and
        # at the full rate their noise keeps the dense targets from falling.
        rates = [min(1.0, (step + 1) / warm) * (1 - math.sqrt(max(0.0, progress - 0.4) / 0.6)) for warm in (60, args.decoder_warm_up)]
        for group, rate in zip(adam.param_groups, rates, strict=True):
            group["lr"] = 2e-3 * rate
        rows, columns = batch["grid"].tolist()
        grid_xy, grid, rope, mask = ropes(rows, columns)
        with torch.autocast("cpu", torch.bfloat16):
            losses = run(
                batch["pixels"].bfloat16(),
                batch["tokens"],
                batch["labels"],
                batch["shape"],
                batch["color"],
                batch["center"],
                grid_xy,
                grid,
                rope,
                mask,
            )
            aux = 0.5 * (1 - 0.8 * progress)
            total = losses["answer"] + aux * (losses["shape"] + losses["color"] + losses["center"]) + 0.3 * losses["position"]
        total.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for muon, rate in zip(muons, rates, strict=True):
            muon.step(0.02 * rate)
        adam.step()
        trainee.zero_grad(set_to_none=True)
        step, since = step + 1, since + 1
        for name, value in losses.items():
            sums[name] += float(value)
        if step % 50 == 0:
            entry = {
                "step": step,
                "minutes": round(elapsed, 2),
                "seconds_per_step": round((time.monotonic() - clock) / since, 3),
                **{n: round(v / 50, 4) for n, v in sums.items()},
            }
            sums.clear()
            print(json.dumps(entry), flush=True)
            log.write(json.dumps(entry) + "\n")
            log.flush()
        if elapsed - evaluated >= args.evaluate_every:
            evaluated = elapsed
            table = accuracy(model, kinds, count=20 * len(kinds))
            small = accuracy(model, kinds, count=20 * len(kinds), side=196)
            entry = {
                "step": step,
                "minutes": round(elapsed, 2),
                "accuracy_448": {n: round(v, 3) for n, v in table.items()},
                "accuracy_196": {n: round(v, 3) for n, v in small.items()},
            }
            print(json.dumps(entry), flush=True)
            log.write(json.dumps(entry) + "\n")
            save_checkpoint(model, args.output)
            torch.save(
                {
                    "trainee": trainee.state_dict(),
                    "adam": adam.state_dict(),
                    "muon": [list(muon.moments.values()) for muon in muons],
                    "step": step,
                    "spent": elapsed,
                },
                args.output / "training_state.pt",
            )
    feeder.terminate()
    save_checkpoint(model, args.output)
    final = model_class.from_pretrained(args.output, dtype=torch.float32)  # what ships: rounded to fp16
    report = {str(side): accuracy(final, kinds, count=110 * len(kinds), side=side) for side in (224, 336, 448)}
    (args.output / "accuracy.json").write_text(
        json.dumps({"held_out_seed": HELD_OUT_SEED, "questions_per_size": 110 * len(kinds), "steps": step, "accuracy": report}, indent=2) + "\n"
    )
    print(json.dumps(report), flush=True)
    log.close()


if __name__ == "__main__":
    sys.exit(main())
