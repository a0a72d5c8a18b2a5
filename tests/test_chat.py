"""Chat formats: what export.py derives from a chat template renders as jinja2 renders the template."""
import json
import os
import random
import sys
import time
import unittest
import warnings

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CHAT = os.path.join(ROOT, "tests", "fixtures", "chat")
sys.path.insert(0, ROOT)
from export import ChatTemplate, Refused, chat_from_template, render_format  # noqa: E402

with open(os.path.join(CHAT, "expected.json"), encoding="ascii") as file:
    EXPECTED = json.load(file)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MUST = """smollm2 chatml qwen1.5 qwen2 qwen2.5 qwen3 llama2 llama2-trim llama3 llama3.2-dates mistral-v0.1
          mistral-v0.2 mistral-v0.2-system mistral-v3 mistral-v7 mistral-nemo gemma gemma2 gemma3 phi3
          phi3.5 phi4 zephyr deepseek-llm deepseek-r1-distill vicuna openchat yi1.5 olmo""".split()
CHATML = {"chat.user.before": "<|im_start|>user\n", "chat.user.after": "<|im_end|>\n",
          "chat.assistant.before": "<|im_start|>assistant\n", "chat.assistant.after": "<|im_end|>\n",
          "chat.generate": "<|im_start|>assistant\n", "chat.system.place": "start",
          "chat.system.before": "<|im_start|>system\n", "chat.system.after": "<|im_end|>\n",
          "chat.system.empty": "kept"}
SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
EXACT = {                       # some formats string by string
    "chatml": CHATML, "smollm2": dict(CHATML, **{"chat.system.default": SMOLLM2}),
    "qwen2.5": dict(CHATML, **{"chat.system.default":
                               "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."}),
    "qwen3": dict(CHATML, **{"chat.think.end": "</think>", "chat.think.trim": "newlines"}),
    "mistral-v0.1": {"chat.begin": "<s>", "chat.user.before": "[INST] ", "chat.user.after": " [/INST]",
                     "chat.assistant.after": "</s> "},
    "mistral-v3": {"chat.begin": "<s>", "chat.user.before": "[INST] ", "chat.user.after": "[/INST]",
                   "chat.assistant.before": " ", "chat.assistant.after": "</s>", "chat.trim": "assistant",
                   "chat.system.place": "last", "chat.system.after": "\n\n", "chat.system.empty": "kept"},
    "llama2": {"chat.user.before": "<s>[INST] ", "chat.user.after": " [/INST]", "chat.assistant.before": " ",
               "chat.assistant.after": " </s>", "chat.system.place": "first",
               "chat.system.before": "<<SYS>>\n", "chat.system.after": "\n<</SYS>>\n\n",
               "chat.system.empty": "kept", "chat.trim": "turn assistant"},
    "llama3": {"chat.begin": "<|begin_of_text|>", "chat.trim": "user system assistant",
               "chat.user.before": "<|start_header_id|>user<|end_header_id|>\n\n",
               "chat.user.after": "<|eot_id|>", "chat.assistant.after": "<|eot_id|>",
               "chat.assistant.before": "<|start_header_id|>assistant<|end_header_id|>\n\n",
               "chat.generate": "<|start_header_id|>assistant<|end_header_id|>\n\n",
               "chat.system.place": "start", "chat.system.after": "<|eot_id|>", "chat.system.empty": "kept",
               "chat.system.before": "<|start_header_id|>system<|end_header_id|>\n\n"},
    "zephyr": {"chat.user.before": "<|user|>\n", "chat.user.after": "</s>\n",
               "chat.assistant.before": "<|assistant|>\n", "chat.assistant.after": "</s>\n",
               "chat.generate": "<|assistant|>\n", "chat.system.place": "start",
               "chat.system.before": "<|system|>\n", "chat.system.after": "</s>\n",
               "chat.system.empty": "kept"},
    "gemma2": {"chat.begin": "<bos>", "chat.trim": "user assistant",
               "chat.generate": "<start_of_turn>model\n",
               "chat.user.before": "<start_of_turn>user\n", "chat.user.after": "<end_of_turn>\n",
               "chat.assistant.before": "<start_of_turn>model\n", "chat.assistant.after": "<end_of_turn>\n"}}
REFUSED = {                     # and what the sentence must name
    "refused-vigogne": "<<SYS>>", "refused-seed-oss": "can only give", "refused-qwq": "can only give",
    "refused-smollm3": "can only give", "refused-granite3.3": "'strftime_now'",
    "refused-mistral-small": "'strftime_now'", "refused-smolvlm": "every text once",
    "refused-pivot-moe": "every text once", "refused-hermes2-tools": "not iterable",
    "refused-firefunction": "statement 'filter'"}
LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>"
# Each differs from fixed strings in one respect only.
SUBTLE = [
    LOOP.replace("{{ m.content", "{% if loop.index == 9 %}!{% endif %}{{ m.content"),
    LOOP.replace("{{ m.content }}", "{{ m.content|replace('<<', '<') }}"),
    LOOP.replace("{{ m.content }}", "{{ m.content if 'zebra' not in m.content else 'x' }}"),
    LOOP.replace("{{ m.content }}", "{{ m.content.rstrip() }}"),
    LOOP.replace("{{ m.content }}", "{{ m.content.lstrip('\n') }}"),
    LOOP.replace("{{ m.content }}", "{{ m.content|capitalize }}"),
    LOOP.replace("{{ m.content }}", "{{ m.content.split('</think>')[0] }}"),
    LOOP.replace("{{ m.content }}", "{% if m.content|trim|length %}{{ m.content }}{% else %}-{% endif %}"),
    LOOP + "{{ messages|length }}", LOOP + "{% if messages|length > 8 %}.{% endif %}",
    LOOP.replace("<assistant>", "{{ messages[0].content[:1] }}"),
    LOOP.replace("<{{", "{% if loop.index == 2 and messages[0].role == 'user' %}?{% endif %}<{{"),
    "{% if messages[0].role == 'system' and messages|length > 4 %}{{ raise_exception('no') }}{% endif %}"
    + LOOP,
    "{% for m in messages %}{% if m.role != 'system' or messages|length == 4 %}<{{ m.role }}>"
    "{{ m.content }}</s>"
    "{% endif %}{% endfor %}<assistant>"]
GROW = "{% set ns = namespace(s='a') %}{% for i in range(17) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
HOSTILE = [
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{% for i in range(99999999999999999999999) %}x{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) %}{% set x = i %}{% endfor %}{% endfor %}",
    "{{ 'a' * 999999999 }}", "{{ [1] * 999999999 }}", "{{ 999999999 * 'a' }}", "{{ 9 ** 9 ** 9 }}",
    "{{ '%999999999d' % 1 }}", GROW.replace("17", "999") + "{{ ns.s }}",
    GROW + "{% for i in range(99999) %}{{ 'aab' in ns.s }}{% endfor %}",
    GROW + "{{ ns.s.replace('a', ns.s) }}", GROW + "{{ ns.s|replace('', ns.s) }}",
    GROW + "{{ range(99999)|join(ns.s) }}",
    GROW + "{% for i in range(99999) %}{% set q = ns.s.split('a') %}{% endfor %}",
    GROW + "{{ ns.s|indent(ns.s) }}",
    GROW + "{% for i in range(99999) %}{% set q = ns.s|upper|lower|trim|title %}{% endfor %}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"
    "{{ ns.l }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = ns.l + ns.l %}{% endfor %}"
    "{{ ns.l|tojson }}",
    "{% set ns = namespace(n=9) %}{% for i in range(9999) %}{% set ns.n = ns.n * ns.n %}{% endfor %}"
    "{{ ns.n }}",
    "{{ '{0:999999999}'.format(1) }}", "{{ 'a'.center(999999999) }}", "{{ 'a'.zfill(999999999) }}",
    "{{ messages|tojson(indent=999999999) }}", "{{ 'a\nb'|indent(999999999) }}", "{{ messages.append(1) }}",
    "{{ messages.__class__ }}", "{{ ''['__class__'].__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}", "{{ [1]|map(attribute='__class__')|list }}",
    "{{ raise_exception.__globals__ }}", "{{ raise_exception.call.__func__ }}", "{{ namespace.__init__ }}",
    "{{ self }}", "{{ raise_exception }}", "{% include 'x' %}", "{% import 'os' as os %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "{{ " + "[" * 9000 + "]" * 9000 + " }}",
    "{{ " + "1+" * 15000 + "1 }}", "{{ " + "not " * 8000 + "1 }}", "{{ 'a'" + "|trim" * 6000 + " }}",
    "{{ a" + ".b" * 15000 + " }}", "{% if 1 %}" * 3000, "{% if 1 %}" * 1500 + "{% endif %}" * 1500,
    "{{ 1" + " if 1 else 1" * 2500 + " }}", "{#" * 15000, "{{" * 15000, "{%" * 15000,
    "{{ '" + "\\'" * 15000, "{{ x " + " " * 30000, "x" * 99999, "", "text", "{{ '\\ud800' }}", "\ud800",
    "\0", "{% if %}", "{% endif %}", "{% for %}{% endfor %}", "{% if 1 %}", "{% for x in messages %}",
    "{{ 'open", "{{ x", "{% set", "{# open", "{{ }}", "{{ 1 2 }}", "{{ {[1]: 2} }}", "{{ 'a'.split('') }}",
    "{{ 'a'.replace() }}", "{{ 'a'[::0] }}", "{{ 1 // 0 }}", "{% for a, b in [[1, 2, 3]] %}{% endfor %}",
    "{% set x.y = 1 %}", "{% macro m(a) %}{% endmacro %}{{ m(1, 2) }}"]


def template(name):
    with open(os.path.join(CHAT, name + ".jinja"), encoding="utf-8", newline="") as source:
        return source.read()


def derived(name):
    return chat_from_template(template(name), EXPECTED["templates"][name]["special"])


class Formats(unittest.TestCase):
    def test_every_template_is_equal_or_refused(self):
        self.assertGreater(len(EXPECTED["templates"]), 50)
        for name, known in EXPECTED["templates"].items():
            if name.startswith("refused-"):
                with self.assertRaises(Refused, msg=name) as raised:
                    derived(name)
                self.assertIn(REFUSED[name], str(raised.exception), name)
                continue
            chat = derived(name)
            self.assertTrue(all(key.startswith("chat.") and isinstance(chat[key], str) for key in chat), name)
            for messages, text in zip(EXPECTED["conversations"], known["rendered"]):
                if text is None:        # the template takes no system prompt: the format has no place for it
                    self.assertEqual(messages[0]["role"], "system", name)
                    self.assertNotIn("chat.system.place", chat, name)
                elif messages[0] == {"role": "system", "content": ""}:
                    kept = dict(chat, **{"chat.system.empty": "kept"})
                    self.assertTrue(render_format(chat, messages) == text or "chat.system.place" not in chat
                                    or render_format(kept, messages) != text, name)
                elif "chat.system.place" in chat or messages[0]["role"] != "system":
                    self.assertEqual(render_format(chat, messages), text, name)

    def test_the_usual_formats_are_supported(self):
        for name in MUST:
            self.assertIn("chat.user.before", derived(name), name)
        for name in ("smollm2", "llama2", "llama3", "mistral-v3", "gemma3", "phi3.5", "zephyr", "qwen3"):
            self.assertIn("chat.system.place", derived(name), name)

    def test_some_formats_string_by_string(self):
        for name, chat in EXACT.items():
            self.assertEqual(derived(name), chat, name)
        for special in ({}, {"bos_token": "<|endoftext|>"}, {"bos_token": "<|im_start|>", "eos_token": "x"}):
            self.assertEqual(chat_from_template(template("smollm2"), special), EXACT["smollm2"])

    def test_a_small_difference_is_enough_to_refuse(self):
        self.assertEqual(chat_from_template(LOOP, SPECIAL)["chat.user.before"], "<user>")
        for text in SUBTLE:
            self.assertNotEqual(text, LOOP)
            with self.assertRaises(Refused, msg=text):
                chat_from_template(text, SPECIAL)

    def test_the_system_prompt_needs_a_place(self):
        never = "{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}<{{"
        without = LOOP.replace("<{{", never)
        dropped = LOOP.replace("in messages", "in messages if m.role != 'system'")
        for text in (without, dropped):
            self.assertNotIn("chat.system.place", chat_from_template(text, SPECIAL))


class Language(unittest.TestCase):
    def test_snippets(self):
        messages = [{"role": role, "content": text} for role, text in
                    (("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"))]
        for text, expected in EXPECTED["snippets"]:
            if expected is None:
                with self.assertRaises(Refused, msg=text):
                    ChatTemplate(text).render(messages, {"bos_token": "<s>"})
            else:
                self.assertEqual(ChatTemplate(text).render(messages, {"bos_token": "<s>"}), expected, text)

    def test_templates_render_as_with_jinja2(self):
        for name, known in EXPECTED["templates"].items():
            if name == "refused-firefunction":
                continue
            program = ChatTemplate(template(name))
            cases = [(m, t, True) for m, t in zip(EXPECTED["conversations"], known["rendered"])]
            for messages, text, generate in cases + [(EXPECTED["conversations"][3], known["open"], False)]:
                try:
                    have = program.render(messages, known["special"], generate)
                except Refused:
                    have = None
                self.assertEqual(have, text, name)


class Hostile(unittest.TestCase):
    def setUp(self):
        warnings.simplefilter("ignore")             # of unknown escapes in strings

    def refused(self, text):
        """True if it is refused; any other exception fails the test."""
        start = time.process_time()
        try:
            chat_from_template(text, SPECIAL)
            return False
        except Refused as error:
            self.assertTrue(str(error))
            return True
        finally:
            self.assertLess(time.process_time() - start, 3, text[:200])

    def test_hostile(self):
        for text in HOSTILE:
            self.assertTrue(self.refused(text), text[:100])
            self.refused(LOOP + text)

    def test_every_limit_is_its_own(self):
        for text, reason in (
                (GROW + "{{ ns.s }}" * 3, "writes too much"),
                (GROW + "{{ ns.s.replace('a', 'aaa') }}", "too large"),
                ("{% for i in range(9000) %}" + "{% set x = i ~ i %}" * 9 + "{% endfor %}", "takes too long"),
                ("{{ messages.__len__() }}", "method '__len__'"), ("{{ [[1]] }}", "writes a list"),
                ("{{ 'a'.center(9) }}", "method 'center'"), ("{{ 'a'|title }}", "filter 'title'"),
                ("{{ 1 is odd }}", "test 'odd'"), ("{{ 2 * 3 }}", "operator Mult"),
                ("{{ [x for x in messages] }}", "ListComp"), ("{{ lambda: 1 }}", "Lambda"),
                ("{{ [1] == [1] }}", "compares a list"), ("{{ raise_exception('why') }}", "says: why")):
            with self.assertRaises(Refused, msg=text) as raised:
                ChatTemplate(text).render(EXPECTED["conversations"][3], SPECIAL)
            self.assertIn(reason, str(raised.exception))

    def test_mutations(self):
        names, dice, refusals = sorted(EXPECTED["templates"]), random.Random(7), 0
        words = """{{ }} {% %} {# - ' " ( ) [ ] | . = + * , \\ \u00e9 0 999999999 if else endif for in not
                   endfor set is messages loop""".split() + [" ", "\n"]
        for count in range(3000):
            text = template(names[count % len(names)])
            for _ in range(dice.choice((1, 1, 2, 5))):
                at = dice.randrange(len(text) + 1)
                upto = at + dice.choice((0, 0, 1, 1, 3, 40))
                text = text[:at] + dice.choice(words + ["", text[at:at + 30] * 2]) + text[upto:]
            if count % 30:
                try:
                    ChatTemplate(text).render(EXPECTED["conversations"][3], SPECIAL)
                except Refused:
                    refusals += 1
            else:
                refusals += self.refused(text)
        self.assertGreater(refusals, 300)


if __name__ == "__main__":
    unittest.main()
