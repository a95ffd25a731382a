"""Building from source: which compiler, which architectures, what is said when something is missing; the module's face.

The kernels take minutes to compile: here stand-ins take their place. Where a test is about one of the project's failure cases,
its name has that row of the list.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from score_kernels.activations import ACTIVATIONS
from score_kernels.problem import NORMS, SHAPES
from score_kernels.stages import ORDERS

ROOT = Path(__file__).parents[1]
SETTINGS = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CMAKE_CUDA_ARCHITECTURES", "CUTLASS_DIR", "MAX_JOBS")
# A builder's own settings decide nothing here.
CLEAN = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "SCORE_KERNELS_CUDA")}


def loaded(path, name):
    """A module from a file, without its name in sys.modules."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = loaded(ROOT / "setup.py", "score_setup")
NVCC = build.find_nvcc(os.environ)[0]
CMAKE, NINJA = build.tool("cmake", build.CMAKE), build.tool("ninja", build.NINJA)
needs_cmake = pytest.mark.skipif(not CMAKE, reason="needs cmake, 3.24 or newer")
needs_nvcc = pytest.mark.skipif(not (NVCC and CMAKE and NINJA), reason="needs nvcc, cmake and ninja")


def program(path, text="exit 0"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def run(*command, cwd=None, fails=False, **environ):
    """What a command prints, on one line."""
    done = subprocess.run(
        command, cwd=cwd, env={**CLEAN, **environ}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
    )
    assert (done.returncode != 0) == fails, done.stdout
    return " ".join(done.stdout.split())


# Which compiler


def test_nvcc_is_searched_in_order(tmp_path):
    local = {name: program(tmp_path / "local" / name / "bin" / "nvcc") for name in ("cuda-9.2", "cuda-12.8", "cuda-13.0")}
    found = lambda **environ: build.find_nvcc(environ, tmp_path / "local")[0]  # noqa: E731
    assert found() == local["cuda-13.0"]
    (tmp_path / "local" / "cuda").symlink_to("cuda-12.8")
    assert found() == str(tmp_path / "local" / "cuda" / "bin" / "nvcc")
    environ = {}
    for name, value in (("PATH", "path"), ("CUDA_PATH", "home/.."), ("CUDA_HOME", "home"), ("CUDACXX", "cxx/nvcc-13")):
        folder = tmp_path / {"PATH": "path", "CUDA_PATH": "bin", "CUDA_HOME": "home/bin", "CUDACXX": "cxx"}[name]
        nvcc = program(folder / ("nvcc-13" if name == "CUDACXX" else "nvcc"))
        environ[name] = str(tmp_path / value)
        (tmp_path / "home").mkdir(exist_ok=True)
        assert os.path.realpath(found(**environ)) == nvcc, name
    assert found(CUDACXX="nvcc-13", PATH=str(tmp_path / "cxx")) == nvcc


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH", "CUDACXX"])
def test_failure_case_31_a_wrong_place_is_named_though_there_is_another_nvcc(tmp_path, name):
    environ = {name: "/nowhere", "PATH": str(Path(program(tmp_path / "nvcc")).parent)}
    nvcc, line = build.wanted_nvcc(environ)
    assert nvcc is None
    assert f"{name}=/nowhere" in line
    with pytest.raises(SystemExit, match=f"SCORE_KERNELS_CUDA=1, but {name}=/nowhere .*: install the CUDA toolkit"):
        build.wanted_nvcc({**environ, "SCORE_KERNELS_CUDA": "1"})
    assert build.wanted_nvcc({**environ, "SCORE_KERNELS_CUDA": "0"}) == (None, "")


def test_failure_case_31_no_nvcc_is_one_clear_line(tmp_path):
    assert build.find_nvcc({"PATH": "/nowhere"}, tmp_path) == (None, f"there is no nvcc in PATH or {tmp_path}/cuda*/bin")
    said = run(sys.executable, "setup.py", "-q", "build_ext", cwd=ROOT, CUDA_HOME="/nowhere")
    assert said == (
        "score_kernels: Python only, without the CUDA kernels. For them, CUDA_HOME=/nowhere has no bin/nvcc: install the CUDA "
        "toolkit (12.0 or newer), or set CUDA_HOME to the one to use (SCORE_KERNELS_CUDA=0: without this line)"
    )


def test_the_switch_takes_0_and_1():
    with pytest.raises(SystemExit, match=r"SCORE_KERNELS_CUDA: expected 0 .* 1 .* got 'yes'"):
        build.wanted_nvcc({"SCORE_KERNELS_CUDA": "yes"})


# The driver, with programs that only look like cmake, ninja and nvcc

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
FAKE_CMAKE = f"""
[ "$1" = --version ] && echo cmake version 3.30.1 && exit
echo "$@" >>"$LOG"
[ "$1" = --build ] || exit 0
echo module >"$2/_cuda{SUFFIX}"
"""


@pytest.fixture
def project(tmp_path):
    """A copy of what is built."""
    folder = tmp_path / "project"
    for name in ("score_kernels", "triton_kernels", "csrc", "tests/cuda"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "_cuda.*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.skipif(importlib.util.find_spec("pybind11") is None, reason="needs pybind11")
def test_failure_case_30_a_wheel_with_the_module_is_built_without_torch(project, tmp_path):
    tools = tmp_path / "tools"
    program(tools / "cmake", FAKE_CMAKE)
    program(tools / "ninja", "echo 1.12.1")
    nvcc = program(tools / "nvcc")
    (project / "torch.py").write_text("raise ImportError('the build must not need torch')")
    tree = project / "build" / sys.implementation.cache_tag
    tree.mkdir(parents=True)
    run(
        sys.executable, "setup.py", "bdist_wheel", cwd=project,
        PYTHONPATH=str(project), PATH=f"{tools}{os.pathsep}{CLEAN['PATH']}", LOG=str(tmp_path / "log"),
    )  # fmt: skip
    (wheel,) = project.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/WHEEL")))
    assert {name for name in names if not name.endswith((".py", "/py.typed", ".pyi"))} == {f"score_kernels/_cuda{SUFFIX}"}
    assert all(name.startswith("score_kernels/") for name in names)
    assert b"Root-Is-Purelib: false" in metadata
    configured, built = (tmp_path / "log").read_text().splitlines()
    assert f"-B {tree} -G Ninja -DCMAKE_CUDA_COMPILER:STRING={nvcc} -DCMAKE_MAKE_PROGRAM={tools / 'ninja'} " in configured
    assert f"-DPython_EXECUTABLE={sys.executable}" in configured
    assert built == f"--build {tree}"


def test_what_is_missing_is_asked_for_only_where_the_kernels_are_built(project, tmp_path):
    old = tmp_path / "old"
    for name in ("cmake", "ninja"):
        program(old / name, "echo version 1.2.3")
    ask = (
        "import sys; sys.executable = '/nowhere/python'\n"
        "from setuptools import build_meta; print(build_meta.get_requires_for_build_wheel())"
    )
    environ = {"PATH": str(old), "CUDACXX": program(tmp_path / "nvcc")}
    assert "'cmake>=3.24', 'ninja>=1.10'" in run(sys.executable, "-c", ask, cwd=project, **environ)
    assert run(sys.executable, "-c", ask, cwd=project, SCORE_KERNELS_CUDA="0", **environ).endswith("[]")


# Which architectures, and how many compilers at a time


def said_by_cmake(*options, fails=False, **environ):
    return run(CMAKE, *options, "-P", "CMakeLists.txt", cwd=ROOT, fails=fails, **environ)


GRAMMAR = {
    "8.0": "sm_80",
    "8.0+PTX;9.0a": "sm_80 compute_80 sm_90a",
    "8.0;9.0a+PTX": "sm_80 compute_90 sm_90a",
    "9.0": "sm_90a",
    "8.6, 8.9 10.0,12.0+PTX": "sm_86 sm_89 sm_100 sm_120 compute_120",
    "80": "sm_80 compute_80",
    "80-real;90a": "sm_80 sm_90a",
    "90": "compute_90 sm_90a",
    "90-real": "sm_90a",
    "86-virtual;86;8.6": "compute_86 sm_86",
}


@needs_cmake
@pytest.mark.parametrize(("asked", "built"), GRAMMAR.items())
def test_failure_case_33_architectures(asked, built):
    assert f"CUDA kernels for {built} (TORCH_CUDA_ARCH_LIST);" in said_by_cmake(TORCH_CUDA_ARCH_LIST=asked)


@needs_cmake
def test_failure_case_33_the_first_that_is_set_decides():
    environ = {}
    assert "CUDA kernels for sm_80 compute_80 sm_90a (default);" in said_by_cmake(TORCH_CUDA_ARCH_LIST="")
    environ["CMAKE_CUDA_ARCHITECTURES"] = "86-real"
    assert "CUDA kernels for sm_86 (CMAKE_CUDA_ARCHITECTURES);" in said_by_cmake(**environ)
    environ["TORCH_CUDA_ARCH_LIST"] = "8.9"
    assert "CUDA kernels for sm_89 (TORCH_CUDA_ARCH_LIST);" in said_by_cmake(**environ)
    said = said_by_cmake("-DCMAKE_CUDA_ARCHITECTURES=120-real", **environ)
    assert "CUDA kernels for sm_120 (-DCMAKE_CUDA_ARCHITECTURES);" in said


@needs_cmake
@pytest.mark.parametrize("word", ["7.5", "8.0a", "75-real", "native", "all", "Hopper", "9.0+ptx", "sm_80", "8.0+PTX+PTX"])
@pytest.mark.parametrize("name", ["TORCH_CUDA_ARCH_LIST", "CMAKE_CUDA_ARCHITECTURES"])
def test_failure_case_33_unknown_architectures_are_errors_that_list_the_known(name, word):
    said = said_by_cmake(fails=True, **{name: f"8.6;{word}"})
    assert f'{name}: unknown architecture "{word}" in "8.6;{word}"; known are 8.0 8.6 8.7 8.8 8.9 9.0 9.0a 10.0' in said


@needs_cmake
def test_no_architecture_is_an_error():
    assert "TORCH_CUDA_ARCH_LIST: expected architectures" in said_by_cmake(fails=True, TORCH_CUDA_ARCH_LIST=" ;")


@needs_cmake
def test_failure_case_34_compilers_at_a_time():
    """MAX_JOBS, or as many as there are cores and 4 GiB of memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    jobs = int(re.search(r"compilers at a time: (\d+)", said_by_cmake())[1])
    assert 1 <= jobs <= max(1, min(os.cpu_count(), memory >> 32))
    assert "compilers at a time: 7" in said_by_cmake(MAX_JOBS="7")
    for wrong in ("0", "-1", "many", "2.5"):
        assert f'MAX_JOBS: expected a positive integer, got "{wrong}"' in said_by_cmake(fails=True, MAX_JOBS=wrong)


# A real build, of kernels that compile in no time

KERNEL = """
#include <cuda_runtime.h>
#include <cute/tensor.hpp>
#include "kernels.h"
namespace score {{
struct Half;
template <class>
struct Sm{arch};
template <template <class> class, Op, class, int, int, bool, Family, class, bool>
struct Config;
template <class C>
__global__ void forward_sm{arch}(Forward const p) {{
  if (threadIdx.x < p.rows) static_cast<float*>(p.out)[threadIdx.x] = p.eps;
}}
static int run(Forward const& p, int multiprocessors, CUstream_st* stream) {{
  using C = Config<Sm{arch}, Op::{op}, Half, 64, 32, false, Family::relu, Forward, false>;
  forward_sm{arch}<C><<<multiprocessors, 128, 0, stream>>>(p);
  return cudaGetLastError();
}}
static Kernel const kernel_of_file{{Op::{op}, {arch}, Dtype::float16, 64, false, Family::relu, 32, 64, 128, 0, 3, false, run}};
static bool const added = (kernels().push_back(kernel_of_file), true);
}}
"""
PACK = """
#include "kernels.h"
namespace score {
std::size_t packed_bytes(Pack const&) { return 1; }
int launch_pack(Pack const&, CUstream_st*) { return 0; }
}
"""


@pytest.fixture
def stand_in(project):
    """The project with kernels that compile in no time, and settings to build them with."""
    for op, arch in (("linear", 80), ("linear", 90), ("mlp", 80), ("mlp", 90)):
        (project / f"csrc/{op}_forward_sm{arch}.cu").write_text(KERNEL.format(op=op, arch=arch))
        (project / f"csrc/{op}_backward_sm90.cu").write_text("")
    (project / "csrc/pack.cu").write_text(PACK)
    (project / "tests/cuda/layouts.cu").write_text("int main() {}")
    (project / "tests/cuda/second_opinion.cu").write_text("int main() { return 77; }")
    headers = project / "cutlass" / "include" / "cute"
    headers.mkdir(parents=True)
    (headers / "tensor.hpp").touch()
    return project, {"CUTLASS_DIR": str(project / "cutlass"), "CUDACXX": NVCC, "MAX_JOBS": "2"}


@needs_nvcc
def test_a_build_with_cmake_alone(stand_in, tmp_path):
    """The commands of CMakeLists.txt, and what comes of them: failure cases 29, 32, 33."""
    folder, environ = stand_in
    options = ["-B", "build", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}", f"-DPython_EXECUTABLE={sys.executable}"]
    run(CMAKE, *options, "-DCMAKE_CUDA_ARCHITECTURES=80", cwd=folder, **environ)
    assert "depth = 2" in (folder / "build/CMakeFiles/rules.ninja").read_text()
    run(CMAKE, "--build", "build", cwd=folder, **environ)
    assert "no work to do" in run(CMAKE, "--build", "build", cwd=folder, **environ)
    ctest = (str(Path(CMAKE).with_name("ctest")), "--test-dir", "build", "--output-on-failure")
    assert "100% tests passed" in run(*ctest, "--exclude-regex", "sass", cwd=folder)
    said = run(*ctest, "--tests-regex", "sass", cwd=folder, fails=True)  # these kernels make no products
    for kernel in ("OpE0ENS_4HalfELi64ELi32E", "OpE1ENS_4HalfELi64ELi32E"):
        assert re.search(rf"forward_sm80\S*{kernel}\S*: no HMMA|cuobjdump is missing|nvdisasm is missing", said), said

    reports = {path.name: path.read_text() for path in folder.glob("build/ptxas/*.txt")}
    sources = {"pack", "linear_forward_sm80", "mlp_forward_sm80", "layouts", "second_opinion"}
    assert reports.keys() == {f"{name}.cu.txt" for name in sources}
    assert re.search("Compiling entry function .* for 'sm_80'", reports["mlp_forward_sm80.cu.txt"])
    assert re.search("0 bytes spill stores.*\n.*Used \\d+ registers", reports["mlp_forward_sm80.cu.txt"])

    (module,) = folder.glob("build/_cuda*")
    facts = "import _cuda; print(_cuda.architectures(), sorted((k['op'], k['arch']) for k in _cuda.kernels()))"
    # Failure case 29: on a machine with nothing. Failure case 33: what was built can be asked for.
    built = run(sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(module.parent)!r}); {facts}", PATH="")
    assert built == "['sm_80', 'compute_80'] [('linear', 80), ('mlp', 80)]"
    # Failure case 32: of libraries it needs those of any C++ program.
    if shutil.which("readelf"):
        needed = set(re.findall(r"\[(\w+)[^]]*\.so", run("readelf", "-d", str(module))))
        assert needed <= {"libstdc", "libgcc_s", "libc", "libm", "ld", "libpthread", "libdl", "librt"}, needed

    (folder / "cutlass/include/cute/tensor.hpp").unlink()
    said = run(CMAKE, "-B", "build", cwd=folder, fails=True, **environ)
    assert f"CUTLASS_DIR={environ['CUTLASS_DIR']}: no cute/tensor.hpp in it" in said


@needs_nvcc
def test_failure_case_31_missing_headers_are_named_with_what_to_do(stand_in):
    folder, environ = stand_in
    hidden = program(folder / "python", f'exec {sys.executable} -S "$@"')
    environ = {**environ, "CUTLASS_DIR": "", "CUTLASS_ROOT": ""}
    options = ["-B", "build", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}", f"-DPython_EXECUTABLE={hidden}"]
    said = run(CMAKE, *options, "-DCMAKE_CUDA_ARCHITECTURES=80", cwd=folder, fails=True, **environ)
    assert "pip install --no-deps nvidia-cutlass==4.2.0.0, or set CUTLASS_DIR" in said


# What is said of compiled kernels that are not what they are meant to be: reports and listings that programs of this name print

REGISTRY = """sm_90 1 Half 64 64 0 2 Forward 0: 384 threads, 128 rows, 231424 bytes
sm_80 1 Half 64 64 0 2 Forward 0: 256 threads, 128 rows, 98304 bytes"""
NAME = "_ZN5score12forward_sm{0}INS_6ConfigINS_4Sm{0}ELNS_2OpE1ENS_4HalfELi64ELi64ELb0ELNS_6FamilyE2ENS_7ForwardELb0EEEEEvS5_"
HOPPER, PORTABLE = NAME.format(90), NAME.format(80)
REPORT = f"""
ptxas info    : Compiling entry function '{HOPPER}' for 'sm_90a'
ptxas info    : Function properties for {HOPPER}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function '{PORTABLE}' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers
"""
SASS = f"""
 Function {HOPPER}:
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:640
        Function : {HOPPER}
        /*0350*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;        /* 0x000000e8000079c8 */
        /*a710*/                   HGMMA.64x64x16.F32.BF16 R88, R180, gdesc[UR20], R88 ;
        /*b000*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;               /* 0x00000028000079c8 */
        /*b100*/                   UBLKCP.S.G.MULTICAST [UR4], [UR2], UR7, UR8 ;
        Function : {PORTABLE}
        /*0100*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], [R4.64] ;
        /*0200*/                   LDSM.16.M88.4 R4, [R6] ;
        /*0300*/              @P0  HMMA.16816.F32 R4, R4, R8, R4 ;
"""


def said_of_compiled(folder, name, text, *, fails, **given):
    """What tests/cuda/<name>.cmake says where the program of that name, or the report, is this text."""
    (folder / "text").write_text(text)
    (folder / "mlp_forward_sm90.cu.txt").write_text(text)
    registry = program(folder / "registry", f"echo '{REGISTRY}'")
    for tool in ("cuobjdump", "nvdisasm"):
        program(folder / tool, f"cat {folder}/text")
    options = {"REGISTRY": registry, "REPORTS": folder, "FOLDERS": folder, "OBJECTS": "kernels.o", **given}
    words = [f"-D{key}={value}" for key, value in options.items()]
    return run(CMAKE, *words, "-P", ROOT / f"tests/cuda/{name}.cmake", cwd=folder, fails=fails)


FAULTS = {
    "ptxas": [
        ("0 bytes spill stores", "4 bytes spill stores", "0 bytes stack frame, 4 bytes spill stores"),
        ("Used 168", "Used 176", "needs 67584 registers and 232448 bytes of shared memory; there are 65536 and 232448"),
        ("1024 bytes smem", "1025 bytes smem", "needs 64512 registers and 232449 bytes"),
        ("'sm_90a'", "'sm_80'", "there are 65536 and 101376"),
        (f"'{PORTABLE}'", f"'{PORTABLE.replace('Li64', 'Li96')}'", "the registry has no _ZN5score12forward_sm80"),
        ("\nptxas info    : Used 255", "\nptxas info : (C7512) wgmma serialised\nptxas info    : Used 255", "C7512"),
        (REPORT, "", "mlp_forward_sm90.cu.txt: no kernel"),
    ],
    "sass": [
        ("HGMMA", "HMMA", f"{HOPPER}: no HGMMA"),
        ("UBLKCP.S.G.MULTICAST", "LDG.E", f"{HOPPER}: no UBLKCP"),
        (" HMMA", " FFMA", f"{PORTABLE}: no HMMA"),
        ("LDSM.16", "LDS.U", f"{PORTABLE}: no LDSM"),
        ("LDGSTS", "LDG", f"{PORTABLE}: no LDGSTS"),
        ("/*0200*/ ", "/*0200*/  STL [R1], R2 ;\n", f"{PORTABLE}: STL: something is in local memory"),
        ("/*b000*/ ", "/*b000*/ @!P1 LDL.64 R2, [R1] ;\n", f"{HOPPER}: LDL: something is in local memory"),
        ("0xe8 ;", "0xf0 ;", f"{HOPPER}: setmaxnreg asks for 66560 registers of 64512"),
        ("REG:168", "REG:160", f"{HOPPER}: setmaxnreg asks for 64512 registers of 61440"),
        ("OpE1E", "OpE0E", f"{PORTABLE.replace('OpE1E', 'OpE0E')}: the registry does not have it"),
        (SASS, "", "kernels.o: no kernel"),
    ],
}


@needs_cmake
@pytest.mark.parametrize(("name", "good"), [("ptxas", REPORT), ("sass", SASS)])
def test_compiled_kernels_are_held_to_what_they_are_meant_to_be(tmp_path, name, good):
    assert said_of_compiled(tmp_path, name, good, fails=False) == ""
    for old, new, expected in FAULTS[name]:
        assert old in good
        said = said_of_compiled(tmp_path, name, good.replace(old, new), fails=True)
        assert expected in said, (old, new, said)


@needs_cmake
def test_without_a_disassembler_its_test_fails_and_says_what_to_install(tmp_path):
    searched = ("CMAKE_FIND_USE_CMAKE_SYSTEM_PATH", "CMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH")
    said = said_of_compiled(tmp_path, "sass", SASS, fails=True, FOLDERS="/nowhere", **dict.fromkeys(searched, "OFF"))
    assert "cuobjdump is missing" in said
    pinned = re.findall("^(.*)==", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    assert {*re.search(r"pip install (.*) \(", said)[1].split()} <= {*pinned}


# The module's face, over a CUDA runtime that only looks like one. It says no to what the environment variable FAKE names.

FAKE = """
#include <cuda_runtime_api.h>
#include <cstdlib>
#include <cstring>
#include "kernels.h"
static int device = 7;
static cudaError_t fails(char const* what, cudaError_t error) {
  char const* fake = std::getenv("FAKE");
  return fake != nullptr && std::strcmp(fake, what) == 0 ? error : cudaSuccess;
}
extern "C" {
cudaError_t cudaGetDevice(int* d) { return *d = device, fails("driver", cudaErrorInsufficientDriver); }
cudaError_t cudaSetDevice(int d) { return d > 9 ? cudaErrorInvalidDevice : (device = d, cudaSuccess); }
cudaError_t cudaGetLastError() { return cudaSuccess; }
char const* cudaGetErrorString(cudaError_t error) { return error == cudaErrorInsufficientDriver ? "no driver" : "some error"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int d) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 7 : attribute == cudaDevAttrComputeCapabilityMinor ? 5 : 100 + d;
  return cudaSuccess;
}
}
namespace score {
static Pack packed;
std::size_t packed_bytes(Pack const& p) { return 1000 * p.sets + p.hidden; }
int launch_pack(Pack const& p, CUstream_st*) { return packed = p, fails("pack", cudaErrorNoKernelImageForDevice); }
static int run(Forward const& f, int multiprocessors, CUstream_st* stream) {
  float const told[] = {
      float(device), float(multiprocessors), float(reinterpret_cast<std::intptr_t>(stream)), float(f.rows), float(f.features),
      float(f.hidden), float(f.iterations), float(f.first), float(f.sets), float(f.cyclic), float(int(f.norm)),
      float(int(f.activation)), f.negative_slope, f.eps, float(packed.features), float(packed.hidden), float(packed.sets),
      float(packed.columns), float(packed.chunk), float(packed.gated), float(packed.norm_float32),
      float(packed.packed == f.packed), float(f.h != f.out), f.coefficients[1],
      f.x0_scale ? *f.x0_scale : 0, f.state_scale ? *f.state_scale : 0, float(*packed.table)};
  if (f.states != nullptr) std::memcpy(f.states, told, sizeof told);
  return fails("launch", cudaErrorInvalidDeviceFunction);
}
static int reverse(Backward const& b, int multiprocessors, CUstream_st* stream) {
  auto bits = [](void const* p) { return p ? float(*static_cast<std::uint16_t const*>(p)) : 0; };
  auto number = [](float const* p) { return p ? *p : 0; };
  float const told[] = {
      float(device), float(multiprocessors), float(reinterpret_cast<std::intptr_t>(stream)), float(b.rows), float(b.features),
      float(b.hidden), float(b.iterations), float(b.sets), float(b.cyclic), float(int(b.norm)), float(int(b.activation)),
      b.negative_slope, b.eps, float(b.first), float(b.states_rows), float(b.grad_rows), number(b.states),
      number(b.grad_states), bits(b.grad_out), bits(b.x0), b.coefficients[1], number(b.x0_scale), number(b.state_scale),
      float(packed.packed == b.packed), float(*packed.table)};
  if (b.scalars != nullptr) std::memcpy(b.scalars, told, sizeof told);
  *static_cast<std::uint16_t*>(b.grad_h) = 1;
  if (b.grad_x0 != nullptr) *b.grad_x0 = 2;
  if (b.ring != nullptr) *static_cast<std::uint16_t*>(b.ring) = 3;
  if (b.partials != nullptr) b.partials[0] = float(b.blocks);
  return fails("launch", cudaErrorInvalidDeviceFunction);
}
static bool const added = [] {
  for (Family family : {Family::relu, Family::piecewise, Family::gelu, Family::sigmoidal})
    for (Op op : {Op::linear, Op::mlp})
      kernels().push_back({op, 80, Dtype::bfloat16, 64, op == Op::mlp, family, 32, 64, 128, 49152, 4, false, run});
  auto add = [](Op op, bool gated, bool accumulates) {
    Kernel const like{op, 90, Dtype::bfloat16, 64, gated, Family::relu, 32, 64, 128, 49152, 4, accumulates, nullptr, reverse};
    kernels().push_back(like);
  };
  add(Op::mlp, true, false), add(Op::linear, false, false), add(Op::mlp, false, true);
  return true;
}();
}
"""
TOLD = [
    "device", "multiprocessors", "stream", "rows", "features", "hidden", "iterations", "first", "sets", "cyclic", "norm",
    "activation", "negative_slope", "eps", "pack.features", "pack.hidden", "pack.sets", "columns", "chunk", "gated",
    "norm_float32", "same_packed", "apart", "coefficient", "x0_scale", "state_scale", "table",
]  # fmt: skip


@pytest.fixture(scope="module")
def face(tmp_path_factory):
    """The module `_cuda` with kernels and a runtime that tell what they were given: it needs CUDA's headers and no GPU."""
    pybind11, compiler = pytest.importorskip("pybind11"), shutil.which("c++")
    if not NVCC or not compiler:
        pytest.skip("needs a C++ compiler and the headers that nvcc has")
    include = Path(re.search(r"TOP=(\S+)", run(NVCC, "--dryrun", "-E", "-x", "cu", os.devnull))[1]) / "include"
    folder = tmp_path_factory.mktemp("face")
    (folder / "fake.cpp").write_text(FAKE)
    folders = [include, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    run(
        compiler, "-std=c++17", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", '-DSCORE_ARCHITECTURES="sm_80 compute_80"',
        *(f"-I{path}" for path in folders), ROOT / "csrc/bindings.cpp", ROOT / "csrc/kernels.cpp", folder / "fake.cpp",
        "-o", folder / f"_cuda{SUFFIX}",
    )  # fmt: skip
    return loaded(folder / f"_cuda{SUFFIX}", "_cuda")


def passed(tensor):
    return tensor.data_ptr(), tensor.numel()


@pytest.fixture
def given(face):
    """Arguments that are right, for the first kernel of mlp, and the tensors that they point to."""
    kernel = next(i for i, k in enumerate(face.kernels()) if (k["op"], k["direction"]) == ("mlp", "forward"))
    rows, features, hidden, iterations, first, sets = 7, 10, 20, 4, 1, 2
    size = face.packed_bytes(kernel=kernel, features=features, hidden=hidden, sets=sets)
    tensors = {
        **{name: torch.zeros(rows, features, dtype=torch.bfloat16) for name in ("h", "x0", "out")},
        "states": torch.zeros(iterations + 1 - first, rows, features),
        "coefficients": torch.arange(5.0 * iterations),
        "state_scale": torch.full((iterations,), 0.25),
        "x0_scale": torch.full((iterations,), 0.5),
        "table": torch.full((sets, 8), 3),
        "packed": torch.zeros(size + 128, dtype=torch.uint8),
    }
    pointers = {name: passed(tensor) for name, tensor in tensors.items()}
    pointers["packed"] = (-(-pointers["packed"][0] // 128) * 128, size)
    options = {
        "kernel": kernel, "device": 1, "stream": 0, "rows": rows, "features": features, "hidden": hidden,
        "iterations": iterations, "first": first, "sets": sets, "order": "cyclic", "norm": "rmsnorm", "norm_float32": True,
        "activation": "relu", "negative_slope": -0.5, "eps": 0.125,
    }  # fmt: skip
    return {**options, **pointers}, tensors


def test_the_families_are_those_of_the_package(face):
    assert {kernel["op"] for kernel in face.kernels()} == {"linear", "mlp"} <= set(SHAPES)
    families = {name: face.family(activation=name) for name in ACTIVATIONS}
    assert families.pop("relu") == "relu"
    assert families.pop("gelu") == "gelu"
    assert {name for name, family in families.items() if family == "piecewise"} == {"identity", "relu2", "leaky_relu"}
    assert {name for name, family in families.items() if family == "sigmoidal"} == {"gelu_tanh", "silu", "tanh", "sigmoid"}


def test_the_stub_is_what_the_module_has(face):
    tree = ast.parse((ROOT / "score_kernels/_cuda.pyi").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert functions.keys() == {name for name in dir(face) if not name.startswith("_")}
    names = {name: [argument.arg for argument in node.args.kwonlyargs] for name, node in functions.items()}
    assert names["packed_bytes"] == ["kernel", "features", "hidden", "sets"]
    for direction in ("forward", "backward"):
        said = " ".join(getattr(face, direction).__doc__.split())
        assert f"{direction}(*, {', '.join(names[direction])})" in said
    (kernel,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    fields = [node.target.id for node in kernel.body]
    assert all([*entry] == fields for entry in face.kernels())
    # The values of the names, in their order.
    subscripts = (node for node in ast.walk(tree) if isinstance(node, ast.Subscript))
    literals = [ast.literal_eval(node.slice) for node in subscripts if node.value.id == "Literal"]
    for values in (ACTIVATIONS, NORMS, ORDERS, {entry["family"] for entry in face.kernels()}):
        assert any({*literal} == {*values} for literal in literals), values


def test_what_the_kernels_are_given(face, given):
    arguments, tensors = given
    face.forward(**arguments)
    assert dict(zip(TOLD, tensors["states"].flatten().tolist(), strict=False)) == {
        "device": 1, "multiprocessors": 101, "stream": 0, "rows": 7, "features": 10, "hidden": 20, "iterations": 4, "first": 1,
        "sets": 2, "cyclic": 1, "norm": 2, "activation": 1, "negative_slope": -0.5, "eps": 0.125, "pack.features": 10,
        "pack.hidden": 20, "pack.sets": 2, "columns": 64, "chunk": 32, "gated": 1, "norm_float32": 1, "same_packed": 1,
        "apart": 1, "coefficient": 1, "x0_scale": 0.5, "state_scale": 0.25, "table": 3,
    }  # fmt: skip
    # In place, without what is optional, and with every name.
    named = {"order": ORDERS, "norm": NORMS}
    for name, value in [(name, value) for name, values in named.items() for value in values]:
        optional = {"x0": None, "x0_scale": None, "state_scale": None, "out": arguments["h"]}
        face.forward(**{**arguments, **optional, name: value})
        told = dict(zip(TOLD, tensors["states"].flatten().tolist(), strict=False))
        assert told["cyclic" if name == "order" else name] == named[name].index(value)
        assert (told["apart"], told["x0_scale"], told["state_scale"]) == (0, 0, 0)
    for i, activation in enumerate(ACTIVATIONS):
        family = face.family(activation=activation)
        kernel = next(j for j, k in enumerate(face.kernels()) if (k["op"], k["family"]) == ("mlp", family))
        face.forward(**{**arguments, "kernel": kernel, "activation": activation})
        assert tensors["states"].flatten()[TOLD.index("activation")] == i


def test_no_rows_launch_nothing(face, given, monkeypatch):
    monkeypatch.setenv("FAKE", "driver")
    none = dict.fromkeys(("h", "x0", "out", "states"), (0, 0))
    face.forward(**{**given[0], "rows": 0, **none})
    face.forward(**{**given[0], "rows": 0, **dict.fromkeys(given[1])})


class Incomparable:
    def __eq__(self, other):
        raise ArithmeticError("as arrays do")


WRONG = {
    "kernel": [-1, 1 << 20, 1 << 70, None, "mlp"],
    "device": [-1, 0.5, 1 << 31],
    "stream": [-1, None],
    "rows": [-1, 6, 1 << 62, 7.0],
    "features": [0, -10, 11, 65],
    "hidden": [0, -1, 1 << 30, 1000],
    "iterations": [0, 1, 5, -4],
    "first": [-1, 4, None],
    "sets": [0, -1, 5, 1],
    "order": ["random", 1, None, Incomparable()],
    "norm": ["batchnorm", None],
    "norm_float32": [1, None],
    "activation": ["mish", "gelu", 1, ["relu"]],
    "negative_slope": [float("nan"), "a", None, 1e300],
    "eps": [-1e-5, float("inf"), None],
    "h": [None, (0, 70), (64, 69), (65, 70), (-64, 70), (1 << 63, 70), 64, (64,), (64, 70, 1), [64, 70], ("a", 70), (64, 70.0)],
    "x0": [(64, 71), (65, 70), (0, 70)],
    "out": [None, (0, 70)],
    "states": [(64, 279), (64, 350), (66, 280)],
    "coefficients": [None, (64, 19), (64, 25)],
    "state_scale": [(64, 3)],
    "x0_scale": [(64, 1)],
    "table": [None, (64, 15), (68, 16)],
    "packed": [None, (128, 0), (192, 1 << 30)],
}


# A wrong size is told where it meets the first argument that has another.
NUMBERS = {"rows", "features", "hidden", "iterations", "sets"}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_raise_and_name_themselves(face, given, name):
    arguments, _ = given
    assert WRONG.keys() == arguments.keys()
    named = f"{name}|h|first|states|coefficients|table|packed|sets" if name in NUMBERS else name
    for value in [*WRONG[name], *([len(face.kernels())] if name == "kernel" else [])]:
        with pytest.raises((TypeError, ValueError), match=rf"^({named}): expected .*, got .") as error:
            face.forward(**{**arguments, name: value})
        said = str(error.value)
        if said.startswith(f"{name}:"):
            came = [value, *value] if isinstance(value, tuple) else [value]
            assert any(f", got {it!r}" in said for it in came), said
    with pytest.raises(TypeError, match=f"^{name}: the argument is missing"):
        face.forward(**{key: value for key, value in arguments.items() if key != name})


def test_unknown_arguments_raise(face, given):
    arguments, _ = given
    with pytest.raises(TypeError, match=r"^shape: there is no such argument"):
        face.forward(**arguments, shape=3)
    with pytest.raises(TypeError):
        face.forward(3)
    with pytest.raises(ValueError, match=r"^sets: expected an integer from 1"):
        face.packed_bytes(kernel=arguments["kernel"], features=10, hidden=20, sets=0)
    with pytest.raises(ValueError, match=r"^activation: expected one of 'identity', .*, got 'mish'"):
        face.family(activation="mish")


def test_a_driver_that_is_not_there_is_an_error(face, given, monkeypatch):
    monkeypatch.setenv("FAKE", "driver")
    with pytest.raises(RuntimeError, match=r"^CUDA: no driver$"):
        face.forward(**given[0])
    monkeypatch.delenv("FAKE")
    with pytest.raises(RuntimeError, match=r"^CUDA: some error$"):
        face.forward(**{**given[0], "device": 10})


@pytest.mark.parametrize("what", ["pack", "launch"])
def test_failure_case_33_no_kernel_image_names_what_is_built_and_what_is_wanted(face, given, monkeypatch, what):
    monkeypatch.setenv("FAKE", what)
    with pytest.raises(RuntimeError, match=r"device 1 wants sm_75, .* of sm_80, .* built is sm_80 compute_80; TORCH_CUDA_ARCH"):
        face.forward(**given[0])


# The backward pass

TOLD_BACKWARD = [
    "device", "multiprocessors", "stream", "rows", "features", "hidden", "iterations", "sets", "cyclic", "norm", "activation",
    "negative_slope", "eps", "first", "states_rows", "grad_rows", "states", "grad_states", "grad_out", "x0", "coefficient",
    "x0_scale", "state_scale", "same_packed", "table",
]  # fmt: skip


@pytest.fixture
def reversed_given(face, given):
    """Arguments that are right, for the backward kernel of mlp, and the tensors that they point to."""
    forward, shared = given
    kernel = next(i for i, k in enumerate(face.kernels()) if (k["op"], k["direction"]) == ("mlp", "backward"))
    rows, features, hidden, iterations, first = (forward[n] for n in ("rows", "features", "hidden", "iterations", "first"))
    width = 2 * features + 3 * hidden
    tensors = {
        "states": torch.full(((iterations - first) * 9 * features,), 5.0),
        "grad_states": torch.full(((iterations + 1) * 8 * features,), 6.0),
        **{name: torch.full((rows, features), i, dtype=torch.int16) for i, name in enumerate(("grad_out", "grad_h"), 7)},
        "grad_x0": torch.zeros(rows, features),
        "scalars": torch.zeros(iterations - first, 7, rows),
        "ring": torch.zeros((iterations - first) * rows * width, dtype=torch.int16),
    }
    pointers = {name: passed(tensor) for name, tensor in tensors.items()}
    own = {"kernel": kernel, "states_rows": 9, "grad_rows": 8, "blocks": 3, "partials": None, **pointers}
    shared["x0"].view(torch.int16).fill_(9)
    return {**{name: x for name, x in forward.items() if name not in ("h", "out")}, **own}, {**shared, **tensors}


def test_what_the_backward_kernels_are_given(face, reversed_given):
    arguments, tensors = reversed_given
    assert [k["direction"] for k in face.kernels()] == ["forward"] * 8 + ["backward"] * 3
    face.backward(**arguments)
    assert dict(zip(TOLD_BACKWARD, tensors["scalars"].flatten().tolist(), strict=False)) == {
        "device": 1, "multiprocessors": 101, "stream": 0, "rows": 7, "features": 10, "hidden": 20, "iterations": 4, "sets": 2,
        "cyclic": 1, "norm": 2, "activation": 1, "negative_slope": -0.5, "eps": 0.125, "first": 1, "states_rows": 9,
        "grad_rows": 8, "states": 5, "grad_states": 6, "grad_out": 7, "x0": 9, "coefficient": 1, "x0_scale": 0.5,
        "state_scale": 0.25, "same_packed": 1, "table": 3,
    }  # fmt: skip
    assert [tensors[name].flatten()[0] for name in ("grad_h", "grad_x0", "ring")] == [1, 2, 3]
    # Without what is optional.
    for name in ("grad_h", "grad_x0", "ring", "scalars"):
        tensors[name].zero_()
    optional = ("grad_states", "grad_x0", "ring", "scalars", "x0", "x0_scale", "state_scale")
    face.backward(**{**arguments, **dict.fromkeys(optional)})
    assert [tensors[name].flatten()[0] for name in ("grad_h", "grad_x0", "ring", "scalars")] == [1, 0, 0, 0]


def test_a_kernel_is_for_its_pass(face, given):
    backward = next(i for i, k in enumerate(face.kernels()) if k["direction"] == "backward")
    with pytest.raises(ValueError, match=r"^kernel: "):
        face.forward(**{**given[0], "kernel": backward})


def test_backward_of_no_rows_launches_nothing(face, reversed_given, monkeypatch):
    monkeypatch.setenv("FAKE", "driver")
    face.backward(
        **{**reversed_given[0], "rows": 0, **dict.fromkeys(name for name in reversed_given[1] if name not in ("h", "out"))}
    )


def test_a_ring_has_the_width_of_its_op(face, reversed_given):
    arguments, _ = reversed_given
    linear = next(i for i, k in enumerate(face.kernels()) if (k["op"], k["direction"]) == ("linear", "backward"))
    for kernel, hidden, width in ((arguments["kernel"], 20, 80), (linear, 10, 20)):
        given = {**arguments, "kernel": kernel, "hidden": hidden, "table": (arguments["table"][0], 16 if hidden == 20 else 8)}
        given["packed"] = (given["packed"][0], 1 << 20)
        address, needed = arguments["ring"][0], 3 * 7 * width
        face.backward(**{**given, "ring": (address, needed)})
        with pytest.raises(ValueError, match=f"^ring: expected .* at least {needed} elements"):
            face.backward(**{**given, "ring": (address, needed - 1)})


def test_what_accumulates_has_partial_sums_and_no_ring(face, reversed_given):
    arguments, _ = reversed_given
    kernel = next(i for i, k in enumerate(face.kernels()) if k["accumulates"])
    size = 3 * 2 * 68 * 64
    partials = torch.zeros(size)
    given = {
        **arguments, "kernel": kernel, "hidden": 33, "sets": 1, "table": (arguments["table"][0], 8), "ring": None,
        "packed": (arguments["packed"][0], 1 << 20), "partials": passed(partials),
    }  # fmt: skip
    face.backward(**given)
    assert partials[0] == 3
    wrong = {
        "partials": [None, (64, size - 1), (68, size)], "ring": [arguments["ring"]], "blocks": [1, None], "hidden": [32, 65],
        "sets": [2],
    }  # fmt: skip
    for name, value in [(name, value) for name, values in wrong.items() for value in values]:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .*, got "):
            face.backward(**{**given, name: value})


OTHERS = ("h", "out", "states", "kernel")
WRONG_BACKWARD = {name: values for name, values in WRONG.items() if name not in OTHERS} | {
    "kernel": [-1, 0, 11, None],
    "states_rows": [6, -1, 1 << 62, None],
    "grad_rows": [6, 0, 1 << 62, None],
    "states": [None, (64, 249), (66, 270)],
    "grad_out": [None, (0, 70), (64, 71)],
    "grad_states": [(64, 389), (66, 400)],
    "grad_h": [None, (64, 69), (65, 70)],
    "grad_x0": [(64, 69), (66, 70)],
    "scalars": [(64, 146), (64, 148), (66, 147)],
    "ring": [(64, 1679), (65, 1680)],
    "blocks": [-1, None],
    "partials": [(64, 3 * 2 * 68 * 64), (64, 1)],
}


@pytest.mark.parametrize("name", WRONG_BACKWARD)
def test_wrong_arguments_of_backward_raise_and_name_themselves(face, reversed_given, name):
    arguments, _ = reversed_given
    assert WRONG_BACKWARD.keys() == arguments.keys()
    for value in WRONG_BACKWARD[name]:
        named = f"{name}|first|states_rows|states|grad_out|coefficients|ring|table|packed|sets" if name in NUMBERS else name
        with pytest.raises((TypeError, ValueError), match=rf"^({named}): expected .*, got ."):
            face.backward(**{**arguments, name: value})
    with pytest.raises(TypeError, match=f"^{name}: the argument is missing"):
        face.backward(**{key: value for key, value in arguments.items() if key != name})


def test_grad_x0_needs_x0(face, reversed_given):
    with pytest.raises(ValueError, match=r"^grad_x0: expected None where x0 is None, got a tensor"):
        face.backward(**{**reversed_given[0], "x0": None})
