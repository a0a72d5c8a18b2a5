"""Logits of small random models of every architecture against torch's in float32 (make_models.py).

Models of direct/ are run.c files as they stand, with what export.py never asks for (make_direct.py).
"""
import json
import os
import struct
import unittest
import zlib

from common import FIXTURES, build, export, ok, scratch
from engine import isas

MODELS = os.path.join(FIXTURES, "models")
DIRECT = os.path.join(FIXTURES, "direct")
TOLERANCE = 1e-4
CHUNKS = (0, 7, 1)  # 0: all in one


class Logits(unittest.TestCase):

    def one(self, name, source):
        model = scratch("logits", os.path.basename(source) + ".bin")
        if os.path.exists(model):
            os.remove(model)
        export([source, "-o", model])
        self.compare(model, os.path.join(MODELS, name, "expected"))

    def compare(self, model, reference):
        """Every logit of a model file with those of reference.json and .f32z; the same bits in any chunks."""
        with open(reference + ".json") as f:
            expected = json.load(f)
        with open(reference + ".f32z", "rb") as f:
            data = zlib.decompress(f.read())
        ids, positions = expected["ids"], expected["positions"]
        vocab = len(data) // 4 // len(positions)
        wanted = struct.unpack("<%df" % (len(data) // 4), data)
        self.assertEqual(len(wanted), vocab * len(positions))
        program = build("logits", "tests/logits.c")
        outputs = [ok([model, chunk or len(ids)] + ids, program=program) for chunk in CHUNKS]
        self.assertEqual(len(outputs[0]), len(ids) * vocab * 4)
        worst = (0.0, None)
        for i, p in enumerate(positions):
            got = struct.unpack_from("<%df" % vocab, outputs[0], p * vocab * 4)
            for v in range(vocab):
                difference = abs(got[v] - wanted[i * vocab + v])
                if not difference <= worst[0]:  # holds for NaN too
                    worst = (difference, (p, v, got[v], wanted[i * vocab + v]))
        self.assertTrue(worst[0] <= TOLERANCE, "off by %g at (position, id, logit, expected) %s" % worst)
        for chunk, output in zip(CHUNKS[1:], outputs[1:]):
            self.assertTrue(output == outputs[0], "chunks of %d give other bits" % chunk)
        return ids, outputs[0]

    def direct(self, name):
        path = os.path.join(DIRECT, name)
        ids, output = self.compare(path + ".safetensors", path)
        for isa in isas():
            again = ok([path + ".safetensors", 7] + ids, program=build("logits", "tests/logits.c"),
                       env={"RUN_ISA": isa})
            self.assertTrue(again == output, "%s gives other bits" % isa)

    def test_gemma2(self):
        """Soft caps, norms behind both branches, windows in some layers, gelu_tanh, scaled embeddings."""
        self.direct("gemma2")

    def test_granite(self):
        """Scales of embeddings, attention and logits; gelu."""
        self.direct("granite")


def add(name, source):
    method = "test_" + os.path.basename(source)
    setattr(Logits, method, lambda self: self.one(name, source))


for _name in sorted(os.listdir(MODELS)):
    add(_name, os.path.join(MODELS, _name))
    if os.path.exists(os.path.join(MODELS, _name, _name + ".gguf")):
        add(_name, os.path.join(MODELS, _name, _name + ".gguf"))


if __name__ == "__main__":
    unittest.main()
