"""The C++ of this package, compiled for the machine it runs on, and its structures as Python sees them.

It is compiled once on each node and kept in the model cache under a name made of sources, compiler and processor; a
process that comes later finds it there. The compiler is ``$CXX``, the system's, or the one in the package ``ziglang``,
which the extra ``serve`` installs, so that there always is one. Covered: Linux on x86-64 with
AVX-512; instructions for bfloat16 are used where they are.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster.errors import Unavailable

SOURCES = ("pool.h", "dot.h", "quant.h", "attention.h", "model.cpp")
MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=fast")
"""Sums may be taken in any order; what is not a number, or infinite, stays so."""
FLAGS = ("-O3", "-march=native", "-std=c++17", *MATH, "-shared", "-fPIC", "-pthread", "-w")
NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
"""Instructions without which transformers' modules are faster: Cascade Lake, Ice Lake, Zen 4 and later have them."""

log = logging.getLogger(__name__)
Pointer = ctypes.c_void_p
Int, Float = ctypes.c_int32, ctypes.c_float


class Side(ctypes.Structure):
    """One adapter in one linear layer."""

    _fields_ = [("a", Pointer), ("b", Pointer), ("rank", Int), ("unused", Int)]


class Linear(ctypes.Structure):
    """A linear layer: weights, packed or not, and the adapters on it."""

    _fields_ = [
        *[(name, Pointer) for name in ("w", "scales", "bias", "sides")],
        *[(name, Int) for name in ("inputs", "outputs", "kind", "unused")],
    ]


class View(ctypes.Structure):
    """Some neighbouring rows of a linear."""

    _fields_ = [("linear", Int), ("first", Int), ("rows", Int), ("unused", Int)]


class Layer(ctypes.Structure):
    """One block of the decoder."""

    _fields_ = [
        *[(name, View) for name in ("q", "k", "v", "o", "gate", "up", "down")],
        *[(name, Pointer) for name in ("norm_in", "norm_mid", "norm_out_attn", "norm_out_mlp", "norm_q", "norm_k")],
        *[(name, Pointer) for name in ("cosine", "sine", "keys", "values")],
        ("window", Int),
        ("unused", Int),
    ]


class Model(ctypes.Structure):
    """A decoder."""

    _fields_ = [
        *[(name, Pointer) for name in ("embedding", "norm", "layer", "linear")],
        ("head", View),
        *[(name, Int) for name in ("wide", "panels", "unused")],
        *[(name, Int) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "rotary", "inter", "context")],
        *[(name, Int) for name in ("page_tokens", "slots", "max_rank", "act")],
        *[(name, Float) for name in ("eps", "embedding_scale", "attention_scale", "attention_cap", "logit_cap")],
        *[(name, Float) for name in ("logit_scale", "residual_scale")],
    ]


class Batch(ctypes.Structure):
    """What one pass computes."""

    _fields_ = [
        *[(name, Int) for name in ("tokens", "parts", "wanted", "unused")],
        *[(name, Pointer) for name in ("ids", "positions", "part", "slot", "pages", "pages_at", "want", "logits")],
    ]


def load(cache: Path) -> Any:
    """The compiled library, made now unless `cache` has it.

    Raises:
        Unavailable: the processor lacks :data:`NEEDED`, there is no compiler, or it does not take the sources; the sentence says what to do.
    """
    if missing := NEEDED - set(_processor().split()):
        raise Unavailable(f"this processor has no {', '.join(sorted(missing))}")
    file = cache / "kernels" / f"fused-{_key()}.so"
    if not file.is_file():
        _compile(file)
    library = ctypes.CDLL(str(file))
    library.metier_sizes.restype = ctypes.c_size_t
    for index, structure in enumerate((Side, Linear, View, Layer, Model, Batch)):
        if library.metier_sizes(index) != ctypes.sizeof(structure):
            raise Unavailable(f"{file}: {structure.__name__} is laid out otherwise there; remove it")
    library.metier_open.restype = Pointer
    library.metier_open.argtypes = [ctypes.POINTER(Model), Int]
    library.metier_close.argtypes = [Pointer]
    library.metier_forward.argtypes = [Pointer, ctypes.POINTER(Batch)]
    return library


def compiler() -> list[str]:
    """The C++ compiler's command.

    Raises:
        Unavailable: there is none.
    """
    named = os.environ.get("CXX")
    for command in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    if not named and importlib.util.find_spec("ziglang"):
        return [
            sys.executable,
            "-m",
            "ziglang",
            "c++",
            "-nostdlib++",
        ]  # nothing here uses it, and it would be built first
    raise Unavailable(
        f"there is no C++ compiler ({named or 'c++, g++, clang++'}) to make the CPU kernels with; install one (pip install "
        "ziglang, or apt install g++), or set serving.generator.kernels=off"
    )


@functools.cache
def _key() -> str:
    """Changes with whatever changes the result: sources, flags, compiler, instructions of the processor."""
    parts = [(Path(__file__).parent / name).read_bytes() for name in SOURCES]
    version = subprocess.run([*compiler(), "--version"], capture_output=True, check=False).stdout
    for each in (version, " ".join(FLAGS).encode(), _processor().encode()):
        parts.append(each)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """Names of the instructions that the processor has, as Linux tells them; empty elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")


def _compile(file: Path) -> None:
    log.info("compiling the CPU kernels for this processor; this takes some seconds, once")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch, "fused.so")
        source = Path(__file__).with_name("model.cpp")
        # The compiler of `ziglang` keeps what it makes of its own libraries; the home directory need not be writable.
        kept = dict.fromkeys(("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR"), scratch)
        command = [*compiler(), *FLAGS, str(source), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | kept)
        if done.returncode:
            raise Unavailable(
                f"{compiler()[0]} could not make the CPU kernels: {done.stderr.strip()[:500]}; use another compiler "
                "(CXX=…), or set serving.generator.kernels=off"
            )
        made.replace(file)
