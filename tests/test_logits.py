"""Logits of small random models of every architecture against torch's in float32 (make_models.py)."""
import json
import os
import struct
import unittest
import zlib

from common import FIXTURES, build, export, ok, scratch

MODELS = os.path.join(FIXTURES, "models")
TOLERANCE = 1e-4
CHUNKS = (0, 7, 1)  # 0: all in one


class Logits(unittest.TestCase):

    def one(self, name, source):
        folder = os.path.join(MODELS, name)
        with open(os.path.join(folder, "expected.json")) as f:
            expected = json.load(f)
        with open(os.path.join(folder, "expected.f32z"), "rb") as f:
            data = zlib.decompress(f.read())
        ids, positions = expected["ids"], expected["positions"]
        vocab = len(data) // 4 // len(positions)
        wanted = struct.unpack("<%df" % (len(data) // 4), data)
        self.assertEqual(len(wanted), vocab * len(positions))
        model = scratch("logits", os.path.basename(source) + ".bin")
        if os.path.exists(model):
            os.remove(model)
        export([source, "-o", model])
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


def add(name, source):
    method = "test_" + os.path.basename(source)
    setattr(Logits, method, lambda self: self.one(name, source))


for _name in sorted(os.listdir(MODELS)):
    add(_name, os.path.join(MODELS, _name))
    if os.path.exists(os.path.join(MODELS, _name, _name + ".gguf")):
        add(_name, os.path.join(MODELS, _name, _name + ".gguf"))


if __name__ == "__main__":
    unittest.main()
