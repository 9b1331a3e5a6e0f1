"""Train Skyline's embedded demo model from scratch on a CPU, and export it as a Hugging Face checkpoint.

    python examples/train_demo.py --out DIR --minutes 45 --seed 0

The model is a Qwen3 of a few million parameters that solves arithmetic word problems (skyline.demo.problems). The
script trains the tokenizer, trains the model with Muon (hidden matrices) and AdamW (embedding, norms) in bf16
autocast, prints the held-out accuracy as it goes, and writes config.json, model.safetensors and the tokenizer files
to DIR. The learning rate follows the wall clock, so that the run ends on time on any machine; with ``--steps`` it
follows the step count.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src" / "skyline" / "demo"))  # works without an install
import problems
from demo_text import ENGLISH, SMALL_TALK, SYSTEM_PROMPTS

VOCAB_SIZE = 2048
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")  # ordinary text to the detokenizer: special=False
# Qwen2's pre-tokenization: each digit alone, words with their leading space, punctuation runs, newlines, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Turn = tuple[str, str]  # (role, content)


@dataclass(frozen=True)
class Config:
    """Names as in a Hugging Face config.json; the sizes are chosen so that 45 minutes on two cores suffice."""

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


# ------------------------------------------------------------------------------------------------------------ tokenizer


def train_tokenizer(rng: random.Random) -> Tokenizer:
    """Byte-level BPE over problems, small talk and prose: exactly VOCAB_SIZE entries, any UTF-8 text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [problem.question + "\n" + problem.solution for problem in (problems.generate(rng) for _ in range(4000))]
    corpus += [text for asks, answer in SMALL_TALK for text in (*asks, answer)] * 4
    corpus += [*SYSTEM_PROMPTS * 4, "system\nuser\nassistant\ntool\n", *[ENGLISH.replace("\n", " ")] * 4]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKERS])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the corpus yields {tokenizer.get_vocab_size()} tokens instead of {VOCAB_SIZE}: add text")
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------- data


def conversation(rng: random.Random) -> list[Turn]:
    """Draw one chat of one to four exchanges, mostly word problems, never from the held-out bucket."""
    turns: list[Turn] = []
    if rng.random() < 0.3:
        turns.append(("system", rng.choice(SYSTEM_PROMPTS)))
    for _ in range(rng.choices((1, 2, 3, 4), (85, 9, 3, 3))[0]):
        kind = rng.random()
        if kind < 0.03:
            asks, answer = rng.choice(SMALL_TALK)
            turns += [("user", rng.choice(asks)), ("assistant", answer)]
        else:
            problem = problems.training(rng, problems.expression if kind < 0.12 else problems.generate)
            turns += [("user", problem.question), ("assistant", problem.solution)]
    return turns


def encode(tokenizer: Tokenizer, chats: list[list[Turn]]) -> list[tuple[list[int], list[bool]]]:
    """Render each chat in ChatML; returns (ids, is_target), where only what the assistant says is a target."""
    parts = [[f"<|im_start|>{role}\n", f"{content}<|im_end|>", "\n"] for chat in chats for role, content in chat]
    encodings = iter(tokenizer.encode_batch([piece for part in parts for piece in part]))
    rows = []
    for chat in chats:
        ids: list[int] = []
        target: list[bool] = []
        for role, _ in chat:
            for says in (False, role == "assistant", False):
                piece = next(encodings).ids
                ids += piece
                target += [says] * len(piece)
        rows.append((ids, target))
    return rows


def collate(rows: list[tuple[list[int], list[bool]]], width: int) -> tuple[Tensor, Tensor]:
    """Right-pad rows to `width`; returns inputs and labels, both [rows, width] int64, -100 where there is no loss."""
    inputs = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for i, (ids, target) in enumerate(rows):
        x = torch.tensor(ids)
        inputs[i, : len(ids)] = x
        labels[i, : len(ids) - 1] = torch.where(torch.tensor(target[1:]), x[1:], -100)
    return inputs, labels


def batches(tokenizer: Tokenizer, rng: random.Random, tokens: int, pool: int = 4096) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of about `tokens` positions, from rows of similar length so that little of them is padding."""
    while True:
        rows = sorted(encode(tokenizer, [conversation(rng) for _ in range(pool)]), key=lambda row: len(row[0]))
        group = []
        while rows:
            width = -(-len(rows[-1][0]) // 16) * 16
            count = max(tokens // width, 1)
            rows, taken = rows[:-count], rows[-count:]
            group.append((taken, width))
        rng.shuffle(group)
        for taken, width in group:
            yield collate(taken, width)


# ---------------------------------------------------------------------------------------------------------------- model


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = Norm(c.head_dim, c.rms_norm_eps)
        self.k_norm = Norm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, s, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, s, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(b, s, -1, self.head_dim).transpose(1, 2)
        groups = q.shape[1] // k.shape[1]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        # Written out: for rows this short, the backward of the fused CPU attention takes longer than these products.
        scores = (q * self.head_dim**-0.5) @ k.mT
        scores = scores + torch.full((s, s), -1e4, dtype=scores.dtype).triu(1)
        out = scores.softmax(-1) @ v
        return self.o_proj(out.transpose(1, 2).reshape(b, s, -1))


class MLP(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Qwen3 with the parameter names of Hugging Face, so that the export is the state dict itself."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for layer in self.layers:  # each layer starts as the identity
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [b, s] to hidden states [b, s, hidden]; `logits` takes the positions that matter from there."""
        half = self.config.head_dim // 2
        frequency = self.config.rope_theta ** (-torch.arange(half) / half)
        angle = torch.outer(torch.arange(ids.shape[1]), frequency)
        x = self.embed_tokens(ids).bfloat16()
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on [b, heads, s, head_dim], halves rotated against each other as in Qwen and Llama."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ------------------------------------------------------------------------------------------------------------ optimizer


class Muon(torch.optim.Optimizer):
    """Momentum with the update replaced by the nearest semi-orthogonal matrix (Jordan et al., 2024); matrices only."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():  # equal shapes together: a few large products instead of many small
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalize(torch.stack(updates)), strict=True):
                    p.add_(update, alpha=-group["lr"] * scale)


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards U V^T for each matrix of [n, rows, columns], in bf16: the result only steers."""
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if tall else x).float()


# ----------------------------------------------------------------------------------------------------- train and export


@torch.no_grad()
def heldout_accuracy(model: Model, tokenizer: Tokenizer, count: int = 500) -> float:
    """Share of held-out problems whose whole solution is the greedy continuation.

    Every target token being the arg max given the reference before it is the same as greedy decoding reproducing the
    reference, so one forward pass per problem suffices.  It is a lower bound of the answer's exact match.
    """
    chats = [[("user", p.question), ("assistant", p.solution)] for p in problems.heldout(count)]
    rows = sorted(encode(tokenizer, chats), key=lambda row: len(row[0]))
    right = 0
    for start in range(0, count, 50):
        part = rows[start : start + 50]
        inputs, labels = collate(part, len(part[-1][0]))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(inputs)
            guess = model.logits(hidden).argmax(-1)
        right += int(((guess == labels) | (labels == -100)).all(1).sum())
    return right / count


def export(model: Model, tokenizer: Tokenizer, out: Path, max_positions: int = 2048) -> None:
    """Write the checkpoint directory that transformers, vLLM and Skyline load."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": p.detach().bfloat16().contiguous() for name, p in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    pad, end = tokenizer.token_to_id("<|endoftext|>"), tokenizer.token_to_id("<|im_end|>")
    common = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    write_json(
        out / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **asdict(model.config),
            "rope_parameters": {"rope_type": "default", "rope_theta": model.config.rope_theta},
            "max_position_embeddings": max_positions,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "torch_dtype": "bfloat16",
            "dtype": "bfloat16",
            **common,
        },
    )
    write_json(out / "generation_config.json", {"do_sample": False, **common, "eos_token_id": [end, pad]})
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_positions,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "clean_up_tokenization_spaces": False,
            "chat_template": Path(__file__).with_name("demo_chat_template.jinja").read_text("utf-8"),
        },
    )


def write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the exported checkpoint")
    parser.add_argument("--minutes", type=float, default=45.0, help="length of the run")
    parser.add_argument("--steps", type=int, help="length of the run in steps instead, which makes it repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="an exported checkpoint to continue from, instead of random weights")
    parser.add_argument("--peak", type=float, default=1.0, help="scale of the peak learning rates")
    parser.add_argument("--layers", type=int, default=Config.num_hidden_layers)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eval-every", type=int, default=250, help="steps between held-out evaluations and exports")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokenizer = train_tokenizer(random.Random(0))  # the same for every seed, so that --init always fits
    rng = random.Random(args.seed)
    model = Model(Config(num_hidden_layers=args.layers))
    if args.init:
        weights = load_file(args.init / "model.safetensors")
        model.load_state_dict({name.removeprefix("model."): w.float() for name, w in weights.items()})
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)]
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    start, tokens, losses = time.monotonic(), 0, []
    for step, (inputs, labels) in enumerate(batches(tokenizer, rng, args.batch_tokens)):
        elapsed = time.monotonic() - start
        progress = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if progress >= 1:
            break
        # Warm up, hold, then fall linearly to zero over the second half, where most of the accuracy is won.
        factor = args.peak * min((step + 1) / 50, 1.0, 2 * (1 - progress))
        for optimizer, initial in zip(optimizers, rates, strict=True):
            for group, lr in zip(optimizer.param_groups, initial, strict=True):
                group["lr"] = lr * factor
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(inputs)
            spoken = labels != -100
            logits = model.logits(hidden[spoken])
        loss = F.cross_entropy(logits.float(), labels[spoken])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += inputs.numel()
        losses.append(loss.item())
        if step % 20 == 0:
            rate = tokens / (time.monotonic() - start)
            mean = sum(losses[-20:]) / len(losses[-20:])
            print(f"step {step} loss {mean:.4f} {elapsed:.0f} s {rate:.0f} tok/s", flush=True)
        if step % args.eval_every == args.eval_every - 1:
            print(f"step {step} held-out {heldout_accuracy(model, tokenizer):.3f}", flush=True)
            export(model, tokenizer, args.out)
    export(model, tokenizer, args.out)
    seconds, accuracy = time.monotonic() - start, heldout_accuracy(model, tokenizer)
    print(f"done: {step} steps, {tokens:,} tokens, {seconds:.0f} s, held-out {accuracy:.3f}")


if __name__ == "__main__":
    main()
