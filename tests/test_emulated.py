"""Instruction sets that this machine may lack: the kernels for AVX-512-VNNI and AVX-VNNI are compiled from a
copy of run.c in which their few intrinsics are plain C, and must give the fingerprints of the scalar ones."""
import json
import os
import platform
import shutil
import unittest

from common import CC, ROOT, STORIES, ok, scratch
from engine import isas

# Inside of a target: clang passes vectors only between functions that both have their registers.
EMULATION = r"""
TARGET_BEGIN("avx2,fma,f16c")
typedef int emulated_i16 __attribute__((vector_size(64)));
typedef int emulated_i8 __attribute__((vector_size(32)));
typedef float emulated_f16 __attribute__((vector_size(64)));
static int emulated_mistake;

__attribute__((constructor)) static void emulated_start(void)
{
    emulated_mistake = getenv("EMULATED_MISTAKE") ? atoi(getenv("EMULATED_MISTAKE")) : 0;
}

INLINE __m512 emulated_fma(__m512 a, __m512 b, __m512 c)
{
    for (int i = 0; i < 16; i++)
        c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}

#define EMULATED_LOAD(name, convert)                                    \
    INLINE emulated_f16 name(const void *at)                            \
    {                                                                   \
        emulated_f16 out;                                               \
        for (int i = 0; i < 16; i++)                                    \
            out[i] = convert(load_u16((const unsigned char *)at + 2 * i)); \
        return out;                                                     \
    }
EMULATED_LOAD(emulated_halves, from_half)
EMULATED_LOAD(emulated_bf16, from_bf16)

/* The mistake is in one product of one lane. */
#define EMULATED_DOT(lanes)                                             \
    INLINE emulated_i##lanes emulated_dot##lanes(emulated_i##lanes s, emulated_i##lanes w, \
                                                 emulated_i##lanes x)   \
    {                                                                   \
        const unsigned char *u = (const unsigned char *)&w;             \
        const signed char *v = (const signed char *)&x;                 \
        for (int i = 0; i < 4 * lanes; i++)                             \
            s[i / 4] += u[i] * v[i] + (emulated_mistake == lanes && i == 13); \
        return s;                                                       \
    }
EMULATED_DOT(16)
EMULATED_DOT(8)
#define _mm512_fmadd_ps emulated_fma
TARGET_END

"""

KINDS = ("f32", "f16", "bf16", "q4", "q4a", "q6", "q8")

# What stands in run.c exactly once, and what becomes of it.
CHANGES = [
    ('#define VECTOR_REGISTER "v"', '#define VECTOR_REGISTER "m"'),
    ('"avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"', '"avx2,fma,f16c"'),
    ('"avx2,fma,f16c,avxvnni"', '"avx2,fma,f16c"'),
    ("_mm512_cvtph_ps(_mm256_loadu_si256(at))", "emulated_halves(at)"),
    ("_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(at)), 16)", "emulated_bf16(at)"),
    ("_mm512_dpbusd_epi32((__m512i)(s), (__m512i)(w), (__m512i)(x))",
     "emulated_dot16((emulated_i16)(s), (emulated_i16)(w), (emulated_i16)(x))"),
    ("_mm256_dpbusd_avx_epi32((__m256i)(s), (__m256i)(w), (__m256i)(x))",
     "emulated_dot8((emulated_i8)(s), (emulated_i8)(w), (emulated_i8)(x))"),
    ("#ifdef __x86_64__\n\n#define RUN_KERNELS AVX2",
     EMULATION + "#ifdef __x86_64__\n\n#define RUN_KERNELS AVX2"),
    ('if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&\n'
     '        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && '
     '__builtin_cpu_supports("avx512vnni"))', "if (avx2)"),
    ("if (avx2 && has_avxvnni())", "if (avx2)"),
]


def emulating_source():
    with open(os.path.join(ROOT, "run.c")) as f:
        text = f.read()
    for there, instead in CHANGES:
        if text.count(there) != 1:
            raise AssertionError("this stands %d times, not once, in run.c:\n%s" % (text.count(there), there))
        text = text.replace(there, instead)
    path = scratch("emulated", "run.c")
    with open(path, "w") as f:
        f.write(text)
    shutil.copy(os.path.join(ROOT, "tokenizer.c"), os.path.dirname(path))
    return path


@unittest.skipUnless(platform.machine() in ("x86_64", "AMD64"), "x86-64 only")
class Emulated(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        if "avx2" not in isas():
            raise unittest.SkipTest("this machine has no AVX2")
        cls.program = scratch("emulated", "run")
        ok(["-O0", "-std=gnu11", "-w", emulating_source(), "-o", cls.program, "-lm", "-lpthread"], program=CC)
        for kind in KINDS:
            ok([STORIES, "-m", "quantize", "--type", kind, "-o", scratch("emulated", kind + ".bin")])
        cls.right = {kind: cls.fingerprint(kind, "scalar") for kind in KINDS}

    @classmethod
    def fingerprint(cls, kind, isa, mistake=0):
        info = json.loads(ok([scratch("emulated", kind + ".bin"), "-m", "info", "--json"], program=cls.program,
                             env={"RUN_ISA": isa, "EMULATED_MISTAKE": mistake}).decode())
        assert info["isa"] == isa, info["isa"]
        return info["fingerprint"]

    def test_every_type(self):
        for kind in KINDS:
            for isa in ("avx512vnni", "avxvnni"):
                self.assertEqual(self.fingerprint(kind, isa), self.right[kind], (kind, isa))

    def test_a_wrong_product_is_noticed(self):
        for kind in ("q4", "q4a", "q6", "q8"):
            for isa, lanes in (("avx512vnni", 16), ("avxvnni", 8)):
                self.assertNotEqual(self.fingerprint(kind, isa, lanes), self.right[kind], (kind, isa))


if __name__ == "__main__":
    unittest.main()
