"""Tests are tested: each defect planted in the portable CPU kernels breaks the error budget on cases of cases.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from lcattn import cases
from lcattn.cases import Shape
from tests.conftest import SEED

ROOT = Path(__file__).resolve().parent.parent
# what `make` built: how each object is compiled, and the objects of all that stays undamaged
BUILT = ROOT / "build" / "native" / str(sysconfig.get_config_var("SOABI"))

SQUARE = Shape(1, 4, 2, 200, 200, 32)
MORE_KEYS = Shape(2, 3, 1, 65, 190, 20)
# heads that share keys, and more of these than are kept at hand
GROUPED = Shape(3, 6, 3, 70, 530, 128)
# one sequence, which two threads share in the backward
SHARED = Shape(1, 1, 1, 193, 257, 80)
# so many key blocks that two threads share a row of them
CUT = Shape(1, 1, 1, 70, 2200, 16)
DECODE = Shape(1, 6, 2, 1, 150, 33)
DECODE_CUT = Shape(1, 2, 1, 1, 700, 40)


@dataclass(frozen=True)
class Defect:
    """Text that stands once in csrc/cpu, replaced while one unit is compiled, and the class of case to show it."""

    name: str
    unit: str
    text: str
    replacement: str
    # layout-position-variant
    case: str
    shape: Shape


DEFECTS = (
    Defect(
        "sign of the offset in the bias",
        "forward",
        "base = k_.first - q_.first;",
        "base = q_.first - k_.first;",
        "causal-shared_bias-plain",
        SQUARE,
    ),
    Defect(
        "offsets below the table take its second entry",
        "forward",
        "clamp(offset - static_cast<int32_t>(p_.bias.min_offset), 0, last)",
        "clamp(offset - static_cast<int32_t>(p_.bias.min_offset), 1, last)",
        "full-shared_bias-plain",
        SQUARE,
    ),
    Defect(
        "offsets above the table take its last entry but one",
        "forward",
        "clamp(offset - static_cast<int32_t>(p_.bias.min_offset), 0, last)",
        "clamp(offset - static_cast<int32_t>(p_.bias.min_offset), 0, last - 1)",
        "full-shared_bias-plain",
        SQUARE,
    ),
    Defect(
        "start of the queries left out of offsets",
        "forward",
        "q_.set(position, p_.row_start + query,",
        "q_.set(position, query,",
        "causal-shared_bias-plain",
        MORE_KEYS,
    ),
    Defect(
        "start of the queries left out of masks",
        "forward",
        "load_bits(p_, tile, row_->block.shift, bits);",
        "load_bits(p_, tile, 0, bits);",
        "chunked_causal-none-plain",
        MORE_KEYS,
    ),
    Defect(
        "last visible key of a strip cut off",
        "forward",
        "static_cast<uint8_t>(64 - __builtin_clzll(seen))",
        "static_cast<uint8_t>(63 - __builtin_clzll(seen))",
        "chunked_causal-none-plain",
        SQUARE,
    ),
    Defect(
        "mask not transposed",
        "forward",
        "transpose(mask.by_key);",
        "",
        "causal-none-plain",
        SQUARE,
    ),
    Defect(
        "product with relative keys transposed",
        "forward",
        "kTransposed = kRelKey == kQueryLanes;",
        "kTransposed = kRelKey != kQueryLanes;",
        "causal-shaw-plain",
        SQUARE,
    ),
    Defect(
        "keys of the first phase in every phase",
        "forward",
        "keys_.rows_of(p_.k[p_.k_of[phase]]",
        "keys_.rows_of(p_.k[p_.k_of[0]]",
        "full-phases-plain",
        SQUARE,
    ),
    Defect(
        "query heads take kv heads in turn",
        "forward",
        "return {head / p_.H, h, h / (p_.H / p_.G),",
        "return {head / p_.H, h, h % p_.G,",
        "causal-none-plain",
        SQUARE,
    ),
    Defect(
        "key mask ignored",
        "forward",
        "key_word(p_, row_->block.b, key)",
        "low_bits(n_k)",
        "full-none-key_mask",
        SQUARE,
    ),
    Defect(
        "row sum not rescaled as the maximum grows",
        "forward",
        "fma(load(row_->row_sum + lane), factor, sum)",
        "load(row_->row_sum + lane) + sum",
        "full-none-large_scores",
        SQUARE,
    ),
    Defect(
        "last queries of a short block left out",
        "forward",
        "vectors_ = (row_->block.count + kWidth - 1) / kWidth;",
        "vectors_ = (row_->block.count - 1) / kWidth;",
        "full-none-plain",
        SQUARE,
    ),
    Defect(
        "word of the dropout generator off by one",
        "forward",
        "bits_at_least(words.word[w], bound)",
        "bits_at_least(words.word[(w + 1) % 4], bound)",
        "full-none-dropout",
        SQUARE,
    ),
    Defect(
        "a key block seen by two steps of a group",
        "forward",
        "table_row(rows[at]), first, first + step)",
        "table_row(rows[at]), first, first + step + 1)",
        "full-none-plain",
        GROUPED,
    ),
    Defect(
        "offsets of the query block that went before in the group",
        "forward",
        "    phase_ = -1;\n  }",
        "  }",
        "causal-shared_bias-plain",
        GROUPED,
    ),
    Defect(
        "a copied key block taken for another head's",
        "forward",
        "tag.b != b || tag.head != head || tag.row != row",
        "tag.b != b || tag.row != row",
        "full-none-feature_strides",
        GROUPED,
    ),
    Defect(
        "a part of a cut row overwritten",
        "forward",
        "float* out = parts_ + part * part_size();\n    float* row_max",
        "float* out = parts_ + heavy.first_part * part_size();\n    float* row_max",
        "full-none-plain",
        CUT,
    ),
    Defect(
        "last key block of a cut row in no part",
        "forward",
        "(n + 1) * heavy.n_blocks / heavy.n_parts);",
        "(n + 1) * (heavy.n_blocks - 1) / heavy.n_parts);",
        "full-none-plain",
        CUT,
    ),
    Defect(
        "lse of an empty row finite",
        "forward",
        "p.lse[at + row] = empty ? -kInf :",
        "p.lse[at + row] = empty ? 0.0f :",
        "full-none-empty_rows",
        SQUARE,
    ),
    Defect(
        "last key skipped",
        "decode",
        "for (int64_t k = 0; k < n_k; ++k) {",
        "for (int64_t k = 0; k < n_k - 1; ++k) {",
        "full-none-plain",
        DECODE,
    ),
    Defect(
        "key mask ignored in decoding",
        "decode",
        "key_word(p_, unit.b, key)",
        "low_bits(n_k)",
        "full-none-key_mask",
        DECODE,
    ),
    Defect(
        "last query heads of a group take the wrong kv head in decoding",
        "decode",
        "unit.g = unit.head / (p_.H / p_.G);",
        "unit.g = unit.head / (p_.H / p_.G + 1);",
        "full-none-plain",
        DECODE,
    ),
    Defect(
        "first part of a cut row not merged",
        "decode",
        "n = 0; n < n_parts; ++n) {\n      const Partial one",
        "n = 1; n < n_parts; ++n) {\n      const Partial one",
        "full-none-plain",
        DECODE_CUT,
    ),
    Defect(
        "delta without the gradient of lse",
        "backward",
        "minus_delta[r] - (c_.g.dlse ? c_.g.dlse[first + r] : 0.0f);",
        "minus_delta[r];",
        "causal-none-plain",
        SQUARE,
    ),
    Defect(
        "softcap not differentiated",
        "backward",
        "prob * dprob * capped.slope",
        "prob * dprob",
        "causal-none-softcap",
        SQUARE,
    ),
    Defect(
        "dropout transposed in the backward",
        "backward",
        "transpose(kept);",
        "",
        "full-none-dropout",
        SQUARE,
    ),
    Defect(
        "key mask ignored in the backward",
        "backward",
        "key_word(p_, b_, key_)",
        "low_bits(keys_)",
        "full-none-key_mask",
        SQUARE,
    ),
    Defect(
        "gradient of the bias in the other phase's table",
        "backward",
        "p_.bias.phase_stride ? t.phase : 0;",
        "p_.bias.phase_stride ? 1 - t.phase : 0;",
        "full-phases-plain",
        SQUARE,
    ),
    Defect(
        "sign of the offset in the gradient of the bias",
        "backward",
        "t.offset = k_at_.first - q_at_.first;",
        "t.offset = q_at_.first - k_at_.first;",
        "causal-shared_bias-plain",
        SQUARE,
    ),
    Defect(
        "tiles that reach the last entry wholly counted there",
        "backward",
        "o - kBlock + 1 >= last)",
        "o + kBlock - 1 >= last)",
        "full-shared_bias-plain",
        SQUARE,
    ),
    Defect(
        "another part's dq not added",
        "backward",
        "add(sum, spill, c.tile_floats());",
        "",
        "full-none-plain",
        SHARED,
    ),
    Defect(
        "another part's dq added twice",
        "backward",
        "add(sum, spill, c.tile_floats());",
        "add(sum, spill, c.tile_floats()), add(sum, spill, c.tile_floats());",
        "full-none-plain",
        SHARED,
    ),
    Defect(
        "another part's dk of a key that all see not added",
        "backward",
        "for (int64_t part = 1; part < c.shape.n_parts; ++part) {",
        "for (int64_t part = 2; part < c.shape.n_parts; ++part) {",
        "chunked_global-none-plain",
        SHARED,
    ),
    Defect(
        "keys turned backwards as they are read",
        "decode",
        "store(low + d, a * c - b * s);",
        "store(low + d, a * c + b * s);",
        "causal-dual_chunk-plain",
        DECODE_CUT,
    ),
    Defect(
        "all keys turned as the first phase's are",
        "decode",
        "p_.turn_at[which]",
        "p_.turn_at[0]",
        "causal-self_extend-plain",
        DECODE_CUT,
    ),
    Defect(
        "dk left in units of log2",
        "backward",
        "natural) factor = 1.0f / kLog2e;",
        "natural) factor = 1.0f;",
        "causal-none-plain",
        SQUARE,
    ),
)

# loads a damaged extension as lcattn._C, then prints the first class of case that breaks the budget, and how
CHILD = """
import importlib.util, json, sys
import torch
spec = importlib.util.spec_from_file_location("lcattn._C", sys.argv[1])
extension = sys.modules["lcattn._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
from lcattn import cases, tolerance
torch.set_num_threads(2)
extension.poison_scratch(True)
assert extension.cpu_isa() == "portable"
broken = []
for names, shape in json.loads(sys.argv[3]):
    for draw in range(12):
        case = cases.make(cases.Draw(int(sys.argv[2]) + draw), *names.split("-"), cases.Shape(**shape))
        # whether lse is differentiated is drawn too
        dlse = case.dout[..., 0] if case.dlse is None else case.dlse
        try:
            found = tolerance.verify(case.problem, "cpu", case.dout, dlse)
            over = [str(c) for c in found if not c.ok]
        except AssertionError as error:
            over = [str(error)]
        if over:
            broken.append(f"{case.name}: {', '.join(over)}")
            break
print(json.dumps(broken))
"""


def build(folder: Path, units: tuple[str, ...], others: Path, optimize: str = "-O0") -> Path:
    """Links folder/_C.so: portable units of folder/csrc compiled in haste, other objects as they are elsewhere."""
    plan = (BUILT / "build.ninja").read_text()
    plan = plan.replace(f"{ROOT}/csrc/", f"{folder}/csrc/").replace(" -O3 ", f" {optimize} ")

    def inputs(line: re.Match[str]) -> str:
        here = {f"portable/{unit}.o" for unit in units} | {"portable.o"}
        places = {True: others, False: BUILT}
        names = [n if n in here else str(places[n.startswith("portable/")] / n) for n in line[2].split()]
        # the linker keeps the first copy of an inline function that units share: the damaged one
        return line[1] + " ".join(sorted(names, key=lambda name: name not in here))

    plan = re.sub(r"^(build (?:portable\.o: isolate|_C\.so: link) )(.*)$", inputs, plan, flags=re.MULTILINE)
    (folder / "build.ninja").write_text(plan)
    command = [sys.executable, "-m", "ninja", "-C", folder, "-j", "1", "_C.so"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"does not compile:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return folder / "_C.so"


def broken_cases(extension: Path, classes: list[tuple[str, Shape]]) -> list[str]:
    """What an extension gets wrong, at most one line for each class of case."""
    command = [sys.executable, "-c", CHILD, extension, str(SEED), json.dumps([(n, asdict(s)) for n, s in classes])]
    # several at once: threads that spin while they wait would take the processors from each other
    environment = os.environ | {"LCATTN_CPU_ISA": "portable", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment, cwd=ROOT)
    assert done.returncode == 0, f"not an answer but a crash ({done.returncode}):\n{done.stderr[-3000:]}"
    return list(json.loads(done.stdout.splitlines()[-1]))


def try_defect(folder: Path, defect: Defect, others: Path) -> list[str]:
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    sources = {path: path.read_text() for path in (folder / "csrc" / "cpu").iterdir()}
    count = sum(source.count(defect.text) for source in sources.values())
    assert count == 1, f"csrc/cpu has {count} times {defect.text!r}: name the text that took its place"
    for path, source in sources.items():
        if defect.text in source:
            path.write_text(source.replace(defect.text, defect.replacement))
    return broken_cases(build(folder, (defect.unit,), others), [(defect.case, defect.shape)])


@pytest.fixture(scope="session")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which(os.environ.get("CXX", "g++")) or not shutil.which("objcopy"):
        pytest.skip("needs a C++ compiler and binutils")
    if not (BUILT / "bindings.o").is_file():
        pytest.skip("needs the objects of a build in this tree: make test")
    folder = tmp_path_factory.mktemp("undamaged")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    # run for all classes of case, which takes longer than a better compilation
    build(folder, ("backward", "decode", "forward", "turn"), folder, "-O1")
    return folder


@pytest.fixture(scope="session")
def trials(
    request: pytest.FixtureRequest, undamaged: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Defect], list[str]]]:
    """The result of a defect; all that are asked for are tried two at a time."""
    asked = [item.callspec.params["defect"] for item in request.session.items if "trials" in item.fixturenames]
    with ThreadPoolExecutor(2) as pool:
        folder = tmp_path_factory.mktemp("defects")
        futures = {
            d: pool.submit(try_defect, folder / f"{i}", d, undamaged) for i, d in enumerate(dict.fromkeys(asked))
        }
        yield lambda defect: futures[defect].result()
        for future in futures.values():
            future.cancel()


def test_cases_are_those_of_the_suite() -> None:
    assert {d.shape for d in DEFECTS} <= set(cases.CPU_SHAPES)


def test_undamaged_kernels_pass_the_same_cases(undamaged: Path) -> None:
    classes = list(dict.fromkeys((d.case, d.shape) for d in DEFECTS))
    assert broken_cases(undamaged / "_C.so", classes) == []


@pytest.mark.parametrize("defect", DEFECTS, ids=[d.name.replace(" ", "_") for d in DEFECTS])
def test_a_planted_defect_is_found(defect: Defect, trials: Callable[[Defect], list[str]]) -> None:
    assert trials(defect), f"{defect.name}: within the budget"
