"""Greedy text of the model in the box against the text that llama2.c produces for the same weights."""
import json
import os
import unittest

from common import FIXTURES, STORIES, ok

with open(os.path.join(FIXTURES, "stories260K.json")) as _f:
    CASES = json.load(_f)


class Text(unittest.TestCase):

    def output(self, case, *more):
        return ok([STORIES, "-m", "generate", "-t", "0", "-n", case["tokens"], "-i", case["prompt"]] +
                  list(more)).decode("utf-8")

    def generate(self, case, *more):
        text = self.output(case, *more)
        return text[:-1] if text.endswith("\n") and not case["text"].endswith("\n") else text

    def check(self, *more):
        for case in CASES:
            self.assertEqual(self.generate(case, *more), case["text"])

    def test_float32_cache(self):
        self.check("--kv", "f32")

    def test_default_cache(self):
        self.check()

    def test_ids_of_the_prompt(self):
        for case in CASES:
            out = json.loads(self.output(case, "--json"))
            self.assertEqual(out["prompt_ids"], case["prompt_ids"])
            self.assertEqual(len(out["ids"]), case["tokens"])
            self.assertEqual(out["stop"], "length")
            # a text that follows nothing but BOS loses its leading space, as SentencePiece decodes it
            text = case["text"][len(case["prompt"]):]
            self.assertEqual(out["text"].lstrip(" ") if not case["prompt"] else out["text"], text)


if __name__ == "__main__":
    unittest.main()
