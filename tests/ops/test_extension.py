import errno
import fcntl
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_querydet import cli
from hf_querydet.ops import extension

ROOT = Path(__file__).parents[2]
RUN_OPERATOR = """
import torch
from hf_querydet.ops import extension, ms_deform_attn
output = ms_deform_attn(torch.ones(1, 6, 1, 4), [(2, 3)], torch.full((1, 1, 1, 1, 1, 2), 0.5),
                        torch.ones(1, 1, 1, 1, 1))
assert output.tolist() == [[[1.0] * 4]], output
print(extension.state_of("cpu").status)
"""
# Stands in for a compiler: copies a finished library, and counts how often it links.
FAKE_COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo "fake compiler 1.0" && exit 0
echo "$@" >> "{directory}/calls"
while [ $# -gt 0 ]; do
  case "$1" in
    -o) output="$2" ;;
    -MF) depfile="$2" ;;
  esac
  shift
done
{command}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache and default settings."""
    monkeypatch.setenv("HF_QUERYDET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_QUERYDET_KERNELS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def untried(monkeypatch):
    """As in a process that has not called the operator yet."""
    monkeypatch.setattr(
        extension, "_states", {name: extension.KernelState() for name in extension.SOURCES}
    )


@pytest.fixture(scope="session")
def library():
    """The real library, from the user's cache or built now."""
    assert extension.load("cpu"), extension.state_of("cpu").reason
    return extension.state_of("cpu").library


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """Returns a function that installs a compiler which runs the given shell command."""

    def install(command):
        script = tmp_path / "c++"
        script.write_text(FAKE_COMPILER.format(directory=tmp_path, command=command))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return tmp_path / "calls"

    return install


def copy_of(library):
    """Shell command that makes the output of each compiler call."""
    return f'[ -n "$depfile" ] && echo "$output:" > "$depfile"; cp "{library}" "$output"'


def start(code=RUN_OPERATOR, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def num_links(calls):
    return sum("-shared" in call for call in calls.read_text().splitlines())


# ---- importing, building, loading ----------------------------------------------------------------


def test_import_compiles_nothing_and_says_nothing(cache):
    process = start(
        "import sys, hf_querydet, hf_querydet.ops\n"
        "from hf_querydet.ops import extension\n"
        "assert 'torch.utils.cpp_extension' not in sys.modules\n"
        "print(extension.state_of('cpu').status)"
    )
    assert process.communicate() == ("untried\n", "")
    assert not cache.exists()


def test_two_processes_that_start_together_build_once(library, fake_compiler, cache):
    calls = fake_compiler(f"sleep 1; {copy_of(library)}")
    results = [process.communicate() for process in [start(), start()]]
    assert [output for output, _ in results] == ["loaded\n", "loaded\n"], results
    assert num_links(calls) == 1
    assert sum("Compiling the deformable attention for cpu" in error for _, error in results) == 1
    (directory,) = cache.iterdir()
    assert sorted(path.name for path in directory.iterdir()) == [
        "_ms_deform_attn_cpu.so", "build.log", "lock",
    ]  # fmt: skip
    assert "fake" not in (directory / "build.log").read_text().splitlines()[0]


def test_cache_without_locks_gets_its_library_from_a_build_elsewhere(
    untried, library, fake_compiler, cache, monkeypatch
):
    """As on some network file systems; torch, too, locks the directory in which it builds."""
    lock = fcntl.flock

    def refuse_in_cache(file, operation):
        descriptor = file if isinstance(file, int) else file.fileno()
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(cache):
            raise OSError(errno.ENOLCK, "No locks available")
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", refuse_in_cache)
    fake_compiler(copy_of(library))
    assert extension.load("cpu"), extension.state_of("cpu").reason
    (directory,) = cache.iterdir()
    assert (directory / library.name).read_bytes() == library.read_bytes()
    assert not list(directory.glob("build-*"))


def test_only_old_left_overs_are_deleted(untried, library, fake_compiler):
    fake_compiler(copy_of(library))
    young, old = (extension.build_directory("cpu") / f"build-{name}" for name in ("young", "old"))
    for left_over, seconds in ((young, 3500), (old, 3700)):
        left_over.mkdir(parents=True)
        os.utime(left_over, (time.time() - seconds,) * 2)
    assert extension.load("cpu")
    assert young.is_dir(), "another machine may be building there"
    assert not old.exists()


def test_library_is_on_the_disk_before_it_has_its_name(
    untried, library, fake_compiler, monkeypatch
):
    steps = []
    replace = os.replace

    def note_fsync(descriptor):
        steps.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink()))

    def note_replace(source, target):
        steps.append(("replace", Path(source)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    fake_compiler(copy_of(library))
    assert extension.load("cpu"), extension.state_of("cpu").reason
    (fsync, fsynced), (_, replaced) = steps
    assert fsync == "fsync"
    assert fsynced == replaced


def test_broken_library_is_built_again(untried, library, fake_compiler):
    calls = fake_compiler(copy_of(library))
    broken = extension.build_directory("cpu") / library.name
    broken.parent.mkdir(parents=True)
    broken.touch()  # what a crash leaves of a file that had not reached the disk
    assert extension.load("cpu"), extension.state_of("cpu").reason
    assert broken.read_bytes() == library.read_bytes()
    assert num_links(calls) == 1


def test_killed_build_heals(library, fake_compiler, cache):
    calls = fake_compiler("sleep 60")
    process = start(start_new_session=True)
    while not calls.exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(cache.glob("*/build-*")), "the test must leave a build half-way"
    assert not list(cache.glob("*/*.so"))

    fake_compiler(copy_of(library))
    output, error = start().communicate()
    assert output == "loaded\n", error


def test_complete_build_is_loaded_from_a_cache_without_write_permission(
    library, cache, untried, monkeypatch
):
    directory = extension.build_directory("cpu")
    directory.mkdir(parents=True)
    (directory / library.name).write_bytes(library.read_bytes())
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(extension, "_build_lock", None)  # would fail if it were reached
    assert extension.load("cpu")
    assert loaded == [directory / library.name]


# ---- failures: fall back with one line, or raise -------------------------------------------------


def no_compiler(monkeypatch, fake_compiler):
    monkeypatch.setenv("CXX", "no-such-compiler")
    return "no C\\+\\+ compiler: no-such-compiler is not on the PATH; install g"


def no_ninja(monkeypatch, fake_compiler):
    fake_compiler("true")
    which = extension.shutil.which
    find_spec = extension.importlib.util.find_spec

    def hide(find):
        return lambda name, **options: None if name == "ninja" else find(name, **options)

    monkeypatch.setattr(extension.shutil, "which", hide(which))
    monkeypatch.setattr(extension.importlib.util, "find_spec", hide(find_spec))
    return "no ninja; pip install ninja"


def no_writable_cache(monkeypatch, fake_compiler):
    monkeypatch.setenv("HF_QUERYDET_CACHE", "/proc/nowhere")  # not writable even for root
    return "/proc/nowhere.*; set HF_QUERYDET_CACHE to a directory where"


def no_lock_file(monkeypatch, fake_compiler):
    (extension.build_directory("cpu") / "lock").mkdir(parents=True)
    return "Is a directory.*; set HF_QUERYDET_CACHE to a directory where"


def compiler_that_does_not_run(monkeypatch, fake_compiler):
    fake_compiler("true")
    Path(os.environ["CXX"]).write_text("#!/bin/sh\necho no cc1plus >&2; exit 7\n")
    return r"c\+\+ --version` ends with status 7; .* set CXX for another. It says: no cc1plus"


def broken_compiler(monkeypatch, fake_compiler):
    fake_compiler("echo kaputt >&2; exit 3")
    return "Error building extension"


def unlike_library(monkeypatch, fake_compiler):
    fake_compiler('[ -n "$depfile" ] && echo "$output:" > "$depfile"; echo junk > "$output"')
    return r"_ms_deform_attn_cpu\.so|Could not load this library"


def no_sources(monkeypatch, fake_compiler):
    monkeypatch.setattr(extension, "__file__", "/nowhere/hf_querydet/ops/extension.py")
    return "kernel sources are neither in /nowhere/hf_querydet/_csrc nor in /nowhere/csrc"


FAILURES = [
    no_compiler, no_ninja, no_writable_cache, no_lock_file, compiler_that_does_not_run,
    broken_compiler, unlike_library, no_sources,
]  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_failure_falls_back_with_one_line(failure, untried, monkeypatch, fake_compiler, caplog):
    message = failure(monkeypatch, fake_compiler)
    with caplog.at_level(logging.WARNING, logger="hf_querydet"):
        assert not extension.load("cpu")
        assert not extension.load("cpu")
    lines = [line for line in caplog.messages if "Compiling" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("No compiled deformable attention on cpu (")
    assert "\n" not in lines[0]
    assert re.search(message, lines[0])
    assert extension.state_of("cpu").status == "failed"


@pytest.mark.parametrize("failure", FAILURES)
def test_failure_is_an_error_under_require(
    failure, untried, monkeypatch, fake_compiler, caplog, library
):
    monkeypatch.setenv("HF_QUERYDET_KERNELS", "require")
    message = failure(monkeypatch, fake_compiler)
    for _ in range(2):  # remembered, and raised again
        with pytest.raises(RuntimeError, match=f"(?s)require, but the kernels for cpu.*{message}"):
            extension.load("cpu")
    assert not [line for line in caplog.messages if "No compiled" in line]


def test_compiler_output_is_in_the_error_and_the_log(untried, monkeypatch, fake_compiler, cache):
    monkeypatch.setenv("HF_QUERYDET_KERNELS", "require")
    broken_compiler(monkeypatch, fake_compiler)
    with pytest.raises(RuntimeError, match="kaputt"):
        extension.load("cpu")
    (log,) = cache.glob("*/build.log")
    assert "kaputt" in log.read_text()
    assert "the last build failed" in _describe_untried(monkeypatch)["reason"]


def test_compiler_output_is_in_the_error_where_the_disk_is_full(
    untried, monkeypatch, fake_compiler
):
    broken_compiler(monkeypatch, fake_compiler)
    log = extension.build_directory("cpu") / "build.log"
    log.parent.mkdir(parents=True)
    log.symlink_to("/dev/full")
    assert not extension.load("cpu")
    assert "kaputt" in extension.state_of("cpu").reason


def _describe_untried(monkeypatch):
    """As `hf-querydet kernels` sees it, in another process."""
    monkeypatch.setattr(extension, "_states", {"cpu": extension.KernelState()})
    return extension.describe("cpu")


def test_packaged_library_of_another_machine_is_left_aside(untried, tmp_path, monkeypatch, caplog):
    package = tmp_path / "hf_querydet"
    (package / "ops").mkdir(parents=True)
    (package / "_csrc").symlink_to(ROOT / "csrc")
    monkeypatch.setattr(extension, "__file__", str(package / "ops" / "extension.py"))
    own = package / f"{extension.packaged_library_name('cpu')}.so"
    own.touch()
    assert extension._packaged_library("cpu") == own
    monkeypatch.setattr(extension, "instruction_set", lambda: "x86_64 fpu sse")
    assert extension._packaged_library("cpu") is None
    (line,) = caplog.messages
    assert "built for another machine or torch version" in line


def test_packaged_library_for_several_gpus_is_taken_where_one_code_runs(
    untried, tmp_path, monkeypatch
):
    package = tmp_path / "hf_querydet"
    (package / "ops").mkdir(parents=True)
    (package / "_csrc").symlink_to(ROOT / "csrc")
    monkeypatch.setattr(extension, "__file__", str(package / "ops" / "extension.py"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    built = package / f"{extension.packaged_library_name('cuda')}.cpython-311-x86_64-linux-gnu.so"
    built.touch()
    assert "_sm_80_sm_90_" in built.name
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    for capability, library in (((9, 0), built), ((8, 6), built), ((7, 5), None)):
        monkeypatch.setattr(extension, "_gpu_capabilities", lambda gpu=capability: [gpu])
        assert extension._packaged_library("cuda") == library


# ---- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(extension, "instruction_set", lambda: "x86_64 fpu sse"),
        lambda patch: patch.setattr(extension.torch, "__version__", "2.99"),
        lambda patch: patch.setattr(extension, "COMMON_FLAGS", ("-O1",)),
        lambda patch: patch.setattr(extension, "_compiler_version", lambda device: "other 1.0"),
    ],
    ids=["CPU", "torch", "flags", "compiler"],
)
def test_every_circumstance_has_its_own_directory(change, untried, monkeypatch):
    before = extension.build_directory("cpu")
    change(monkeypatch)
    assert extension.build_directory("cpu") != before


def test_changed_source_has_its_own_key(tmp_path, monkeypatch):
    before = extension.build_key("cpu")
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(ROOT / "csrc")
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(extension, "source_directory", lambda: tmp_path)
    assert extension.build_key("cpu") == before
    with (tmp_path / "cpu" / "vectors.h").open("a") as file:
        file.write("\n")
    assert extension.build_key("cpu") != before


def test_gpu_codes_are_in_the_flags_and_the_key(monkeypatch):
    monkeypatch.setattr(extension, "_compiler_version", lambda device: "a compiler")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;8.0+PTX")
    assert extension.gpu_codes() == ("compute_80", "sm_80", "sm_90")
    flags = extension.compiler_flags("cuda")
    assert "-gencode=arch=compute_90,code=sm_90" in flags
    assert "-gencode=arch=compute_80,code=compute_80" in flags
    before = extension.build_key("cuda")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert extension.build_key("cuda") != before


def test_gpu_codes_are_named_as_torch_names_them(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    assert extension.gpu_codes() == ("compute_90", "sm_90")


@pytest.mark.parametrize(
    ("capability", "codes"),
    [
        ((9, 0), ("sm_90",)),
        ((12, 0), ("sm_120",)),
        ((12, 1), ("compute_120", "sm_120")),
        ((13, 0), ("compute_120", "sm_120")),
    ],
)
def test_gpu_that_is_newer_than_torch_gets_the_newest_code_of_torch(capability, codes, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(extension, "_gpu_capabilities", lambda: [capability])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90a", "sm_120"])
    assert extension.gpu_codes() == codes
    assert extension.covers(codes, capability)


@pytest.mark.parametrize(
    ("codes", "capability", "expected"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["compute_80"], (9, 0), True),
        (["compute_90"], (8, 9), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100"], (10, 3), True),
        (["sm_75", "sm_90"], (9, 0), True),
        ([], (9, 0), False),
    ],
)
def test_gpu_runs_code_of_its_major_version_and_older_ptx(codes, capability, expected):
    assert extension.covers(codes, capability) == expected


def test_list_without_the_gpu_that_is_there_is_a_failure(untried, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setattr(extension, "_gpu_capabilities", lambda: [(9, 0)])
    assert not extension.load("cuda")
    assert "makes code for sm_80, but a GPU here needs sm_90" in extension.state_of("cuda").reason


def test_compiler_may_be_started_by_another_program(monkeypatch):
    monkeypatch.setenv("CXX", "env c++")
    assert "env" not in extension._compiler_version("cpu").splitlines()[0]


@pytest.mark.parametrize("variable", ["HF_QUERYDET_CACHE", "XDG_CACHE_HOME"])
def test_empty_variable_names_no_cache(variable, monkeypatch):
    for name in ("HF_QUERYDET_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "")
    assert extension.cache_root() == Path.home() / ".cache" / "hf_querydet"


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_empty_variable_names_no_cuda_toolkit(variable, tmp_path, monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "")
    nvcc = tmp_path / "nvcc"
    nvcc.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert extension._nvcc() == str(nvcc)


# ---- modes and the command -----------------------------------------------------------------------


def test_off_uses_plain_pytorch_and_builds_nothing(untried, monkeypatch, cache):
    monkeypatch.setenv("HF_QUERYDET_KERNELS", "off")
    assert not extension.load("cpu")
    assert extension.state_of("cpu").status == "off"
    assert not cache.exists()


def test_unknown_mode_is_named(monkeypatch):
    monkeypatch.setenv("HF_QUERYDET_KERNELS", "always")
    with pytest.raises(ValueError, match="is 'always' but must be one of auto, require, off"):
        extension.load("cpu")


def test_other_devices_have_no_kernels():
    assert not extension.load("meta")


def run_command(*arguments):
    return CliRunner().invoke(cli.app, ["kernels", *arguments])


def test_command_tells_the_state_without_building(untried, cache):
    result = run_command()
    assert result.exit_code == 0
    for text in ("mode: auto", f"cache: {cache}", "status: untried", "-march=", "not built"):
        assert text in result.output
    assert not cache.exists()


def test_command_builds_and_cleans(library, untried, fake_compiler, cache):
    fake_compiler(copy_of(library))
    result = run_command("--build")
    assert result.exit_code == 0
    assert "status: loaded" in result.output
    (directory,) = cache.iterdir()
    assert f"library: {directory / library.name}" in result.output
    result = run_command("--clean")
    assert f"deleted: {directory}" in result.output
    assert not list(cache.iterdir())


def test_cleaning_leaves_what_is_no_build(cache):
    build = cache / "kernels-cuda-0123456789abcdef"
    others = [cache / "kernels-mine", cache / "kernels-cpu-0123456789abcdef-old", cache / "data"]
    for directory in (build, *others):
        directory.mkdir(parents=True)
    assert extension.clean() == [build]
    assert sorted(cache.iterdir()) == sorted(others)


def test_command_reports_why_a_build_failed(untried, monkeypatch, fake_compiler):
    no_compiler(monkeypatch, fake_compiler)
    result = run_command("--build")
    assert result.exit_code == 1
    assert "reason: no C++ compiler: no-such-compiler" in result.output


# ---- built together with the package -------------------------------------------------------------


def test_setup_builds_the_library_that_the_loader_looks_for(library, fake_compiler, tmp_path):
    fake_compiler(copy_of(library))
    environment = {**os.environ, "HF_QUERYDET_BUILD_EXT": "1", "CC": os.environ["CXX"]}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib"),
         "--build-temp", str(tmp_path / "temp")],
        cwd=ROOT, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    built = [path.name.split(".")[0] for path in (tmp_path / "lib" / "hf_querydet").iterdir()]
    assert extension.packaged_library_name("cpu") in built
