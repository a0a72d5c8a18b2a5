#!/usr/bin/env python3
"""Trains a serial draft head for a model file and writes it as a head file for run.c.

    python3 models/train_heads.py STAGE MODEL --work FOLDER [options]

STAGE is one of these, in this order; each leaves its result in FOLDER and goes on where it was interrupted:

    prompts   prompts.jsonl, out of files of questions and texts, and of turns that the model writes itself
    answers   answers-N.jsonl: ./run answers them, sixteen at a time, with several temperatures
    states    states-N.pt: the trunk's final hidden states over prompts and answers
    train     head.pt, log.tsv: the head, trained against the trunk's own distribution
    write     the head file

or `all`. Needs a C compiler, PyTorch and numpy; uses a GPU if there is one.
models/README.md has the settings of the shipped heads.
"""
import argparse
import json
import math
import os
import random
import struct
import subprocess
import sys
import time
import zlib

try:
    import numpy
    import torch
    from torch import nn
except ImportError:         # the first two stages need neither
    torch = None

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# How a user's turn may begin; the model goes on by itself. Empty: it begins by itself, too.
BEGINNINGS = ("", "", "", "", "What", "Who", "How do I", "Why", "Explain", "Write a story about",
              "Write a Python function", "Complete the following Python function:\n\n```python\ndef",
              "Translate into English:", "Translate into German:", "Summarize the following text:",
              "Write an email", "Compare", "You are", "Read the passage and answer:",
              "Give me a list of", "Solve this problem:", "Imagine", "Rewrite this sentence", "Classify")
# What may be asked about a passage of a text.
TASKS = ("Continue this text:\n\n%s", "Summarize: %s", "%s\n\nWhat is this text about?",
         "Rewrite in simple words: %s", "Translate into Spanish: %s",
         "Here is a passage:\n\n%s\n\nWrite three questions about it, with answers.")


def say(text):
    print(text, flush=True)


# ---------------------------------------------------------------- 1. prompts

def run(model, arguments, log=None):
    command = [os.path.join(ROOT, "run"), model] + [str(a) for a in arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log)
    if done.returncode not in (0, 1) or (done.returncode and not done.stdout and "-o" not in arguments):
        sys.exit("train_heads.py: this failed: %s" % " ".join(command))
    return done.stdout.decode("utf-8", "replace")


def metadata_of(path):
    with open(path, "rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))["__metadata__"]


def user_prefix(meta):
    """What stands before the first user turn: begin, system prompt, the turn's opening."""
    system = ""
    if meta.get("chat.system.place") == "start" and "chat.system.default" in meta:
        system = meta["chat.system.before"] + meta["chat.system.default"] + meta["chat.system.after"]
    return meta.get("chat.begin", "") + system + meta["chat.user.before"]


def own_turns(o, meta):
    """Turns that the model writes itself: sampled behind the opening of a user turn."""
    each, found = -(-o.turns // len(BEGINNINGS)), []
    for number, beginning in enumerate(BEGINNINGS):
        lines = run(o.model, ["-m", "generate", "--special", "--no-echo", "--json", "--samples", each, "-n", 120,
                              "-i", user_prefix(meta) + beginning, "-t", 1, "-k", 0, "-p", 0.95, "--min-p", 0,
                              "-s", o.seed + number, "-j", o.threads])
        for line in lines.splitlines():
            line = json.loads(line)
            text = (beginning + line["text"]).strip()
            if line.get("stop") == "eos" and len(text) > 8:
                found.append(text)
        say("%d turns written by the model" % len(found))
    return found[:o.turns]


def passages(path, count, words, chance):
    """`count` openings of paragraphs, of a length between the two numbers of words."""
    with open(path, encoding="utf-8", errors="replace") as file:
        paragraphs = file.read().replace("<|endoftext|>", "\n\n").split("\n\n")
    if len(paragraphs) < 50:
        paragraphs = "\n\n".join(paragraphs).splitlines()
    paragraphs = [" ".join(p.split()) for p in paragraphs]
    paragraphs = [p for p in paragraphs if len(p.split()) >= words[0] and not p.startswith("=")]
    paragraphs = sorted(set(paragraphs))
    chance.shuffle(paragraphs)
    return [" ".join(p.split()[:chance.randint(*words)]) for p in paragraphs[:count]]


def stage_prompts(o):
    path, meta, chance = os.path.join(o.work, "prompts.jsonl"), metadata_of(o.model), random.Random(o.seed)
    if os.path.exists(path):
        return say("%s is there" % path)
    chat, sources = "chat.user.before" in meta, []
    for name in o.questions or []:
        with open(name, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        lines = [line.get("question") or line["prompt"] for line in lines]
        chance.shuffle(lines)
        sources.append([("question", line) for line in lines[:o.per_source]])
    for name in o.texts or []:
        lines = passages(name, o.per_source, (20, 120) if chat else (3, 12), chance)
        sources.append([("text", chance.choice(TASKS) % line if chat else line) for line in lines])
    if chat and o.turns:
        turns = own_turns(o, meta)
        chance.shuffle(turns)
        sources.append([("turn", line) for line in turns])
    # spread evenly, so that whatever part of the file has been answered is a fair sample of it
    order = sorted(((i + chance.random()) / len(s), line) for s in sources for i, line in enumerate(s))
    seen = set()
    with open(path + ".part", "w") as file:
        for _, (source, text) in order:
            if text in seen:
                continue
            seen.add(text)
            file.write(json.dumps({"prompt": text, "chat": chat, "source": source}) + "\n")
    os.rename(path + ".part", path)
    say("%s: %d prompts" % (path, len(seen)))


# ---------------------------------------------------------------- 2. answers

def stage_answers(o):
    """The i-th temperature answers the i-th shard; the shards run side by side."""
    jobs = []
    for i, temperature in enumerate(o.temperatures):
        out = os.path.join(o.work, "answers-%d.jsonl" % i)
        command = [os.path.join(ROOT, "run"), o.model, "-f", os.path.join(o.work, "prompts.jsonl"), "--json", "-o", out,
                   "-n", o.tokens, "-t", temperature, "-k", 0, "-p", 1, "--min-p", 0.05, "-s", o.seed + i,
                   "-j", max(1, o.threads // len(o.temperatures)), "--draft", "off",
                   "--shard", "%d/%d" % (i + 1, len(o.temperatures))]
        if o.context:
            command += ["-c", o.context]
        jobs.append(subprocess.Popen([str(c) for c in command]))
    if any([job.wait() not in (0, 1) for job in jobs]):     # 1: some prompt was too long
        sys.exit("train_heads.py: ./run failed; the answers so far are kept, run this stage again to go on")



# ---------------------------------------------------------------- 3. states

def read_model(path, work):
    """Metadata and float tensors of a model file; packed matrices are unpacked by ./run first."""
    meta = metadata_of(path)
    if any(key.startswith("packed.") for key in meta):
        plain = os.path.join(work, "trunk-f32.bin")
        if not os.path.exists(plain):
            run(path, ["-m", "quantize", "--type", "f32", "-o", plain])
        path = plain
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    data, tensors = numpy.memmap(path, mode="r", offset=8 + size), {}
    for name, entry in header.items():
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(entry.get("dtype"))
        if kind and not name.startswith("tokenizer."):
            begin, end = entry["data_offsets"]
            tensors[name] = torch.from_numpy(data[begin:end].copy()).view(kind).view(entry["shape"]).float()
    return header["__metadata__"], tensors


def crc32_of(tensor):
    return "%08x" % zlib.crc32(tensor.float().cpu().contiguous().numpy().tobytes())


def rms(x, weight, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rotate(x, cos, sin, interleaved):
    """x [batch, heads, tokens, size]; cos, sin [tokens, rotated / 2]."""
    half = cos.shape[-1]
    turned, rest = x[..., :2 * half], x[..., 2 * half:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, rest), -1)


class Trunk:
    """What a head shares with the model that it drafts for: shapes, embedding, output matrix."""

    def __init__(self, path, work, device):
        self.meta, self.w = meta, w = read_model(path, work)
        number = lambda key, otherwise: float(meta.get(key, otherwise))
        self.device = device
        self.w = {name: w[name].to(device) for name in ("token_embd.weight", "output.weight", "output_norm.weight") if name in w}
        self.dim, self.layers, self.heads = int(meta["dim"]), int(meta["n_layers"]), int(meta["n_heads"])
        self.kv_heads, self.vocab = int(meta.get("n_kv_heads", self.heads)), int(meta["vocab_size"])
        self.size = int(meta.get("head_dim", self.dim // self.heads))
        self.weights = sum(t.numel() for name, t in w.items() if name.startswith("blk."))
        self.logit_cap = number("logit.soft_cap", 0)
        self.embedding_scale, self.logit_scale = number("embedding.scale", 1), number("logit.scale", 1)
        self.output = self.w.get("output.weight", self.w["token_embd.weight"])
        self.eos = [int(i) for i in meta.get("token.eos", "").split()]

    def embed(self, ids):
        return self.w["token_embd.weight"][ids] * self.embedding_scale

    def logits(self, h, rows=None):
        z = h @ (self.output if rows is None else rows).T * self.logit_scale
        return self.logit_cap * (z / self.logit_cap).tanh() if self.logit_cap else z


def device_of(o):
    torch.set_num_threads(o.threads)
    torch.set_float32_matmul_precision("high")
    return "cuda" if torch.cuda.is_available() else "cpu"


def held_out(line):
    """One prompt in sixteen is for measuring; the same in every stage and run."""
    return zlib.crc32(line["prompt"].encode()) % 16 == 0


def compile_states(o):
    program, source = os.path.join(o.work, "states"), os.path.join(ROOT, "models", "states.c")
    command = [os.environ.get("CC", "cc"), "-O3", "-ffp-contract=off", "-std=gnu11", "-Wno-psabi", "-pthread", source,
               "-o", program + ".part", "-lm"]
    sources = [source] + [os.path.join(ROOT, name) for name in ("run.c", "tokenizer.c")]
    if not os.path.exists(program) or os.path.getmtime(program) < max(map(os.path.getmtime, sources)):
        subprocess.run(command, check=True)
        os.rename(program + ".part", program)
    return program


def states_of(o, program, dim, sequences):
    """The trunk's final normed states and logarithms of sums of exponentiated logits, of lists of ids."""
    given = b"".join(struct.pack("<%di" % (1 + len(ids)), len(ids), *ids) for ids in sequences)
    done = subprocess.run([program, o.model, str(o.threads), str(o.length)], input=given, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit("train_heads.py: states failed")
    rows = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(-1, dim + 1)
    return rows[:, :dim].split([len(ids) for ids in sequences]), rows[:, dim].split([len(ids) for ids in sequences])


def stage_states(o):
    """Every answer that is not yet done, sixteen to a file: ids, states and what the trunk says."""
    trunk, program, began, tasks, tokens = Trunk(o.model, o.work, "cpu"), compile_states(o), time.time(), [], 0
    for folder, name, lines in answers_of(o):
        stem = "states-%s-%08x-" % (name[8:-6], zlib.crc32(folder.encode()) if folder != o.work else 0)
        greedy = o.temperatures[int(name[8:-6])] == 0
        tasks += [(begin, stem, greedy, lines[begin:begin + 16]) for begin in range(0, len(lines), 16)]
    for number, (begin, stem, greedy, lines) in enumerate(sorted(tasks, key=lambda task: task[:2])):
        mine, end = "%s%06d-" % (stem, begin), begin + len(lines)
        old = [f for f in os.listdir(o.work) if f.startswith(mine) and f.endswith(".pt")]
        if "%s%06d.pt" % (mine, end) in old or (o.shard and number % o.shard[1] != o.shard[0] - 1):
            continue
        lines = [line for line in lines if "ids" in line]
        if not lines:
            continue
        ids = [(line["prompt_ids"] + line["ids"])[:o.length] for line in lines]
        sequences = []
        for line, row, h, total in zip(lines, ids, *states_of(o, program, trunk.dim, ids)):
            if line["stop"] == "eos" and len(row) < o.length:         # the end, too, may be proposed
                last = trunk.logits(h[-1])
                row = row + [max(trunk.eos, key=lambda e: last[e].item())]
            sequences.append({
                "ids": torch.tensor(row, dtype=torch.int32), "states": h.bfloat16(), "total": total.clone(),
                "prompt": len(line["prompt_ids"]), "held_out": held_out(line), "greedy": greedy,
                "source": line.get("source", "")})
            tokens += len(h)
        path = os.path.join(o.work, "%s%06d.pt" % (mine, end))
        torch.save(sequences, path + ".part")
        os.rename(path + ".part", path)
        for f in old:           # a shorter portion, made when there were fewer answers
            os.remove(os.path.join(o.work, f))
        say("%s: %d tokens, %.0f tok/s" % (path, tokens, tokens / (time.time() - began)))


# ---------------------------------------------------------------- 4. train

def make_head(o, trunk, rows):
    """The module: u = E n(e) + H n(h), one layer, a norm. Its rows are the trunk's and stay as they are."""
    heads, kv, size = o.heads or trunk.heads, o.kv_heads or trunk.kv_heads, o.head_dim or trunk.size
    d, hidden = trunk.dim, o.hidden or min(512, trunk.dim)
    head = nn.Module()
    head.shape = {"dim": d, "hidden_dim": hidden, "n_layers": 1,
                  "n_heads": heads, "n_kv_heads": kv, "head_dim": size,
                  "context_length": trunk.meta["context_length"], "vocab_size": len(rows) or trunk.vocab,
                  "norm.eps": trunk.meta.get("norm.eps", "1e-05"),
                  "rope.base": trunk.meta.get("rope.base", "10000"),
                  "rope.pairing": "half", "rope.dims": size}
    shapes = {"e_proj.weight": (d, d), "h_proj.weight": (d, d), "blk.0.attn_q.weight": (heads * size, d),
              "blk.0.attn_k.weight": (kv * size, d), "blk.0.attn_v.weight": (kv * size, d),
              "blk.0.attn_output.weight": (d, heads * size), "blk.0.ffn_gate.weight": (hidden, d),
              "blk.0.ffn_up.weight": (hidden, d), "blk.0.ffn_down.weight": (d, hidden)}
    w = {name: torch.randn(shape) * shape[1] ** -0.5 for name, shape in shapes.items()}
    for name in ("blk.0.attn_output.weight", "blk.0.ffn_down.weight"):
        w[name] *= 0.3
    w["h_proj.weight"], w["e_proj.weight"] = torch.eye(d) + 0.1 * w["h_proj.weight"], 0.5 * w["e_proj.weight"]
    for name in ("e_norm", "h_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        w[name + ".weight"] = torch.ones(d)
    w["output_norm.weight"] = 0.5 * trunk.w["output_norm.weight"].cpu()
    head.w = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(t) for name, t in w.items()})
    head.get = lambda name: head.w[name.replace(".", "/")]
    return head.to(trunk.device)


def unroll(head, e, h, steps):
    """States of each step. e [batch, n + steps, d]: row t is the embedding of token t + 1; h [batch, n, d].
    Row t of step j is a chain that began at t: it sees the true rows up to t and its own chained rows at
    t + 1 .. t + j, one of each step."""
    f, get, s = torch.nn.functional, head.get, head.shape
    batch, n, d = h.shape
    heads, kv, size, eps = s["n_heads"], s["n_kv_heads"], s["head_dim"], float(s["norm.eps"])
    pairs = torch.arange(size // 2, dtype=torch.float64)
    speed = float(s["rope.base"]) ** (-pairs / (size // 2))
    angles = torch.arange(n + steps, dtype=torch.float64)[:, None] * speed
    cos, sin = angles.cos().float().to(h.device), angles.sin().float().to(h.device)
    split = lambda t, count: t.view(batch, n, count, size).transpose(1, 2)
    future = torch.ones(n, n, dtype=torch.bool, device=h.device).triu(1)
    e = rms(e, get("e_norm.weight"), eps) @ get("e_proj.weight").T
    found, own = [], []
    for j in range(steps):
        u = e[:, j:j + n] + rms(h, get("h_norm.weight"), eps) @ get("h_proj.weight").T
        y = rms(u, get("blk.0.attn_norm.weight"), eps)
        q, k, v = (split(y @ get("blk.0.attn_%s.weight" % c).T, count)
                   for c, count in (("q", heads), ("k", kv), ("v", kv)))
        q, k = (rotate(t, cos[j:j + n], sin[j:j + n], False) for t in (q, k))
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
        if j == 0:
            keys, values = k, v
            y = f.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            own.append((k, v))
            scores = torch.cat([(q @ keys.transpose(-1, -2)).masked_fill(future, -math.inf)] +
                               [(q * mine).sum(-1, keepdim=True) for mine, _ in own], -1)
            p = (scores * size ** -0.5).softmax(-1)
            y = p[..., :n] @ values
            for i, (_, mine) in enumerate(own):
                y = y + p[..., n + i:n + i + 1] * mine
        u = u + y.transpose(1, 2).reshape(batch, n, -1) @ get("blk.0.attn_output.weight").T
        y = rms(u, get("blk.0.ffn_norm.weight"), eps)
        y = f.silu(y @ get("blk.0.ffn_gate.weight").T) * (y @ get("blk.0.ffn_up.weight").T)
        u = u + y @ get("blk.0.ffn_down.weight").T
        h = rms(u, get("output_norm.weight"), eps)
        found.append(h)
    return found


def soft_cross_entropy():
    """sum of -p log softmax(y . rows), with the gradient for y alone; p may sum to less than 1."""

    class SoftCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, rows, p):
            z = (y @ rows.T).log_softmax(-1)
            loss = -(p * z).sum()
            mass = p.sum(-1, keepdim=True)
            ctx.save_for_backward(z.exp_().mul_(mass).sub_(p) @ rows)
            return loss

        @staticmethod
        def backward(ctx, g):
            return ctx.saved_tensors[0] * g, None, None
    return SoftCrossEntropy.apply


class Muon:
    """Momentum whose update is made orthogonal, for matrices; times 0.2 sqrt(longer side): as large as AdamW's."""

    def __init__(self, matrices, momentum=0.95):
        self.matrices, self.momentum = list(matrices), momentum
        self.moments = [torch.zeros_like(w) for w in self.matrices]

    def step(self, rate):
        with torch.no_grad():
            for w, m in zip(self.matrices, self.moments):
                m.lerp_(w.grad, 1 - self.momentum)
                x = w.grad.lerp(m, self.momentum)
                tall = x.shape[0] > x.shape[1]
                x = x.T if tall else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                w.add_(x.T if tall else x, alpha=-rate * 0.2 * max(x.shape) ** 0.5)


def crops(sequences, crop, chance):
    """Every position once: pieces of at most `crop` tokens, cut elsewhere each time; an eighth stays whole."""
    for s in sequences:
        n, at = len(s["states"]), s["first"] and max(0, s["first"] - 1)
        step = n if not crop or chance.random() < 0.125 else crop
        cut = at + (chance.randint(crop // 4, crop) if step < n else n)
        while at < n:
            piece = slice(at, min(cut, n))
            if piece.stop - at > 4:
                yield {"ids": s["ids"][at:piece.stop + 1], "states": s["states"][piece],
                       "total": s["total"][piece], "first": max(0, s["first"] - at)}
            at, cut = piece.stop, piece.stop + step


def batches(sequences, tokens, crop, chance):
    """Batches of pieces of similar length, in random order."""
    pieces = sorted(crops(sequences, crop, chance), key=lambda s: len(s["states"]) + chance.random() * 20)
    found, some = [], []
    for s in pieces:
        if some and (len(some) + 1) * len(s["states"]) > tokens:
            found.append(some)
            some = []
        some.append(s)
    found.append(some)
    chance.shuffle(found)
    return found


def padded(some, steps, device):
    """ids [batch, n + steps + 1], states [batch, n, d], and length and first position to learn of each."""
    n = max(len(s["states"]) for s in some)
    ids = torch.zeros(len(some), n + steps + 1, dtype=torch.long)
    h = torch.zeros(len(some), n, some[0]["states"].shape[1])
    total = torch.full((len(some), n), math.inf)        # exp(z - inf) = 0: what is padding weighs nothing
    for i, s in enumerate(some):
        ids[i, :len(s["ids"])] = s["ids"]
        h[i, :len(s["states"])] = s["states"].float()
        total[i, s["first"]:len(s["states"])] = s["total"][s["first"]:]
    return ids.to(device), h.to(device), total.to(device)


def measure(head, trunk, rows, tokens_of_row, sequences, steps):
    """What an engine would see on the answers: acceptance by step, given those before; tokens per pass by window."""
    hits, tries = [0] * steps, [0] * steps
    emitted, passes = [0] * (steps + 1), [0] * (steps + 1)
    for s in sequences:
        ids, h, _ = padded([s], steps, trunk.device)
        with torch.no_grad():
            e = trunk.embed(ids[:, 1:])
            guesses = [tokens_of_row[(y @ rows.T).argmax(-1)][0].cpu() for y in unroll(head, e, h, steps)]
        n, first, line = len(s["ids"]), s["prompt"] - 1, s["ids"].long()
        run_of = []                 # how many proposals at t are right, one after the other
        for t in range(first, n - 2):
            right = 0
            while right < steps and t + 2 + right < n and guesses[right][t] == line[t + 2 + right]:
                right += 1
            run_of.append(right)
            for j in range(steps):
                if t + 2 + j < n and right >= j:
                    tries[j] += 1
                    hits[j] += right > j
        for window in range(steps + 1):
            t = 0
            while t < len(run_of) + 1:
                taken = min(window, run_of[t]) if t < len(run_of) else 0
                passes[window] += 1
                emitted[window] += taken + 1
                t += taken + 1
    return [a / max(b, 1) for a, b in zip(hits, tries)], [a / max(b, 1) for a, b in zip(emitted, passes)]


def present(o):
    return sorted(name for name in os.listdir(o.work) if name.startswith("states-") and name.endswith(".pt"))


def load_states(o):
    sequences = []
    for name in present(o):
        sequences += torch.load(os.path.join(o.work, name))
    sequences = [s for s in sequences if len(s["ids"]) > s["prompt"] + 2 and len(s["ids"]) > 8]
    if not sequences:
        sys.exit("train_heads.py: no states in %s yet" % o.work)
    texts = [s["ids"][:64].tolist() for s in sequences]
    same = 0                        # what all begin with (a system prompt) teaches nothing
    while all(t[same:same + 1] == texts[0][same:same + 1] and same < 64 for t in texts):
        same += 1
    for s in sequences:
        s["first"] = same
    chance = random.Random(o.seed)
    chance.shuffle(sequences)
    return [s for s in sequences if not s["held_out"]], [s for s in sequences if s["held_out"]]


def answers_of(o):
    """All answers so far, as (file, number, line)."""
    for folder in [o.work] + (o.also or []):
        for name in sorted(os.listdir(folder)):
            if name.startswith("answers-"):
                with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                    lines = [json.loads(line) for line in file if line.endswith("\n")]
                yield folder, name, lines


def choose_rows(o, trunk):
    """The tokens that the trunk writes most often; none: all rows."""
    if not o.rows or o.rows >= trunk.vocab:
        return []
    count = torch.zeros(trunk.vocab)
    for _, _, lines in answers_of(o):
        for line in lines:
            if "ids" in line and not held_out(line):
                for ids, weight in ((line["ids"], 1), (line["prompt_ids"], 0.1)):
                    count += weight * torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=trunk.vocab)
    for token in trunk.eos:
        count[token] += count.sum() / 200
    rows = count.argsort(descending=True)[:o.rows]
    say("%d rows: %.2f %% of the tokens" % (len(rows), 100 * count[rows].sum() / count.sum()))
    return sorted(rows.tolist())


def stage_train(o):
    trunk, files, (learn, test) = Trunk(o.model, o.work, device_of(o)), present(o), load_states(o)
    path, log = os.path.join(o.work, o.head), os.path.join(o.work, o.head.replace(".pt", "") + ".tsv")
    torch.manual_seed(o.seed)
    chance, loss_of = random.Random(o.seed), soft_cross_entropy()
    tokens = sum(len(s["states"]) for s in learn)
    say("%d sequences, %d tokens to learn from; %d held out" % (len(learn), tokens, len(test)))
    chosen = choose_rows(o, trunk)
    head = make_head(o, trunk, chosen)
    state = {"step": 0, "seconds": 0.0, "seen": 0}
    old = torch.load(path) if os.path.exists(path) else None
    if old:
        chosen = old["rows"]
        if old["shape"] != {**head.shape, "vocab_size": len(chosen) or trunk.vocab}:
            sys.exit("train_heads.py: %s is a head of another shape; name another with --head" % path)
        head.load_state_dict(old["weights"])
        if not old["finished"]:
            state = old["state"]
    tokens_of_row = torch.tensor(chosen or list(range(trunk.vocab)), device=trunk.device)
    rows = (trunk.output[tokens_of_row] * trunk.logit_scale).contiguous()
    matrices = [w for w in head.parameters() if w.ndim == 2]
    vectors = [w for w in head.parameters() if w.ndim == 1]
    muon, adam = Muon(matrices), torch.optim.AdamW(vectors, betas=(0.9, 0.95), weight_decay=0)
    if old and not old["finished"]:
        muon.moments = old["muon"]
        adam.load_state_dict(old["adam"])
    size = sum(w.numel() for w in head.parameters())
    say("head of %d weights (%.1f %% of the trunk's layers), %d output rows" %
        (size, 100 * size / trunk.weights, len(tokens_of_row)))
    queue, began, spent, shown = [], time.time(), state["seconds"], 0.0
    greedy, drawn = [s for s in test if s["greedy"]], [s for s in test if not s["greedy"]]

    def report(loss, final=False):
        few = None if final else o.test
        (a, b), (c, d) = (measure(head, trunk, rows, tokens_of_row, part[:few], 4) for part in (greedy, drawn))
        line = "%d\t%.0f\t%.2f\t%.4f" % (state["step"], state["seconds"], state["seen"] / tokens, loss)
        for figures in (a, b[1:4], c, d[1:4]):
            line += "\t" + " ".join("%.3f" % x for x in figures)
        say(line)
        with open(log, "a") as file:
            file.write(line + "\n")
        return a, c, b, d

    def save(finished, measured=None):
        torch.save({"rows": chosen, "shape": head.shape, "weights": head.state_dict(), "state": state,
                    "muon": muon.moments, "adam": adam.state_dict(), "finished": finished,
                    "measured": measured}, path + ".part")
        os.rename(path + ".part", path)

    if not state["step"]:
        with open(log, "a") as file:
            file.write("step\tseconds\tepochs\tloss\tgreedy: acceptance 1-4\ttokens per pass, windows 1-3\t"
                       "sampled: acceptance 1-4\ttokens per pass, windows 1-3\n")
    smooth = None
    while True:
        state["seconds"] = spent + time.time() - began
        done = max(state["seconds"] / (60 * o.minutes), state["step"] / o.steps if o.steps else 0)
        if done >= 1:
            break
        if not queue:
            if present(o) != files:         # more states have come
                files, (learn, test) = present(o), load_states(o)
                greedy, drawn = [s for s in test if s["greedy"]], [s for s in test if not s["greedy"]]
                tokens = sum(len(s["states"]) for s in learn)
            queue = batches(learn, o.batch, o.crop, chance)
        some, steps = queue.pop(), 1 if done < o.alone else o.unroll
        ids, h, total = padded(some, steps, trunk.device)
        with torch.no_grad():
            e = trunk.embed(ids[:, 1:])
            p = (trunk.logits(h, trunk.output[tokens_of_row]) - total[..., None]).exp()
        loss, weight, n = 0, 0.0, h.shape[1]
        for j, y in enumerate(unroll(head, e, h, steps)):   # row t of step j foretells what follows t + j + 1
            p_j, y = p[:, j + 1:], y[:, :n - j - 1]
            valid = (total[:, j + 1:] < math.inf) & (total[:, :n - j - 1] < math.inf)
            part = o.fade ** j / max(int(valid.sum()), 1)
            loss = loss + part * loss_of(y[valid], rows, p_j[valid])
            weight += o.fade ** j
        loss = loss / weight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vectors, 1)
        rate = min(1, (state["step"] + 1) / 20) * max(1 - done, 0.02)
        muon.step(o.rate * rate)
        for group in adam.param_groups:
            group["lr"] = o.rate * 0.3 * rate
        adam.step()
        for w in head.parameters():
            w.grad = None
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        state["step"] += 1
        state["seen"] += sum(len(s["states"]) for s in some)
        if state["seconds"] - shown > o.every:
            report(smooth)
            save(False)
            shown = time.time() - began + spent
    measured = report(smooth or 0, final=True)
    save(True, measured)


# ---------------------------------------------------------------- 5. write

def stage_write(o):
    """The head file: safetensors, every tensor on a multiple of 64 bytes, checksums as in a model file."""
    trunk = Trunk(o.model, o.work, "cpu")
    kept = torch.load(os.path.join(o.work, o.head), map_location="cpu")
    if not o.output:
        sys.exit("train_heads.py: -o FILE, please")
    acceptance = kept["measured"][0] if kept["measured"] else []
    meta = {"run.c": "heads 1", "draft.count": "1", "draft.trunk": crc32_of(trunk.w["output_norm.weight"]),
            "draft.0.kind": "serial", "draft.0.state": "norm", "draft.0.chain": "norm", "draft.0.norm": "own"}
    if acceptance:
        meta["draft.0.acceptance"] = " ".join("%.3f" % a for a in acceptance)
    meta.update({"draft.0." + key: str(value) for key, value in kept["shape"].items()})
    kind = {"f32": torch.float32, "f16": torch.float16}[o.type]
    tensors = {}
    for name, t in kept["weights"].items():
        name = name[2:].replace("/", ".")
        tensors["draft.0." + name] = t.to(kind) if t.ndim == 2 else t.float()
    if kept["rows"]:
        tensors["draft.0.output.weight"] = trunk.output[torch.tensor(kept["rows"])].to(kind)
        tensors["draft.0.rows"] = torch.tensor(kept["rows"], dtype=torch.int32)
    dtypes = {torch.float32: "F32", torch.float16: "F16", torch.int32: "I32"}
    header, blocks, at, pads = {}, [], 0, 0
    for name, t in tensors.items():
        raw = t.contiguous().numpy().tobytes()
        if at % 64:
            gap = -at % 64
            header["pad.%d" % pads] = {"dtype": "U8", "shape": [gap], "data_offsets": [at, at + gap]}
            blocks.append(bytes(gap))
            at, pads = at + gap, pads + 1
        header[name] = {"dtype": dtypes[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + len(raw)]}
        meta["crc32." + name] = "%08x" % zlib.crc32(raw)
        blocks.append(raw)
        at += len(raw)
    text = json.dumps({"__metadata__": meta, **header}).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with open(o.output + ".part", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(blocks))
    os.rename(o.output + ".part", o.output)
    say("%s: %d bytes, acceptance %s" %
        (o.output, 8 + len(text) + at, meta.get("draft.0.acceptance", "not measured")))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stage", choices=["prompts", "answers", "states", "train", "write", "all"])
    p.add_argument("model", help="the trunk: a model file of run.c, packed or not")
    p.add_argument("--work", required=True, help="folder for everything in between")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=1)
    g = p.add_argument_group("prompts")
    g.add_argument("--questions", nargs="*", help="JSON lines with `question` or `prompt`")
    g.add_argument("--texts", nargs="*", help="plain texts: passages out of them")
    g.add_argument("--per-source", type=int, default=400, help="prompts from each of these files (400)")
    g.add_argument("--turns", type=int, default=800, help="user turns that a chat model writes itself (800)")
    g = p.add_argument_group("answers")
    g.add_argument("--temperatures", type=float, nargs="*", default=[0, 0.8])
    g.add_argument("--tokens", type=int, default=256, help="length of an answer at most (256)")
    g.add_argument("--context", type=int, help="context of ./run (what the model has)")
    g = p.add_argument_group("states")
    g.add_argument("--also", nargs="*", help="further folders with answers")
    g.add_argument("--shard", type=lambda s: [int(i) for i in s.split("/")],
                   help="I/N: this part of the work, for several processes")
    g.add_argument("--length", type=int, default=512, help="tokens of a prompt and its answer at most (512)")
    g = p.add_argument_group("train")
    g.add_argument("--minutes", type=float, default=20, help="time to train for (20)")
    g.add_argument("--steps", type=int, help="batches to train on, if that is less")
    g.add_argument("--rows", type=int, help="output rows: the most frequent tokens (all, the trunk's matrix)")
    g.add_argument("--hidden", type=int, help="width of the FFN (512, or the trunk's if that is less)")
    g.add_argument("--heads", type=int, help="query heads (the trunk's)")
    g.add_argument("--kv-heads", type=int, help="key heads (the trunk's)")
    g.add_argument("--head-dim", type=int, help="size of a head (the trunk's)")
    g.add_argument("--unroll", type=int, default=3, help="steps of the chain to learn (3)")
    g.add_argument("--alone", type=float, default=0.3, help="part of the time for the first step alone (0.3)")
    g.add_argument("--fade", type=float, default=0.8, help="weight of a step relative to that before it (0.8)")
    g.add_argument("--rate", type=float, default=0.02, help="of learning (0.02)")
    g.add_argument("--crop", type=int, default=128, help="tokens of a piece, 0: whole answers (128)")
    g.add_argument("--batch", type=int, default=2048, help="tokens of a batch (2048)")
    g.add_argument("--every", type=float, default=60, help="seconds between two lines of the log (60)")
    g.add_argument("--test", type=int, default=40, help="held-out answers for a line; the last: all (40)")
    g.add_argument("--head", default="head.pt", help="name of the trained head in the work folder (head.pt)")
    g = p.add_argument_group("write")
    g.add_argument("-o", dest="output", help="the head file")
    g.add_argument("--type", choices=["f32", "f16"], default="f32")
    o = p.parse_args()
    if not torch and o.stage not in ("prompts", "answers"):
        sys.exit("train_heads.py: this stage needs PyTorch and numpy: pip install torch numpy")
    os.makedirs(o.work, exist_ok=True)
    stages = ["prompts", "answers", "states", "train", "write"] if o.stage == "all" else [o.stage]
    for stage in stages:
        globals()["stage_" + stage](o)


if __name__ == "__main__":
    main()
