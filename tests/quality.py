#!/usr/bin/env python3
"""What packing costs: divergence from the unquantised model, per byte, for ./run's types and llama.cpp's.

    make && python3 tests/quality.py --model MODEL --text FILE --work FOLDER
            [--calibration FILE] [--llama-cpp BUILD [--gguf FILE]] [--pack "--bits 5"] [--peer "Q4_K_M"] [--json]

--model is a model file with float weights, or a Hugging Face folder that export.py makes one from, as tests/train_small.py
trains it (which writes texts for --text and --calibration too). --llama-cpp is a build folder of llama.cpp with the
targets llama-quantize and, for lines with "--imatrix", llama-imatrix; it reads --gguf, the same weights as floats,
which is written here if --model is a folder of architecture llama with a tokenizer.json. Needs numpy; to write a
GGUF file also gguf and tokenizers. With the small model it takes some ten seconds a line on one core.

How it measures: every quantised file is decoded to float32 (GGUF by export.py, both by `-m quantize --type f32`)
and evaluated by ./run's float kernels with a float32 cache, so that the columns compare weights and nothing else. The
column "int8" is the packed file itself, with its 8-bit activations.
  bits     stored bits a weight over all matrices, the embedding included
  kl       mean over the tokens of KL(unquantised || quantised) of the next token's distribution, in thousandths of a
           nat, and its standard error; windows of --window tokens, spread evenly over the text
  ppl      perplexity on the text
"--calibration" in --pack and "--imatrix" in --peer lines stand for the options that name the calibration text.
"""
import argparse
import json
import os
import subprocess
import sys

import numpy as np

from common import ROOT, Safetensors, build

EXPORT = os.path.join(ROOT, "export.py")


def command(*words):
    p = subprocess.run([str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if p.returncode:
        raise SystemExit("%s\nfailed:\n%s" % (" ".join(map(str, words)), p.stdout.decode("utf-8", "replace")[-3000:]))
    return p.stdout


class Reference:
    """The unquantised model, windows of the text, and the log-probabilities of every next token in them."""

    def __init__(self, args, path):
        self.path, self.program, self.threads = path, build("logits", "tests/logits.c"), str(args.threads)
        self.file = Safetensors(path)
        self.weights = {name: shape[0] * shape[1] for name, (_, shape, _) in self.file.tensors.items()
                        if name.endswith(".weight") and len(shape) == 2}
        ids = json.loads(command(args.run, path, "-m", "tokenize", "-f", args.text, "--json"))["ids"]
        bos = [int(self.file.metadata["token.bos"])] if self.file.metadata.get("token.add_bos") == "1" else []
        size = args.window - len(bos)
        n = min(args.tokens // args.window, len(ids) // size)
        if not n:
            raise SystemExit("%s has %d tokens, fewer than a window" % (args.text, len(ids)))
        self.windows = [bos + ids[s:s + size] for s in np.linspace(0, len(ids) - size, n).astype(int)]
        self.log_probabilities = list(self.evaluate(path))

    def evaluate(self, path):
        """Yields log-probabilities [window, vocab]."""
        for w in self.windows:
            p = subprocess.run([self.program, path, "16"] + list(map(str, w)), stdout=subprocess.PIPE, check=True,
                               env={**os.environ, "OMP_NUM_THREADS": self.threads})
            x = np.frombuffer(p.stdout, dtype="<f4").reshape(len(w), -1).astype(np.float64)
            x -= x.max(-1, keepdims=True)
            yield (x - np.log(np.exp(x).sum(-1, keepdims=True))).astype(np.float32)

    def compare(self, log_probabilities):
        """kl, its standard error (windows are the sample), perplexity."""
        kl, nll = [], []
        for w, p, q in zip(self.windows, self.log_probabilities, log_probabilities):
            kl.append((np.exp(p) * (p - q)).sum(-1, dtype=np.float64).mean())
            nll.append(-q[np.arange(len(w) - 1), w[1:]].mean(dtype=np.float64))
        return {"kl": np.mean(kl), "kl_error": np.std(kl) / max(len(kl) - 1, 1) ** 0.5, "ppl": np.exp(np.mean(nll))}

    def result(self, args, engine, name, path, stored):
        """Of a file that ./run can quantise; the matrices of `stored` tell how many bytes they have."""
        command(args.run, path, "-m", "quantize", "--type", "f32", "-o", path + ".f32")
        bits = 8 * sum(len(stored.tensors[k][2]) for k in self.weights) / sum(self.weights.values())
        return {"engine": engine, "name": name, "bits": bits, **self.compare(self.evaluate(path + ".f32"))}


def write_gguf(folder, file, path):
    """A float model file of architecture llama as GGUF, with the tokenizer of the Hugging Face folder it came from."""
    import gguf
    from tokenizers import Tokenizer
    tokenizer, m = Tokenizer.from_file(os.path.join(folder, "tokenizer.json")), file.metadata
    heads = {"attn_q": int(m["n_heads"]), "attn_k": int(m.get("n_kv_heads", m["n_heads"]))}
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(int(m["context_length"]))
    w.add_embedding_length(int(m["dim"]))
    w.add_block_count(int(m["n_layers"]))
    w.add_feed_forward_length(int(m["hidden_dim"]))
    w.add_head_count(heads["attn_q"])
    w.add_head_count_kv(heads["attn_k"])
    w.add_layer_norm_rms_eps(float(m["norm.eps"]))
    w.add_rope_dimension_count(int(m["head_dim"]))
    w.add_rope_freq_base(float(m["rope.base"]))
    w.add_vocab_size(int(m["vocab_size"]))
    content = json.loads(tokenizer.to_str())
    special = {t["id"] for t in content["added_tokens"]}
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([tokenizer.id_to_token(i) for i in range(int(m["vocab_size"]))])
    w.add_token_types([3 if i in special else 1 for i in range(int(m["vocab_size"]))])
    w.add_token_merges([x if isinstance(x, str) else " ".join(x) for x in content["model"]["merges"]])
    w.add_bos_token_id(int(m.get("token.bos", 0)))
    w.add_eos_token_id(int(m["token.eos"].split()[0]))
    w.add_add_bos_token(False)
    for name, (_, shape, data) in file.tensors.items():
        if not name.endswith(".weight"):
            continue
        x, n = np.frombuffer(data, "<f4").reshape(shape), heads.get(name.split(".")[-2])
        if n:                       # rotary pairs lie side by side
            x = x.reshape(n, 2, -1, shape[1]).swapaxes(1, 2).reshape(shape)
        w.add_tensor(name, np.ascontiguousarray(x))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def ours(reference, args, lines):
    for line in lines:
        out = os.path.join(args.work, "%s.bin" % "-".join(line.replace("--", "").split()))
        words = line.replace("--calibration", "-f %s" % args.calibration).split()
        command(args.run, reference.path, "-m", "quantize", *words, "-o", out)
        whole = reference.compare(reference.evaluate(out))
        yield {**reference.result(args, "run.c", line, out, Safetensors(out)), "kl_int8": whole["kl"], "ppl_int8": whole["ppl"]}


def llama_cpp(reference, args, lines):
    tool = lambda name: os.path.join(args.llama_cpp, "bin", name)
    imatrix = os.path.join(args.work, "imatrix.gguf")
    if any("--imatrix" in line for line in lines):
        command(tool("llama-imatrix"), "-m", args.gguf, "-f", args.calibration, "-o", imatrix, "-c", args.window,
                "-t", args.threads, "--no-ppl", "--process-output")
    for line in lines:
        out = os.path.join(args.work, "%s.gguf" % "-".join(line.replace("--", "").split()))
        words = line.replace("--imatrix", "--imatrix " + imatrix).split()
        command(tool("llama-quantize"), *words[:-1], args.gguf, out, words[-1], args.threads)
        command(sys.executable, EXPORT, out, "--no-pack", "-o", out + ".bin")
        yield reference.result(args, "llama.cpp", line, out + ".bin", Safetensors(out + ".bin"))


def show(r, args):
    if not args.json:
        whole = " %9.3f %9.4f" % (1e3 * r["kl_int8"], r["ppl_int8"]) if "kl_int8" in r else ""
        print("%-38s %6.3f %9.3f %7.3f %9.4f%s" % ((r["engine"] + " " + r["name"]).strip(), r["bits"], 1e3 * r["kl"],
                                                   1e3 * r["kl_error"], r["ppl"], whole), flush=True)
    return r


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--work", required=True, help="folder for the files that are made")
    parser.add_argument("--calibration")
    parser.add_argument("--llama-cpp")
    parser.add_argument("--gguf", help="the model for llama.cpp")
    parser.add_argument("--run", default=os.path.join(ROOT, "run"))
    parser.add_argument("--pack", action="append", help="options of -m quantize; may be repeated")
    parser.add_argument("--peer", action="append", help="options of llama-quantize, the type last; may be repeated")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)
    packs = args.pack or ["--bits 4.5", "--bits 5", "--type q4", "--type q4a", "--type q6", "--type q8"]
    peers = args.peer or ["--pure Q4_0", "Q4_0", "IQ4_XS", "Q4_K_M", "Q5_K_M"]
    if args.calibration:
        packs += [] if args.pack else [p + " --calibration" for p in packs[:-1]]
        peers += [] if args.peer else ["--imatrix " + p for p in peers]
    floats = args.model
    if os.path.isdir(args.model):
        floats = os.path.join(args.work, "f32.bin")
        command(sys.executable, EXPORT, args.model, "-o", floats)
    reference = Reference(args, floats)
    if args.llama_cpp and not args.gguf:
        args.gguf = os.path.join(args.work, "f32.gguf")
        write_gguf(args.model, reference.file, args.gguf)
    if not args.json:
        print("%-38s %6s %9s %7s %9s %9s %9s" % ("", "bits", "kl/1000", "+-", "ppl", "kl int8", "ppl int8"))
    plain = {"engine": "", "name": "unquantised", "bits": 32, **reference.compare(reference.log_probabilities)}
    results = [show(plain, args)] + [show(r, args) for r in ours(reference, args, packs)]
    results += [show(r, args) for r in (llama_cpp(reference, args, peers) if args.llama_cpp else [])]
    if args.json:
        print(json.dumps({"tokens": sum(map(len, reference.windows)), "window": args.window, "results": results}))


if __name__ == "__main__":
    main()
