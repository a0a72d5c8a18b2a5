#!/usr/bin/env python3
"""What packing costs: divergence from the unquantised model, per byte, for ./run's types and llama.cpp's.

    make && python3 tests/quality.py --model FOLDER --text FILE --work FOLDER
            [--calibration FILE] [--llama-cpp BUILD] [--pack "--type q4" ...] [--gguf "Q4_K_M" ...] [--json]

--model is a Hugging Face folder of architecture llama with float weights and a tokenizer.json, as
tests/train_small.py makes it (which writes test.txt and calibration.txt too); --llama-cpp a build folder of
llama.cpp with the targets llama-quantize and, for lines with "--imatrix", llama-imatrix. Needs torch,
transformers, tokenizers and gguf. With the small model it takes about ten seconds a line on one core.

How it measures: every quantised file is decoded to float32 again (ours by `-m quantize --type f32`, GGUF by the
gguf package) and its weights run through one and the same float32 forward pass, so that the columns compare weights
and nothing else. The column "int8" is ./run itself on the packed file, with its 8-bit activations and float16 cache.
  bits     stored bits a weight over all matrices, the embedding included
  kl       mean over the tokens of KL(unquantised || quantised) of the next token's distribution, in thousandths of a
           nat, and its standard error; windows of --window tokens, spread evenly over the text
  ppl      perplexity on the text
"--calibration" in --pack and "--imatrix" in --gguf lines stand for the options that name the calibration text.
"""
import argparse
import json
import os
import subprocess
import sys

import gguf
import numpy as np
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from common import ROOT, build

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def gguf_name(name):
    """The name that a tensor of Hugging Face's has in GGUF files and in ours."""
    name = name[:-len(".weight")]
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return "blk.%s.%s.weight" % (layer, NAMES[rest])
    return NAMES[name] + ".weight"


def command(*words):
    p = subprocess.run([str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if p.returncode:
        raise SystemExit("%s\nfailed:\n%s" % (" ".join(map(str, words)), p.stdout.decode("utf-8", "replace")[-3000:]))


class Reference:
    """The unquantised model, the windows of the text, and the log-probabilities of every next token in them."""

    def __init__(self, folder, text, tokens, window):
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.config = self.model.config
        self.tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        with open(text, encoding="utf-8", errors="replace") as f:
            ids = np.array(self.tokenizer.encode(f.read(), add_special_tokens=False).ids)
        n = min(tokens, len(ids)) // window
        if not n:
            raise SystemExit("%s has %d tokens, fewer than a window" % (text, len(ids)))
        self.windows = [ids[s:s + window] for s in np.linspace(0, len(ids) - window, n).astype(int)]
        # tied matrices are one parameter, listed once
        self.weights = {gguf_name(k): p for k, p in self.model.named_parameters()}
        self.floats = {k: p.detach().clone() for k, p in self.weights.items()}
        self.log_probabilities = list(self.evaluate({}))

    def heads(self, name):
        return {"attn_q": self.config.num_attention_heads,
                "attn_k": self.config.num_key_value_heads}.get(name.split(".")[-2])

    def evaluate(self, weights):
        """Yields log-probabilities [window, vocab] with some weights replaced: {GGUF name: array}."""
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(torch.as_tensor(np.array(weights[name])) if name in weights else self.floats[name])
            for w in self.windows:
                yield torch.log_softmax(self.model(torch.tensor(w)[None]).logits[0].double(), -1).float()

    def compare(self, log_probabilities):
        """kl, its standard error (windows are the sample), perplexity."""
        kl, nll = [], []
        for w, p, q in zip(self.windows, self.log_probabilities, log_probabilities):
            kl.append((p.exp() * (p - q)).sum(-1).double().mean().item())
            nll.append(-q[:-1][range(len(w) - 1), torch.tensor(w[1:])].double().mean().item())
        return {"kl": np.mean(kl), "kl_error": np.std(kl) / max(len(kl) - 1, 1) ** 0.5, "ppl": np.exp(np.mean(nll))}


def bits(reference, stored):
    """Bits a weight over all matrices, from {name: stored bytes}."""
    names = [k for k, p in reference.floats.items() if p.dim() == 2]
    return 8 * sum(stored[k] for k in names) / sum(reference.floats[k].numel() for k in names)


# -- llama.cpp --

def write_gguf(reference, path):
    c, w = reference.config, gguf.GGUFWriter(path, "llama")
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_dimension_count(c.head_dim)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_vocab_size(c.vocab_size)
    tokenizer = json.loads(reference.tokenizer.to_str())
    special = {t["id"] for t in tokenizer["added_tokens"]}
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([reference.tokenizer.id_to_token(i) for i in range(c.vocab_size)])
    w.add_token_types([3 if i in special else 1 for i in range(c.vocab_size)])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    w.add_bos_token_id(c.bos_token_id)
    w.add_eos_token_id(c.eos_token_id)
    w.add_add_bos_token(False)
    for name, p in reference.floats.items():
        x, heads = p.numpy(), reference.heads(name)
        if heads:                   # rotary pairs lie side by side
            x = x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        w.add_tensor(name, np.ascontiguousarray(x))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def read_gguf(reference, path):
    """Weights and stored bytes of a GGUF file."""
    weights, stored = {}, {}
    for t in gguf.GGUFReader(path).tensors:
        if t.name not in reference.floats:
            continue
        shape, heads = tuple(reference.floats[t.name].shape), reference.heads(t.name)
        x = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32).reshape(shape)
        if heads:
            x = x.reshape(heads, -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        weights[t.name], stored[t.name] = x, t.n_bytes
    return weights, stored


def llama_cpp(reference, args, lines):
    tool = lambda name: os.path.join(args.llama_cpp, "bin", name)
    source, imatrix = os.path.join(args.work, "f32.gguf"), os.path.join(args.work, "imatrix.gguf")
    write_gguf(reference, source)
    if any("--imatrix" in line for line in lines):
        command(tool("llama-imatrix"), "-m", source, "-f", args.calibration, "-o", imatrix, "-c", args.window,
                "-t", 1, "--no-ppl", "--process-output")
    for line in lines:
        out = os.path.join(args.work, "%s.gguf" % "-".join(line.replace("--", "").split()))
        words = line.replace("--imatrix", "--imatrix " + imatrix).split()
        command(tool("llama-quantize"), *words[:-1], source, out, words[-1], 1)
        weights, stored = read_gguf(reference, out)
        yield {"engine": "llama.cpp", "name": line, "bits": bits(reference, stored), "file": os.path.getsize(out),
               **reference.compare(reference.evaluate(weights))}


# -- ./run --

def end_to_end(reference, path):
    """Log-probabilities as ./run computes them on the packed file."""
    requests = b"".join(np.array([len(w), *w], dtype="<i4").tobytes() for w in reference.windows)
    with open(path + ".requests", "wb") as f:
        f.write(requests)
    vocab = reference.config.vocab_size
    with open(path + ".requests", "rb") as f:
        p = subprocess.Popen([build("score", "tests/score.c"), path, "f16"], stdin=f, stdout=subprocess.PIPE)
    for w in reference.windows:
        x = np.frombuffer(p.stdout.read(4 * vocab * len(w)), dtype="<f4").reshape(len(w), vocab)
        yield torch.log_softmax(torch.tensor(x).double(), -1).float()
    if p.wait():
        raise SystemExit("score failed on %s" % path)


def packed_bytes(path):
    with open(path, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return {k: v["data_offsets"][1] - v["data_offsets"][0] for k, v in header.items() if k != "__metadata__"}


def ours(reference, args, lines):
    source = os.path.join(args.work, "f32.bin")
    command(sys.executable, os.path.join(ROOT, "export.py"), args.model, "-o", source)
    for line in lines:
        out = os.path.join(args.work, "%s.bin" % "-".join(line.replace("--", "").split()))
        words = line.replace("--calibration", "-f %s" % args.calibration).split()
        command(args.run, source, "-m", "quantize", *words, "-o", out)
        command(args.run, out, "-m", "quantize", "--type", "f32", "-o", out + ".f32")
        weights = {k: v for k, v in load_file(out + ".f32").items() if k in reference.floats}
        result = {"engine": "run.c", "name": line, "bits": bits(reference, packed_bytes(out)),
                  "file": os.path.getsize(out), **reference.compare(reference.evaluate(weights))}
        whole = reference.compare(end_to_end(reference, out))
        yield {**result, "kl_int8": whole["kl"], "ppl_int8": whole["ppl"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", required=True, help="folder for the files that are made")
    parser.add_argument("--calibration")
    parser.add_argument("--llama-cpp")
    parser.add_argument("--run", default=os.path.join(ROOT, "run"))
    parser.add_argument("--pack", action="append", help="options of -m quantize; may be repeated")
    parser.add_argument("--gguf", action="append", help="options of llama-quantize, the type last; may be repeated")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.makedirs(args.work, exist_ok=True)
    packs = args.pack or ["--type " + t for t in ("q4", "q4a", "q8")]
    types = args.gguf or ["--pure Q4_0", "Q4_0", "Q4_1", "IQ4_XS", "Q4_K_M", "Q5_K_M"]
    if args.calibration and not args.gguf:
        types += ["--imatrix " + t for t in types]
    reference = Reference(args.model, args.text, args.tokens, args.window)
    results = [{"engine": "", "name": "unquantised", "bits": 32, "file": 0,
                **reference.compare(reference.log_probabilities)}]
    if not args.json:
        print("%-34s %6s %10s %9s %7s %9s %9s %9s" % ("", "bits", "bytes", "kl/1000", "+-", "ppl", "kl int8", "ppl int8"))
    for r in ours(reference, args, packs):
        results.append(r)
        show(r, args)
    for r in llama_cpp(reference, args, types) if args.llama_cpp else []:
        results.append(r)
        show(r, args)
    show(results[0], args)
    if args.json:
        print(json.dumps({"tokens": len(reference.windows) * args.window, "window": args.window, "results": results}))


def show(r, args):
    if args.json:
        return
    print("%-34s %6.3f %10d %9.3f %7.3f %9.4f" % ((r["engine"] + " " + r["name"]).strip(), r["bits"], r["file"],
          1e3 * r["kl"], 1e3 * r["kl_error"], r["ppl"]) +
          (" %9.3f %9.4f" % (1e3 * r["kl_int8"], r["ppl_int8"]) if "kl_int8" in r else ""), flush=True)


if __name__ == "__main__":
    main()
