#!/usr/bin/env python3
"""Trains a serial draft head for a model file and writes it as a head file for run.c.

    python3 models/train_heads.py STAGE MODEL --work FOLDER [options]

STAGE is one of these, in this order; each leaves its result in FOLDER and goes on where it was interrupted:

    prompts   prompts.jsonl, out of files of questions and texts, and of turns that the model writes itself
    answers   answers-N.jsonl: ./run answers them, sixteen at a time, with several temperatures
    states    states-N.pt: the trunk's final hidden states over prompts and answers
    train     head.pt, log.tsv: the head, trained against the trunk's own distribution
    write     the head file

or `all`. Needs PyTorch and numpy; a GPU is used if there is one. models/README.md has the settings of the shipped heads.
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

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# How a user's turn may begin; the model goes on by itself. Empty: it begins by itself, too.
BEGINNINGS = ("", "", "", "", "What", "Who", "How do I", "Why", "Explain", "Write a story about", "Write a Python function",
              "Complete the following Python function:\n\n```python\ndef", "Translate into English:", "Translate into German:",
              "Summarize the following text:", "Write an email", "Compare", "You are", "Read the passage and answer:",
              "Give me a list of", "Solve this problem:", "Imagine", "Rewrite this sentence", "Classify")
# What may be asked about a passage of a text.
TASKS = ("Continue this text:\n\n%s", "Summarize: %s", "%s\n\nWhat is this text about?", "Rewrite in simple words: %s",
         "Here is a passage:\n\n%s\n\nWrite three questions about it, with answers.", "Translate into Spanish: %s")


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
        lines = run(o.model, ["-m", "generate", "--special", "--no-echo", "--json", "-i", user_prefix(meta) + beginning, "-n", 120,
                              "--samples", each, "-t", 1, "-k", 0, "-p", 0.95, "--min-p", 0, "-s", o.seed + number, "-j", o.threads])
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
        command = [os.path.join(ROOT, "run"), o.model, "-f", os.path.join(o.work, "prompts.jsonl"), "--json", "-n", o.tokens, "-t", temperature,
                   "-k", 0, "-p", 1, "--min-p", 0.05, "-s", o.seed + i, "-j", max(1, o.threads // len(o.temperatures)), "-o", out,
                   "--shard", "%d/%d" % (i + 1, len(o.temperatures)), "--draft", "off"]
        if o.context:
            command += ["-c", o.context]
        jobs.append(subprocess.Popen([str(c) for c in command]))
    if any([job.wait() not in (0, 1) for job in jobs]):     # 1: some prompt was too long
        sys.exit("train_heads.py: ./run failed; the answers so far are kept, run this stage again to go on")



# ---------------------------------------------------------------- 3. states: the trunk, in PyTorch

def read_model(path, work):
    """Metadata and float tensors of a model file; packed matrices are unpacked by ./run first."""
    import numpy
    import torch
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
    import torch
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
    """A plain forward pass over the tensors of a model file."""

    def __init__(self, path, work, device):
        meta, self.w = read_model(path, work)
        number = lambda key, otherwise: float(meta.get(key, otherwise))
        self.meta, self.device = meta, device
        self.w = {name: tensor.to(device) for name, tensor in self.w.items()}
        self.dim, self.layers, self.heads = int(meta["dim"]), int(meta["n_layers"]), int(meta["n_heads"])
        self.kv_heads, self.vocab = int(meta.get("n_kv_heads", self.heads)), int(meta["vocab_size"])
        self.size = int(meta.get("head_dim", self.dim // self.heads))
        self.eps, self.pairs = number("norm.eps", 1e-5), int(meta.get("rope.dims", self.size)) // 2
        self.scale = number("attention.scale", self.size ** -0.5)
        self.cap, self.logit_cap = number("attention.soft_cap", 0), number("logit.soft_cap", 0)
        self.embedding_scale, self.logit_scale = number("embedding.scale", 1), number("logit.scale", 1)
        self.window = int(meta.get("window", 0))
        self.windowed = [int(i) for i in meta.get("window.layers", " ".join(map(str, range(self.layers)))).split()]
        self.activation = meta.get("activation", "silu")
        self.output = self.w.get("output.weight", self.w["token_embd.weight"])
        self.eos = [int(i) for i in meta.get("token.eos", "").split()]

    def angles(self, n):
        import torch
        pairs = torch.arange(self.pairs, dtype=torch.float64)
        speed = self.w.get("rope.freqs")
        speed = speed.double().cpu() if speed is not None else float(self.meta.get("rope.base", 10000)) ** (-pairs / self.pairs)
        angles = torch.arange(n, dtype=torch.float64)[:, None] * speed
        factor = float(self.meta.get("rope.attention_factor", 1))
        return (angles.cos() * factor).float().to(self.device), (angles.sin() * factor).float().to(self.device)

    def linear(self, name, x):
        import torch
        return torch.nn.functional.linear(x, self.w[name + ".weight"], self.w.get(name + ".bias"))

    def embed(self, ids):
        return self.w["token_embd.weight"][ids] * self.embedding_scale

    def logits(self, h, rows=None):
        z = h @ (self.output if rows is None else rows).T * self.logit_scale
        return self.logit_cap * (z / self.logit_cap).tanh() if self.logit_cap else z

    def states(self, ids):
        """ids [batch, tokens] to the final normed states [batch, tokens, dim]."""
        import torch
        f, w, eps = torch.nn.functional, self.w, self.eps
        act = {"silu": f.silu, "gelu": f.gelu, "gelu_tanh": lambda g: f.gelu(g, approximate="tanh")}[self.activation]
        batch, n = ids.shape
        cos, sin = self.angles(n)
        interleaved = self.meta.get("rope.pairing") == "interleaved"
        distance = torch.arange(n, device=self.device)[:, None] - torch.arange(n, device=self.device)
        x = self.embed(ids)
        for i in range(self.layers):
            b = "blk.%d." % i
            split = lambda t, heads: t.view(batch, n, heads, self.size).transpose(1, 2)
            y = rms(x, w[b + "attn_norm.weight"], eps)
            q, k, v = (split(self.linear(b + "attn_" + c, y), heads)
                       for c, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)))
            if b + "attn_q_norm.weight" in w:
                q, k = rms(q, w[b + "attn_q_norm.weight"], eps), rms(k, w[b + "attn_k_norm.weight"], eps)
            q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
            seen = distance >= 0
            if self.window and i in self.windowed:
                seen = seen & (distance < self.window)
            if self.cap:
                scores = self.cap * ((q @ k.transpose(-1, -2)) * self.scale / self.cap).tanh()
                y = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
            else:
                y = f.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale)
            y = self.linear(b + "attn_output", y.transpose(1, 2).reshape(batch, n, -1))
            if b + "post_attention_norm.weight" in w:
                y = rms(y, w[b + "post_attention_norm.weight"], eps)
            x = x + y
            y = rms(x, w[b + "ffn_norm.weight"], eps)
            y = self.linear(b + "ffn_down", act(self.linear(b + "ffn_gate", y)) * self.linear(b + "ffn_up", y))
            if b + "post_ffw_norm.weight" in w:
                y = rms(y, w[b + "post_ffw_norm.weight"], eps)
            x = x + y
        return rms(x, w["output_norm.weight"], eps)


def device_of(o):
    import torch
    torch.set_num_threads(o.threads)
    torch.set_float32_matmul_precision("high")
    return "cuda" if torch.cuda.is_available() else "cpu"


def held_out(line):
    """One prompt in sixteen is for measuring; the same in every stage and run."""
    return zlib.crc32(line["prompt"].encode()) % 16 == 0


def stage_states(o):
    """Every answer that is not yet done, a file for each portion: sequences with ids, states and what the trunk says."""
    import torch
    trunk, began = Trunk(o.model, o.work, device_of(o)), time.time()
    tokens = total = 0
    for folder in [o.work] + (o.also or []):
        for name in sorted(os.listdir(folder)):
            if not name.startswith("answers-"):
                continue
            stem = "states-%s-%08x-" % (name[8:-6], zlib.crc32(folder.encode()) if folder != o.work else 0)
            with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                lines = [json.loads(line) for line in file if line.endswith("\n")]
            done = max([int(f[len(stem):-3]) for f in os.listdir(o.work) if f.startswith(stem) and f.endswith(".pt")] or [0])
            greedy = o.temperatures[int(name[8:-6])] == 0 if name[8:-6].isdigit() else False
            while done < len(lines):
                part, done = lines[done:done + 64], min(done + 64, len(lines))
                part = sorted((line for line in part if "ids" in line), key=lambda line: len(line["prompt_ids"]) + len(line["ids"]))
                sequences = []
                for at in range(0, len(part), 8):
                    some = part[at:at + 8]
                    ids = [(line["prompt_ids"] + line["ids"])[:o.length] for line in some]
                    padded = torch.zeros(len(some), max(map(len, ids)), dtype=torch.long)
                    for i, row in enumerate(ids):
                        padded[i, :len(row)] = torch.tensor(row)
                    with torch.no_grad():
                        h = trunk.states(padded.to(trunk.device))
                        for i, (row, line) in enumerate(zip(ids, some)):
                            z = trunk.logits(h[i, :len(row)])
                            best = z.argmax(-1)
                            if line["stop"] == "eos" and len(row) < o.length:     # the end, too, is a token to propose
                                row = row + [max(trunk.eos, key=lambda e: z[-1, e].item())]
                            sequences.append({
                                "ids": torch.tensor(row, dtype=torch.int32), "states": h[i, :len(z)].bfloat16().cpu(),
                                "best": best.int().cpu(), "total": z.logsumexp(-1).cpu(), "prompt": len(line["prompt_ids"]),
                                "held_out": held_out(line), "greedy": greedy, "source": line.get("source", "")})
                            tokens += len(z)
                path = os.path.join(o.work, "%s%06d.pt" % (stem, done))
                torch.save(sequences, path + ".part")
                os.rename(path + ".part", path)
                say("%s: %d tokens, %.0f tok/s" % (path, tokens, tokens / (time.time() - began)))


def stage_check(o):
    """The trunk here against ./run: the log-probabilities of a greedy answer."""
    import torch
    trunk = Trunk(o.model, o.work, device_of(o))
    line = json.loads(run(o.model, ["-m", "generate", "--json", "-i", "Once upon a time", "-n", 60, "-t", 0, "--logprobs", 5, "--draft", "off",
                                    "--kv", "f32", "-j", 1]))
    ids = line["prompt_ids"] + line["ids"]
    with torch.no_grad():
        mine = trunk.logits(trunk.states(torch.tensor([ids]).to(trunk.device)))[0].log_softmax(-1).cpu()
    print(line["logprobs"][:1])
    mine = mine[len(line["prompt_ids"]) - 1:-1].gather(1, torch.tensor(line["ids"])[:, None])[:, 0]
    theirs = torch.tensor([t["logprob"] for t in line["logprobs"]])
    say("log-probabilities of %d tokens: largest difference %.5f, mean %.5f" %
        (len(mine), (mine - theirs).abs().max(), (mine - theirs).abs().mean()))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stage", choices=["prompts", "answers", "check", "states", "train", "write", "all"])
    p.add_argument("model", help="the trunk: a model file of run.c, packed or not")
    p.add_argument("--work", required=True, help="folder for everything in between")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=1)
    g = p.add_argument_group("prompts")
    g.add_argument("--questions", nargs="*", help="JSON lines with `question` or `prompt`")
    g.add_argument("--texts", nargs="*", help="plain texts: passages out of them")
    g.add_argument("--per-source", type=int, default=400, help="prompts from each of these files (400)")
    g.add_argument("--turns", type=int, default=800, help="user turns that the model writes itself (800; chat models)")
    g = p.add_argument_group("answers")
    g.add_argument("--temperatures", type=float, nargs="*", default=[0, 0.8])
    g.add_argument("--tokens", type=int, default=256, help="length of an answer at most (256)")
    g.add_argument("--context", type=int, help="context of ./run (what the model has)")
    g = p.add_argument_group("states")
    g.add_argument("--also", nargs="*", help="further folders with answers")
    g.add_argument("--length", type=int, default=512, help="tokens of a prompt and its answer at most (512)")
    o = p.parse_args()
    os.makedirs(o.work, exist_ok=True)
    stages = ["prompts", "answers", "states", "train", "write"] if o.stage == "all" else [o.stage]
    for stage in stages:
        globals()["stage_" + stage](o)


if __name__ == "__main__":
    main()
