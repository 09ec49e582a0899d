"""The installed package: what it contains, the operators' contract, the choice of instruction set."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lcattn import _C

ROOT = Path(__file__).resolve().parent.parent
FORWARD_NAMES = (
    "q k v phase_map seg_ptr entries mask_tiles row_start key_bits q_pos k_pos turn_table turn_at scale "
    "softcap bias bias_min slope rel_key rel_key_min rel_query rel_query_min qr kr sink dropout seed out lse lse_rest"
).split()


@pytest.fixture(autouse=True)
def keep_isa() -> Iterator[None]:
    before = _C.cpu_isa()
    yield
    _C.set_cpu_isa(before)


def int32(*data: Any) -> torch.Tensor:
    return torch.tensor(data, dtype=torch.int32)


def one_key_problem(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Two batches, four heads on two kv heads, three queries that all see the single key; strided views."""
    B, H, G, T, D = 2, 4, 2, 3, 20
    k, v = (torch.randn(B, 1, G, D).to(dtype).transpose(1, 2) for _ in range(2))
    return {
        "q": [torch.randn(B, T, H, D).to(dtype).transpose(1, 2)],
        "k": [k],
        "v": [v],
        "phase_map": [0, 0, 0],
        "seg_ptr": int32([[[[0, 0, 1]]]])[0],
        "entries": int32([0, 0]),
        "mask_tiles": torch.full((1, 64, 2), -1, dtype=torch.int32),
        "row_start": 0,
        "key_bits": None,
        "q_pos": None,
        "k_pos": None,
        "turn_table": None,
        "turn_at": None,
        "scale": 0.5,
        "softcap": 0.0,
        "bias": None,
        "bias_min": 0,
        "slope": None,
        "rel_key": None,
        "rel_key_min": 0,
        "rel_query": None,
        "rel_query_min": 0,
        "qr": None,
        "kr": None,
        "sink": None,
        "dropout": 0.0,
        "seed": 0,
        "out": torch.full((B, T, H, D), torch.nan, dtype=dtype).transpose(1, 2),
        "lse": torch.full((B, H, T), torch.nan),
        "lse_rest": torch.full((B, H, T), torch.nan),
    }


def forward(problem: dict[str, Any]) -> None:
    torch.ops.lcattn.cpu_forward(*(problem[name] for name in FORWARD_NAMES))


@pytest.mark.kernels
def test_build_info_describes_this_build() -> None:
    info = _C.build_info()
    assert info["version"] == importlib.metadata.version("lcattn")
    assert info["torch_target"] == "2.10"
    assert info["isas"][-1] == "portable"
    assert info["sanitize"] == ("libasan" in os.environ.get("LD_PRELOAD", ""))
    # in the same order, without those that this processor lacks
    assert _C.cpu_isas() == [isa for isa in info["isas"] if isa in _C.cpu_isas()]


@pytest.mark.parametrize(
    ("op", "written"),
    [
        ("cpu_forward", "out lse lse_rest"),
        ("cpu_forward_plan", "out lse plan"),
        ("cpu_backward", "dq dk dv dbias dslope drel_key drel_query dqr dkr dsink"),
        ("cpu_turn", "out"),
    ],
)
def test_schema_names_what_is_written(op: str, written: str) -> None:
    schema = getattr(torch.ops.lcattn, op).default._schema
    names = [argument.name for argument in schema.arguments]
    if op == "cpu_forward":
        assert names == FORWARD_NAMES
    elif op == "cpu_backward":
        seen = [name for name in names[: names.index("out")] if not name.endswith("_t")]
        assert seen == FORWARD_NAMES[: FORWARD_NAMES.index("out")]
    assert [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] == written.split()
    assert not schema.returns


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_each_instruction_set_reads_the_tensors_as_they_lie(isa: str, dtype: torch.dtype) -> None:
    _C.set_cpu_isa(isa)
    assert _C.cpu_isa() == isa
    problem = one_key_problem(dtype)
    forward(problem)
    q, k, v = (problem[name][0].float() for name in "qkv")
    # one visible key: the output is its value, the log-sum-exp is its score
    torch.testing.assert_close(problem["out"].float(), v.repeat_interleave(2, 1).expand_as(q))
    torch.testing.assert_close(problem["lse"], 0.5 * (q * k.repeat_interleave(2, 1)).sum(-1))


def test_isa_auto_is_the_fastest_and_an_unknown_one_names_the_choices() -> None:
    _C.set_cpu_isa("portable")
    with pytest.raises(ValueError, match=r"auto, .*portable; got neon"):
        _C.set_cpu_isa("neon")
    assert _C.cpu_isa() == "portable"
    _C.set_cpu_isa("auto")
    assert _C.cpu_isa() == _C.cpu_isas()[0]


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", [torch.zeros(2, 4, 3, 20, dtype=torch.float64)], "q must be float32, bfloat16 or float16"),
        ("q", [torch.zeros(4, 3, 20)], "q must have 4 dimensions; got Float [4, 3, 20]"),
        ("q", [], "q must be 1 to 5 tensors; got 0"),
        ("q", [torch.zeros(2, 3, 3, 20)], "k must have a number of heads that divides q's 3; got 2"),
        ("q", [torch.zeros(2, 4, 0, 20)], "q must not be empty"),
        ("k", [torch.zeros(2, 2, 1, 20, dtype=torch.bfloat16)], "k must be Float [2, 2, 1, 20]"),
        ("v", [torch.zeros(2, 2, 2, 20)], "v must be Float [2, 2, 1, 20]"),
        ("phase_map", [0, 1, 0], "phase_map names a tensor that is not there"),
        ("phase_map", [0, 0], "phase_map must hold (q, k, v)"),
        ("seg_ptr", int32([[[0, 0, 1]]]).long(), "seg_ptr must be Int [2 or 1, any, any, 3], contiguous"),
        ("seg_ptr", torch.zeros(1, 3, 1, 3, dtype=torch.int32), "seg_ptr must have 1, G or H heads; got 3"),
        ("row_start", 62, "seg_ptr has 1 rows of blocks, too few for 65"),
        ("row_start", -1, "row_start must not be negative; got -1"),
        ("mask_tiles", torch.zeros(1, 64, 1, dtype=torch.int32), "mask_tiles must be Int [any, 64, 2]"),
        ("key_bits", torch.zeros(2, 2, dtype=torch.int32), "key_bits must be Int [2, 1]"),
        ("k_pos", torch.zeros(1, 2, 2, dtype=torch.int32), "k_pos must be Int [1, 2 or 1, 1]"),
        ("turn_at", torch.zeros(1, 1, 1, dtype=torch.int32), "turn_table and turn_at must be given together"),
        ("turn_table", torch.zeros(3, 20), "turn_table and turn_at must be given together"),
        ("bias", torch.zeros(1, 3, 5), "bias must be Float [1, 4 or 1, any], contiguous"),
        ("bias", torch.zeros(1, 4, 0), "a table of offsets must not be empty"),
        ("rel_key", torch.zeros(1, 5, 20), "rel_key and qr must be given together"),
        ("dropout", 1.0, "dropout must be in [0, 1)"),
        ("out", torch.zeros(2, 1, 3, 20).expand(2, 4, 3, 20), "out must not be expanded"),
        ("lse", torch.zeros(2, 3, 4).transpose(1, 2), "lse must be Float [2, 4, 3], contiguous"),
    ],
)
def test_bad_arguments_name_themselves(name: str, value: Any, message: str) -> None:
    problem = one_key_problem() | {name: value}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        forward(problem)
    if name != "out":
        assert problem["out"].isnan().all()


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("table", "at", "message"),
    [
        (torch.zeros(3, 22), (1, 1, 1), "turn_table must have an even width of at most 20; got 22"),
        (torch.zeros(3, 5), (1, 1, 1), "turn_table must have an even width of at most 20; got 5"),
        (torch.zeros(3, 20, dtype=torch.float64), (1, 1, 1), "turn_table must be Float [any, any]"),
        (torch.zeros(3, 20), (2, 1, 1), "turn_at must be Int [1, 2 or 1, 1]"),
        (torch.zeros(3, 20), (1, 1, 1), "keys are turned for few queries and inference only"),
    ],
)
def test_bad_turns_name_themselves(table: torch.Tensor, at: tuple[int, ...], message: str) -> None:
    problem = one_key_problem() | {"turn_table": table, "turn_at": torch.zeros(at, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        forward(problem)


@pytest.mark.kernels
def test_a_plan_is_of_three_tensors_and_as_long_as_it_is() -> None:
    problem = one_key_problem()
    inputs = [problem[name] for name in FORWARD_NAMES if name != "lse_rest"]
    with pytest.raises(RuntimeError, match=rf"plan must be Byte \[{_C.cpu_plan_bytes}\]"):
        torch.ops.lcattn.cpu_forward_plan(*inputs, torch.zeros(8, dtype=torch.uint8))
    inputs[0] = problem["q"] * 2
    with pytest.raises(RuntimeError, match="a plan is of one q, one k and one v"):
        torch.ops.lcattn.cpu_forward_plan(*inputs, torch.zeros(_C.cpu_plan_bytes, dtype=torch.uint8))


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(3, 20), "x must have 4 dimensions; got Float [3, 20]"),
        ("x", torch.zeros(2, 4, 3, 20, dtype=torch.float64), "must be float32, bfloat16 or float16"),
        ("table", torch.zeros(5, 22), "table must have an even width of at most 20; got 22"),
        ("table", torch.zeros(5, 3), "table must have an even width of at most 20; got 3"),
        ("table", torch.zeros(5, 20, dtype=torch.float64), "table must be Float [any, any], contiguous"),
        ("at", torch.zeros(3, 3, dtype=torch.int32), "at must be Int [2 or 1, 3]"),
        ("at", torch.zeros(2, 3), "at must be Int [2 or 1, 3]"),
        ("at", torch.zeros(3, 2, dtype=torch.int32).T, "at must be contiguous in its last dimension"),
        ("out", torch.zeros(2, 4, 1, 20), "out must be Float [2, 4, 3, 20]"),
        ("out", torch.zeros(2, 4, 3, 1).expand(2, 4, 3, 20), "out must not be expanded"),
    ],
)
def test_bad_turning_names_itself(name: str, value: torch.Tensor, message: str) -> None:
    given = {"x": torch.ones(2, 4, 3, 20), "table": torch.zeros(5, 20), "at": torch.zeros(2, 3, dtype=torch.int32)}
    given |= {"back": False, "out": torch.full((2, 4, 3, 20), torch.nan)}
    torch.ops.lcattn.cpu_turn(*given.values())
    assert (given["out"] == 0).all()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.lcattn.cpu_turn(*(given | {name: value}).values())


def test_triton_kernels_come_with_the_package() -> None:
    module = importlib.import_module("lcattn.triton_kernels")
    assert module.__name__ == "lcattn.triton_kernels"
    with pytest.raises(ImportError):
        importlib.import_module("lcattn.no_such_module")


def test_a_wheel_holds_kernels_and_every_module(tmp_path: Path) -> None:
    command = ["egg_info", "--egg-base", tmp_path, "build", "--build-base", tmp_path / "build"]
    command += ["bdist_wheel", "--bdist-dir", tmp_path / "wheel", "--dist-dir", tmp_path / "dist"]
    subprocess.run([sys.executable, "setup.py", "-q", *command], cwd=ROOT, check=True, timeout=600)
    (wheel,) = (tmp_path / "dist").glob("lcattn-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert (ROOT / "README.md").read_text(encoding="utf-8") in metadata
    assert f"lcattn/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    for folder, package in (("lcattn", "lcattn"), ("triton_kernels", "lcattn/triton_kernels")):
        sources = {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert {f"{package}/{source}" for source in sources} <= names
    assert "lcattn/bench/__main__.py" in names and not [name for name in names if "/bench/gpu_" in name]
    assert not [name for name in names if name.startswith(("tests", "bench", "triton_kernels"))]


def built_objects() -> Path:
    folder = ROOT / "build" / "native" / str(sysconfig.get_config_var("SOABI"))
    if not (folder / "portable.o").is_file() or not shutil.which("objdump"):
        pytest.skip("needs the objects of a build in this tree, and binutils")
    return folder


@pytest.mark.parametrize("isa", _C.build_info()["isas"])
def test_objects_of_an_instruction_set_share_no_symbol(isa: str) -> None:
    path = built_objects() / f"{isa}.o"
    listing = subprocess.run(["nm", "--defined-only", "--extern-only", path], capture_output=True, text=True)
    symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
    foreign = [symbol for symbol in symbols if f"6lcattn3cpu{len(isa)}{isa}" not in symbol]
    assert symbols and not foreign


@pytest.mark.parametrize("name", ["portable", "kernels", "scratch", "bindings"])
def test_code_for_any_processor_uses_no_wide_registers(name: str) -> None:
    path = built_objects() / f"{name}.o"
    code = subprocess.run(["objdump", "-d", path], capture_output=True, text=True, check=True).stdout
    assert "ret" in code or name == "scratch"
    assert not re.findall(r"%[yz]mm\d+", code)


def test_seed_was_drawn_for_these_kernels() -> None:
    """Where there is no git, as in a source distribution, there is no telling."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD:csrc", "HEAD:triton_kernels"]
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    trees = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    recorded = (ROOT / "tests" / "seed.txt").read_text().split()
    assert recorded[1:] == trees, "kernels changed: commit them, then `make seed`"
