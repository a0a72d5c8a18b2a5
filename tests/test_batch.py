"""Many texts in one pass: each as if it ran alone; files of prompts in shards and after interruptions."""
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import time
import unittest

from common import RUN, STORIES, Safetensors, fresh_folder, ok, run, write_safetensors
from engine import quantized, small_model

WORDS = "Once upon a time there was little girl Lily who loved to play in the park and her friend Tom".split()


def lines(data):
    return [json.loads(line) for line in data.decode().splitlines()]


def without_stats(results):
    return [{key: value for key, value in r.items() if key != "stats"} for r in results]


class Batch(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        dice = random.Random(5)
        cls.folder = fresh_folder("batch")
        cls.file = os.path.join(cls.folder, "prompts.jsonl")
        cls.requests = [{"id": i, "prompt": " ".join(dice.choices(WORDS, k=dice.randint(1, 90))), "chat": False,
                         "more": {"a": [1, -2.5e3, None, True, "\u00e9\U0001f600\"\\\n"], "b": {}, "c": []}} for i in range(37)]
        cls.requests[3]["prompt"], cls.requests[4]["prompt"] = "", "caf\u00e9 \U0001f600\t\"x\"\n"
        with open(cls.file, "w") as f:
            for i, r in enumerate(cls.requests):
                f.write(json.dumps(r, ensure_ascii=i % 2 == 0) + ("\n" if i % 5 else "\n  \n"))
        cls.options = [STORIES, "-f", cls.file, "--json", "-n", "40", "-t", "0.9", "-s", "7", "--stop", "park"]
        cls.results = lines(ok(cls.options))

    def test_each_as_if_alone(self):
        self.assertEqual(len(self.results), len(self.requests))
        for request, result in zip(self.requests, self.results):
            self.assertEqual({key: result[key] for key in request}, request)
            alone = json.loads(ok([STORIES, "-i", request["prompt"], "--json", "-n", "40", "-t", "0.9", "-s", "7",
                                   "--stop", "park", "--draft", "off"]).decode())
            for key in ("prompt_ids", "ids", "text", "stop"):
                self.assertEqual(result[key], alone[key], (key, request["prompt"]))

    def test_settings_and_threads_change_nothing(self):
        for more in (["-j", "2"], ["--draft", "off"], ["--draft", "lookup"]):
            self.assertEqual(without_stats(lines(ok(self.options + more))), without_stats(self.results))

    def test_texts_share_passes(self):
        p = run(self.options)
        said = p.stderr.decode().split()
        tokens, passes = int(said[said.index("tokens") - 1]), int(said[said.index("passes,") - 1])
        self.assertEqual(tokens, sum(len(r["ids"]) for r in self.results))
        self.assertLess(passes, tokens / 8)

    def test_shards(self):
        parts = [lines(ok(self.options + ["--shard", "%d/3" % i])) for i in (1, 2, 3)]
        found = sorted(sum(parts, []), key=lambda r: r["id"])
        self.assertEqual(without_stats(found), without_stats(self.results))
        self.assertGreater(min(map(len, parts)), 5)

    def test_shards_with_gnu_parallel(self):
        parallel = shutil.which("parallel")
        if not parallel or b"GNU" not in subprocess.run([parallel, "--version"], stdout=subprocess.PIPE,
                                                        stderr=subprocess.STDOUT).stdout:
            self.skipTest("no GNU parallel")
        out = os.path.join(self.folder, "part-{}.jsonl")
        subprocess.run([parallel, "-j", "2", RUN, *self.options, "-j", "1", "--shard", "{}/3", "-o", out, ":::", "1", "2", "3"],
                       check=True, stderr=subprocess.DEVNULL)
        found = []
        for i in "123":
            with open(out.replace("{}", i), "rb") as f:
                found += lines(f.read())
        self.assertEqual(without_stats(sorted(found, key=lambda r: r["id"])), without_stats(self.results))

    def test_goes_on_after_an_interruption(self):
        path = os.path.join(self.folder, "out.jsonl")
        ok(self.options + ["-o", path])
        with open(path, "rb") as f:
            whole = f.read()
        self.assertEqual(without_stats(lines(whole)), without_stats(self.results))
        for cut in (0, 10, len(whole) // 3, len(whole) - 1, len(whole)):
            with open(path, "wb") as f:
                f.write(whole[:cut])
            kept = whole[:cut].rfind(b"\n") + 1
            ok(self.options + ["-o", path])
            with open(path, "rb") as f:
                now = f.read()
            self.assertEqual(now[:kept], whole[:kept])
            self.assertEqual(without_stats(lines(now)), without_stats(self.results))
        first = whole.index(b"\n") + 1
        for other in (b"something else\n", b"my notes", whole.replace(b'"id": 0', b'"id": 9'), whole + b"{}\n", whole + b"{",
                      whole[:first - 30] + b"\n" + whole[first:]):
            with open(path, "wb") as f:
                f.write(other)
            p = run(self.options + ["-o", path])
            self.assertEqual(p.returncode, 1)
            self.assertIn(b"remove it or name another file", p.stderr)
            with open(path, "rb") as f:
                self.assertEqual(f.read(), other)

    def test_lines_that_are_wrong(self):
        path = os.path.join(self.folder, "wrong.jsonl")
        for line in ("x", "{}", "[]", '{"prompt":1}', '{"prompt":"a","chat":1}', '{"prompt":"a"', '{"prompt":"a"} x', '{"prompt":"a",}',
                     '{"prompt":"a","b":}', '{"prompt":"a","b":[1,}', '{"prompt":"\\ud800"}', '{"prompt":"a","b":' + "[" * 200 + "]" * 200 + "}",
                     '{"prompt":"a","b":tru}', "{'prompt':'a'}", '{"prompt":"a","b":1.2.3}', '{"prompt":"a","b":+1}', '{"prompt":"a","b":01}',
                     '{"prompt":"a","b":1e}', '{"prompt":"\\u0000"}', '{"prompt":"a","text":1}', '{"prompt":"a","error":"e"}',
                     '{"prompt":"a","b":"\udcff"}', '{"a\udcfe":1,"prompt":"a"}'):
            with open(path, "w", errors="surrogateescape") as f:
                f.write('{"prompt":"Once"}\n' + line + "\n")
            p = run([STORIES, "-f", path, "--json", "-n", "2"])
            self.assertEqual((p.returncode, p.stdout), (1, b""), line)
            self.assertIn(b"line 2 ", p.stderr, line)

    def test_prompts_that_fail_do_not_stop_the_others(self):
        path = os.path.join(self.folder, "long.jsonl")
        with open(path, "w") as f:
            for r in ({"prompt": "Once", "chat": True}, {"prompt": "Lily " * 300}, {"prompt": "Once"}):
                f.write(json.dumps(r) + "\n")
        p = run([STORIES, "-f", path, "--json", "-n", "5", "-c", "100"])
        self.assertEqual(p.returncode, 1)
        found = lines(p.stdout)
        self.assertEqual([("error" in r, "text" in r) for r in found], [(True, False), (True, False), (False, True)])
        self.assertIn("chat format", found[0]["error"])

    def test_numbers_and_a_byte_order_mark(self):
        path = os.path.join(self.folder, "numbers.jsonl")
        with open(path, "wb") as f:
            f.write(b'\xef\xbb\xbf{"prompt":"Once","n":[0,-1,2.5,-0.1e+9,1E5,true,false,null,{}],"k":"\xc3\xa9"}')
        found = lines(ok([STORIES, "-f", path, "--json", "-n", "3"]))
        self.assertEqual((found[0]["n"], found[0]["k"]), ([0, -1, 2.5, -0.1e9, 1e5, True, False, None, {}], "\u00e9"))

    def test_an_interrupt_leaves_no_cut_answer(self):
        """While prompts are read and while answers are drawn: every line written is what it is without."""
        path, out = os.path.join(self.folder, "slow.jsonl"), os.path.join(self.folder, "slow-out.jsonl")
        with open(path, "w") as f:
            for i in range(40):
                f.write(json.dumps({"prompt": "Lily and Tom " * 60, "id": i}) + "\n")
        command = [RUN, STORIES, "-f", path, "--json", "-n", "40", "-t", "0", "-j", "1", "-o", out]
        ok(command[1:])
        with open(out, "rb") as f:
            whole = without_stats(lines(f.read()))
        stopped = 0
        for wait in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3):
            os.remove(out)
            p = subprocess.Popen(command, stderr=subprocess.PIPE)
            time.sleep(wait)
            p.send_signal(signal.SIGINT)
            p.communicate()
            self.assertIn(p.returncode, (0, 1, -signal.SIGINT))
            stopped += p.returncode == 1
            if os.path.exists(out):
                with open(out, "rb") as f:
                    self.assertEqual(without_stats(lines(f.read())), whole[:len(lines(open(out, "rb").read()))])
            ok(command[1:])
            with open(out, "rb") as f:
                self.assertEqual(without_stats(lines(f.read())), whole)
        self.assertGreater(stopped, 0)

    def test_lines_that_are_no_prompts(self):
        """The file is refused before anything is computed; the sentence names the line."""
        path, good = os.path.join(self.folder, "bad.jsonl"), b'{"prompt":"Once"}\n'
        for line, words in ((b'{"prompt":"\xff"}', b"line 2 is not valid UTF-8"), (b'{"prompt":"a\\u0000b"}', b"line 2 is not an object like"),
                            (b'{"prompt":1}', b"line 2 is not an object like"), (b'["a"]', b"line 2 is not an object like"),
                            (b'{"prompt":"a","ids":[]}', b'line 2 has a member "ids"')):
            with open(path, "wb") as f:
                f.write(good + line + b"\n" + good)
            p = run([STORIES, "-f", path, "--json", "-n", "5"])
            self.assertEqual((p.returncode, p.stdout), (1, b""), line)
            self.assertIn(words, p.stderr)

    def test_results_into_a_pipe(self):
        p = subprocess.run([RUN, *self.options, "-o", "/dev/stdout"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        self.assertEqual(without_stats(lines(p.stdout)), without_stats(self.results))

    def test_failures_count_when_they_are_kept(self):
        path, out = os.path.join(self.folder, "fail.jsonl"), os.path.join(self.folder, "fail-out.jsonl")
        with open(path, "w") as f:
            f.write(json.dumps({"prompt": "Lily " * 300}) + "\n" + json.dumps({"prompt": "Once"}) + "\n")
        for said in (b"; 1 of the 2 failed", b"2 results of an earlier run kept"):
            p = run([STORIES, "-f", path, "--json", "-n", "5", "-c", "100", "-o", out])
            self.assertEqual(p.returncode, 1)
            self.assertIn(said, p.stderr)

    def test_a_text_that_overflows_fails_alone(self):
        """A token whose embedding is no number: the one text that draws it fails, in a prompt or behind it."""
        model = Safetensors(STORIES)
        dtype, shape, data = model.tensors["token_embd.weight"]
        width, path, damaged = shape[1], os.path.join(self.folder, "mixed.jsonl"), os.path.join(self.folder, "damaged.bin")
        with open(path, "w") as f:
            for text in ("Once", "Tom", "The sun", "Lily and"):
                f.write(json.dumps({"prompt": text}) + "\n")
        args = ["-f", path, "--json", "-t", "0", "-n", "30"]
        whole = lines(ok([STORIES] + args))
        others = set(sum((r["ids"] + r["prompt_ids"] for r in whole[:2] + whole[3:]), []))
        token = next(i for i in whole[2]["ids"][2:-1] if i not in others)
        rows = bytearray(data)
        rows[token * width * 4:(token + 1) * width * 4] = struct.pack("<f", float("nan")) * width
        tensors = {**model.tensors, "output.weight": (dtype, shape, data), "token_embd.weight": (dtype, shape, bytes(rows))}
        write_safetensors(damaged, {k: v for k, v in model.metadata.items() if not k.startswith("crc32.")}, tensors)
        p = run([damaged] + args)
        found = lines(p.stdout)
        self.assertEqual(p.returncode, 1)
        self.assertIn("not finite", found[2]["error"])
        self.assertEqual(without_stats(found[:2] + found[3:]), without_stats(whole[:2] + whole[3:]))

    def test_an_empty_file(self):
        path = os.path.join(self.folder, "empty.jsonl")
        open(path, "w").close()
        self.assertEqual(ok([STORIES, "-f", path, "--json"]), b"")


class Samples(unittest.TestCase):

    def test_each_is_another_stream(self):
        for model in (STORIES, small_model("mistral"), quantized(small_model("qwen2_window"), "q8")):
            args = [model, "-i", "Once upon" if model == STORIES else "1 2 3 4 5", "-n", "30", "-t", "1", "-s", "3", "--json"]
            few, many = lines(ok(args + ["--samples", "3"])), lines(ok(args + ["--samples", "21", "-j", "2"]))
            self.assertEqual(len(many), 21)
            self.assertEqual(without_stats(many[:3]), without_stats(few))
            self.assertEqual([r["sample"] for r in many], list(range(21)))
            self.assertGreater(len({tuple(r["ids"]) for r in many}), 10)
            alone = json.loads(ok(args).decode())
            for key in ("prompt_ids", "ids", "text", "stop"):
                self.assertEqual(many[0][key], alone[key], key)

    def test_text(self):
        args = [STORIES, "-i", "Once", "-n", "10", "-s", "1", "--samples", "2"]
        texts = [r["text"] for r in lines(ok(args + ["--json"]))]
        self.assertEqual(ok(args).decode(), "--- 1\n%s\n--- 2\n%s\n" % tuple(texts))
