"""Instruction sets that this machine may lack: the kernels for AVX-512-VNNI and AVX-VNNI are compiled from a copy of run.c
in which their few intrinsics are plain C, and must give the fingerprints of the scalar kernels."""
import json
import os
import platform
import unittest

from common import BUILD, CC, MODELS, ROOT, ok, run, scratch

EMULATION = r"""
typedef int emulated_i16 __attribute__((vector_size(64)));
typedef float emulated_f16 __attribute__((vector_size(64)));
typedef int emulated_i8 __attribute__((vector_size(32)));
static inline __attribute__((always_inline)) __m512 emulated_fma(__m512 a, __m512 b, __m512 c)
{ for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]); return c; }
static inline __attribute__((always_inline)) emulated_f16 emulated_halves(const void *p)
{ emulated_f16 r; for (int i = 0; i < 16; i++) r[i] = from_half(load_u16((const unsigned char *)p + 2 * i)); return r; }
static inline __attribute__((always_inline)) emulated_f16 emulated_bf16(const void *p)
{ emulated_f16 r; for (int i = 0; i < 16; i++) r[i] = from_bf16(load_u16((const unsigned char *)p + 2 * i)); return r; }
#define EMULATED_DOT(type, n) \
static inline __attribute__((always_inline)) type emulated_dot##n(type s, type w, type x) \
{ const unsigned char *u = (const unsigned char *)&w; const signed char *v = (const signed char *)&x; \
  for (int i = 0; i < n; i++) for (int k = 0; k < 4; k++) s[i] += u[4 * i + k] * v[4 * i + k]; return s; }
EMULATED_DOT(emulated_i16, 16)
EMULATED_DOT(emulated_i8, 8)
#define _mm512_fmadd_ps emulated_fma
"""


def replaced(text, old, new):
    if text.count(old) != 1:
        raise AssertionError("run.c has %d times: %s" % (text.count(old), old))
    return text.replace(old, new)


@unittest.skipUnless(platform.machine() in ("x86_64", "AMD64"), "x86-64 only")
class Emulated(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        with open(os.path.join(ROOT, "run.c")) as f:
            text = f.read()
        text = replaced(text, '"avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"', '"avx2,fma,f16c"')
        text = replaced(text, '"avx2,fma,f16c,avxvnni"', '"avx2,fma,f16c"')
        text = replaced(text, "_mm512_cvtph_ps(_mm256_loadu_si256(at))", "emulated_halves(at)")
        text = replaced(text, "_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(at)), 16)", "emulated_bf16(at)")
        text = replaced(text, "_mm512_dpbusd_epi32((__m512i)(s), (__m512i)(w), (__m512i)(x))",
                        "emulated_dot16((emulated_i16)(s), (emulated_i16)(w), (emulated_i16)(x))")
        text = replaced(text, "_mm256_dpbusd_avx_epi32((__m256i)(s), (__m256i)(w), (__m256i)(x))",
                        "emulated_dot8((emulated_i8)(s), (emulated_i8)(w), (emulated_i8)(x))")
        text = replaced(text, "#ifdef __x86_64__\n\n#define RUN_KERNELS AVX2", EMULATION +
                        "#ifdef __x86_64__\n\n#define RUN_KERNELS AVX2")
        text = replaced(text, 'if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&\n'
                        '        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && '
                        '__builtin_cpu_supports("avx512vnni"))', "if (avx2)")
        text = replaced(text, "if (avx2 && has_avxvnni())", "if (avx2)")
        folder = os.path.dirname(scratch("emulated", "run.c"))
        for name, content in (("run.c", text), ("tokenizer.c", open(os.path.join(ROOT, "tokenizer.c")).read())):
            with open(os.path.join(folder, name), "w") as f:
                f.write(content)
        cls.program = os.path.join(BUILD, "test", "emulated", "run")
        ok(["-O1", "-std=gnu11", "-w", os.path.join(folder, "run.c"), "-o", cls.program, "-lm", "-lpthread"], program=CC)

    def fingerprint(self, model, isa):
        p = run([model, "-m", "info", "--json"], program=self.program, env={"RUN_ISA": isa})
        self.assertEqual(p.returncode, 0, p.stderr)
        info = json.loads(p.stdout.decode())
        self.assertEqual(info["isa"], isa)
        return info["fingerprint"]

    def test_every_type(self):
        source = os.path.join(MODELS, "stories260K.bin")
        for kind in ("f32", "f16", "bf16", "q4", "q4a", "q8"):
            model = scratch("emulated", kind + ".bin")
            ok([source, "-m", "quantize", "--type", kind, "-o", model])
            wanted = self.fingerprint(model, "scalar")
            for isa in ("avx512vnni", "avxvnni"):
                self.assertEqual(self.fingerprint(model, isa), wanted, (kind, isa))


if __name__ == "__main__":
    unittest.main()
