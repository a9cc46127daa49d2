"""Find, build and load the kernels in `csrc/`, once per process and device type.

Nothing happens at import. `load("cpu")` or `load("cuda")` takes, in this order, a library built
with the package (`HF_QUERYDET_BUILD_EXT=1 pip install --no-build-isolation .`), a library from the
cache, or a new build by torch's JIT compiler. A library's name carries a hash of sources, flags,
torch version and instruction set; a cached one also that of the compiler. So a home directory that
unlike machines share never yields a foreign binary. A library for GPUs that was built with the
package has its codes in its name (``sm_80_sm_90``), and is taken where they cover the GPUs there.

Builds run in a directory of their own and are moved into place when they are complete: a build
that was killed leaves nothing that could be loaded, and of several processes one builds while the
others wait. A library of the cache that does not load all the same is built again.

Environment:
    HF_QUERYDET_KERNELS: `auto` (default: fall back to plain PyTorch, with one log line), `require`
        (raise, with the compiler's output) or `off`.
    HF_QUERYDET_CACHE: Directory of the builds; by default `hf_querydet` in `XDG_CACHE_HOME` or
        `~/.cache`.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

logger = logging.getLogger(__name__)

MODES = ("auto", "require", "off")
SOURCES = {
    "cpu": ("ms_deform_attn.cpp", "cpu/ms_deform_attn_cpu.cpp"),
    "cuda": ("ms_deform_attn.cpp", "cuda/ms_deform_attn_cuda.cu"),
}
# Kernels use the stable ABI of the oldest torch that we support, 2.11.
COMMON_FLAGS = ("-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000")
# For ms_deform_attn.cpp where it is linked with CUDA kernels.
CUDA_HOST_FLAGS = (*COMMON_FLAGS, "-DUSE_CUDA", "-fvisibility=hidden")
LIBRARY_PREFIX = "_ms_deform_attn"
# A build that has been still for so long was killed.
LEFT_OVER_SECONDS = 3600.0


@dataclasses.dataclass
class KernelState:
    """What became of the kernels of one device type in this process.

    Args:
        status: `untried`, `off`, `loaded` or `failed`.
        library: The file that was loaded.
        reason: Why it failed, with the compiler's output.
        seconds: Time that loading took, a build included.
    """

    status: str = "untried"
    library: Path | None = None
    reason: str = ""
    seconds: float = 0.0


_states = {device_type: KernelState() for device_type in SOURCES}
_lock = threading.RLock()


def kernel_mode() -> str:
    """The value of HF_QUERYDET_KERNELS.

    Raises:
        ValueError: If it is none of `auto`, `require` and `off`.
    """
    mode = os.environ.get("HF_QUERYDET_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(
            f"HF_QUERYDET_KERNELS is {mode!r} but must be one of {', '.join(MODES)}; unset it for "
            "auto."
        )
    return mode


def load(device_type: str) -> bool:
    """Make the kernels of a device type available; build them if need be.

    Args:
        device_type: As in `torch.device.type`. Other types than `cpu` and `cuda` have no kernels.

    Returns:
        Whether `torch.ops.hf_querydet.ms_deform_attn` has a kernel for the device. The answer is
        remembered, failure included.

    Raises:
        RuntimeError: If there is none and HF_QUERYDET_KERNELS is `require`.
        ValueError: If HF_QUERYDET_KERNELS has an unknown value.
    """
    mode = kernel_mode()
    if mode == "off" or device_type not in SOURCES:
        return False
    state = _states[device_type]
    if state.status == "untried":
        with _lock:
            if state.status == "untried":
                _try_to_load(device_type, state, quiet=mode == "require")
    if state.status == "failed" and mode == "require":
        raise RuntimeError(
            f"HF_QUERYDET_KERNELS=require, but the kernels for {device_type} cannot be loaded: "
            f"{state.reason}"
        )
    return state.status == "loaded"


def state_of(device_type: str) -> KernelState:
    """What became of the kernels of `cpu` or `cuda` in this process, so far."""
    if kernel_mode() == "off":
        return KernelState("off", reason="HF_QUERYDET_KERNELS=off")
    return _states[device_type]


def cache_root() -> Path:
    """Directory that holds one directory per build."""
    # A variable that is empty counts as one that is not set.
    directory = os.environ.get("HF_QUERYDET_CACHE")
    if not directory:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hf_querydet"
    return Path(directory).expanduser()


def clean() -> list[Path]:
    """Delete all builds in the cache, and nothing else that lies there.

    Returns:
        The directories that were deleted. Libraries that a process has loaded go on working there.
    """
    if not cache_root().is_dir():
        return []
    # The user names the directory, and may keep other things in it.
    name = re.compile(f"kernels-({'|'.join(SOURCES)})-[0-9a-f]{{16}}")  # see build_directory
    paths = sorted(cache_root().iterdir())
    builds = [path for path in paths if name.fullmatch(path.name) and path.is_dir()]
    for build in builds:
        shutil.rmtree(build)
    return builds


def describe(device_type: str) -> dict[str, str]:
    """What is known about the kernels of a device type, without building them.

    Args:
        device_type: `cpu` or `cuda`.

    Returns:
        Short texts under `status`, `library`, `flags`, `directory` and, where something is wrong,
        `reason`.
    """
    state = state_of(device_type)
    facts = {"status": state.status, "flags": " ".join(compiler_flags(device_type))}
    if state.reason:
        facts["reason"] = state.reason
    try:
        directory = build_directory(device_type)
    # The same failures as in a build: no sources, no compiler, one that does not run, no home.
    except (OSError, RuntimeError) as error:
        facts.setdefault("reason", str(error))
        directory = None
    library = state.library or _packaged_library(device_type)
    if directory is not None:
        facts["directory"] = str(directory)
        library = library or directory / _library_file(device_type)
        log = directory / "build.log"
        if not library.is_file() and log.is_file():
            facts.setdefault("reason", f"the last build failed:\n{log.read_text()}")
    facts["library"] = str(library) if library is not None and library.is_file() else "not built"
    return facts


# ---- what a build depends on ---------------------------------------------------------------------


def source_directory() -> Path:
    """`csrc/`, in the installed package or beside it in a checkout.

    Raises:
        FileNotFoundError: If neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "_csrc", package.parent / "csrc"):
        if (directory / "ms_deform_attn.h").is_file():
            return directory
    raise FileNotFoundError(
        f"the kernel sources are neither in {package / '_csrc'} nor in {package.parent / 'csrc'}; "
        "install hf_querydet again"
    )


def instruction_set() -> str:
    """The CPU's features, by the system's names; code built for one set may fail on another."""
    names = {"x86_64": "flags", "aarch64": "Features"}
    name = names.get(platform.machine())
    cpuinfo = Path("/proc/cpuinfo")
    if name is not None and cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(name):
                return f"{platform.machine()} {line.partition(':')[2].strip()}"
    return f"{platform.machine()} {platform.processor()}"


def gpu_codes() -> tuple[str, ...]:
    """Codes to compile for: `sm_90` of a GPU, or `compute_90`, PTX for that one and later ones.

    Those of TORCH_CUDA_ARCH_LIST, as torch reads it ("8.0;9.0+PTX", "Hopper"), or of the GPUs here.
    A GPU that is newer than torch gets the newest code that torch itself has, and PTX of it.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        flags = _cpp_extension()._get_cuda_arch_flags()
        codes = [flag.rpartition("code=")[2] for flag in flags]
    else:
        codes = [code for capability in _gpu_capabilities() for code in _codes_for(capability)]
    return tuple(sorted(set(codes)))


def _codes_for(capability: tuple[int, int]) -> list[str]:
    """The GPU's own code, unless a compiler of torch's age may not know it."""
    number = 10 * capability[0] + capability[1]
    known = [
        int(code[3:]) for code in torch.cuda.get_arch_list() if re.fullmatch("sm_[0-9]+", code)
    ]
    newest = max(known, default=number)
    return [f"sm_{number}"] if number <= newest else [f"sm_{newest}", f"compute_{newest}"]


def covers(codes: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU can run one of these codes.

    Args:
        codes: Of :func:`gpu_codes`.
        capability: Of the GPU, (9, 0) for sm_90.
    """
    major, minor = capability
    for code in codes:
        kind, _, number = code.partition("_")
        if not number.isdigit():  # sm_90a runs on sm_90 only
            is_covered = int(number[:-1]) == 10 * major + minor
        elif kind == "sm":
            is_covered = int(number) // 10 == major and int(number) % 10 <= minor
        else:
            is_covered = int(number) <= 10 * major + minor
        if is_covered:
            return True
    return False


def _gpu_capabilities() -> list[tuple[int, int]]:
    """Of all GPUs here."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())]


def _cpp_extension() -> Any:
    # torch reports a missing GPU when this is imported; who builds for the CPU need not know.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension

    return cpp_extension


def compiler_flags(device_type: str) -> list[str]:
    """Flags of the C++ compiler, or of nvcc for `cuda`."""
    if device_type == "cuda":
        return [*_common_cuda_flags(), *_code_flags(gpu_codes())]
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    # 512: compilers prefer half the width, which costs more here than the lower clock gains.
    native = ["-march=native", "-mprefer-vector-width=512"] if is_x86 else ["-mcpu=native"]
    # The coordinate loop is vectorised only if comparisons may be taken out of order.
    return [*COMMON_FLAGS, *native, "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]


def _common_cuda_flags() -> list[str]:
    # USE_CUDA lets torch's stable headers declare the CUDA functions.
    return [*COMMON_FLAGS, "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden"]


def _code_flags(codes: Iterable[str]) -> list[str]:
    return [f"-gencode=arch={code.replace('sm_', 'compute_')},code={code}" for code in codes]


def _compiler_version(device_type: str) -> str:
    """What the compilers say of themselves; raises if one is missing or does not run."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")  # may be "ccache g++"
    path = shutil.which(compiler[0])
    if path is None:
        raise FileNotFoundError(
            f"no C++ compiler: {compiler[0]} is not on the PATH; install g++ or clang, or set CXX"
        )
    versions = [_output_of([path, *compiler[1:], "--version"], variable="CXX")]
    if device_type == "cuda":
        nvcc = _nvcc()
        if nvcc is None:
            raise FileNotFoundError(
                "no CUDA compiler: nvcc is neither in CUDA_HOME nor on the PATH; install the CUDA "
                "toolkit, or set CUDA_HOME"
            )
        versions.append(_output_of([nvcc, "--version"], variable="CUDA_HOME"))
    return "\n".join(versions)


def _output_of(command: list[str], *, variable: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(
            f"`{shlex.join(command)}` ends with status {result.returncode}; repair this compiler, "
            f"or set {variable} for another. It says: {(result.stderr or result.stdout).strip()}"
        )
    return result.stdout


def _nvcc() -> str | None:
    # A variable that is empty counts as one that is not set, as for torch.
    directory = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if directory:
        return shutil.which("nvcc", path=str(Path(directory) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def build_key(device_type: str) -> str:
    """Hash of all that a cached library depends on, 16 hexadecimal digits.

    Raises:
        FileNotFoundError: If there is no compiler or there are no sources.
        RuntimeError: If the compiler does not run.
    """
    return _hash(device_type, *compiler_flags(device_type), _compiler_version(device_type))


def _hash(device_type: str, *texts: str) -> str:
    """Of the sources, the machine, torch's version and other texts."""
    digest = hashlib.sha256()
    directory = source_directory()
    for path in sorted(directory.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            digest.update(path.relative_to(directory).as_posix().encode())
            digest.update(path.read_bytes())
    # A GPU library's architectures are in its flags; its host part is built without -march.
    machine = instruction_set() if device_type == "cpu" else platform.machine()
    for text in (*texts, torch.__version__, machine):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def packaged_library_name(device_type: str) -> str:
    """File name, without suffix, of a library that is built together with the package."""
    codes = gpu_codes() if device_type == "cuda" else ()
    return "_".join([LIBRARY_PREFIX, device_type, *codes, _packaged_key(device_type)])


def _packaged_key(device_type: str) -> str:
    """Hash in that name. The machine that runs the library need not have a compiler."""
    flags = _common_cuda_flags() if device_type == "cuda" else compiler_flags(device_type)
    return _hash(device_type, *flags)


def _library_file(device_type: str) -> str:
    return f"{LIBRARY_PREFIX}_{device_type}.so"


def build_directory(device_type: str) -> Path:
    """Directory of the cache for the kernels of this machine.

    Raises:
        FileNotFoundError: If there is no compiler or there are no sources.
        RuntimeError: If the compiler does not run.
    """
    return cache_root() / f"kernels-{device_type}-{build_key(device_type)}"


# ---- loading -------------------------------------------------------------------------------------


def _try_to_load(device_type: str, state: KernelState, *, quiet: bool) -> None:
    start = time.perf_counter()
    try:
        state.library = _packaged_library(device_type)
        if state.library is not None:
            torch.ops.load_library(state.library)
        else:
            if device_type == "cuda":
                _check_codes()
            state.library = _load_from_cache(device_type)
        state.status = "loaded"
    # Whatever goes wrong (compiler, linker, disk, permissions), plain PyTorch still works.
    except Exception as error:
        state.reason = str(error) or type(error).__name__
        state.status = "failed"
        if not quiet:
            logger.warning(
                "No compiled deformable attention on %s (%s). The slower PyTorch version is used; "
                "`hf-querydet kernels` tells more.",
                device_type,
                state.reason.splitlines()[0],
            )
    state.seconds = time.perf_counter() - start


def _check_codes() -> None:
    """Raise if TORCH_CUDA_ARCH_LIST leaves out a GPU that is here."""
    codes = gpu_codes()
    left_out = [f"sm_{a}{b}" for a, b in _gpu_capabilities() if not covers(codes, (a, b))]
    if left_out:
        raise RuntimeError(
            f"TORCH_CUDA_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST')!r} makes code for "
            f"{', '.join(codes)}, but a GPU here needs {left_out[0]}; add it, or unset the variable"
        )


def _packaged_library(device_type: str) -> Path | None:
    package = Path(__file__).resolve().parents[1]
    built = sorted(package.glob(f"{LIBRARY_PREFIX}_{device_type}_*"))
    key = _packaged_key(device_type) if built else ""
    gpus = _gpu_capabilities() if device_type == "cuda" else []
    for path in built:
        name = path.name.split(".")[0]
        codes = re.findall("(?:sm|compute)_[0-9]+[a-z]?(?=_)", name)
        if name.endswith(f"_{key}") and all(covers(codes, gpu) for gpu in gpus):
            return path
    if built:
        logger.warning(
            "The packaged kernels for %s were built for another machine or torch version and are "
            "left aside: %s.",
            device_type,
            built[0],
        )
    return None


def _load_from_cache(device_type: str) -> Path:
    """Load the library of this machine, which is built first if need be."""
    directory = build_directory(device_type)
    library = directory / _library_file(device_type)
    # Without the lock first: a complete library is never changed, and the cache may be read-only.
    if _loads(library):
        return library
    with _build_lock(directory) as has_locks:
        _delete_left_overs(directory)
        if not _loads(library):  # unless another process has built it in the meantime
            _build(device_type, directory, library, has_locks=has_locks)
    return library


def _loads(library: Path) -> bool:
    """Load a library; false where there is none, or one that is broken."""
    if not library.is_file():
        return False
    try:
        torch.ops.load_library(library)
    except OSError as error:
        logger.debug("%s; it is built again", error, exc_info=True)
        return False
    return True


def _delete_left_overs(directory: Path) -> None:
    """Of builds that were killed.

    Only old ones: machines may share the directory and not its locks, and one of them be building.
    """
    for path in directory.glob("build-*"):
        with contextlib.suppress(OSError):  # another process may be at it too
            if time.time() - path.stat().st_mtime > LEFT_OVER_SECONDS:
                shutil.rmtree(path)


@contextlib.contextmanager
def _build_lock(directory: Path) -> Iterator[bool]:
    """Let one process in; the system frees the lock when a process ends, in whatever way.

    Makes the directory. Yields whether files in it can be locked. Two builds at once are wasteful,
    but each has files of its own.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / "lock").open("w")
    except OSError as error:
        raise OSError(
            f"{error}; set HF_QUERYDET_CACHE to a directory where the kernels can be written"
        ) from error
    with file:
        yield _lock_file(file)


def _lock_file(file: IO[str]) -> bool:
    """Wait for the lock on a file; false where the file system has none."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.warning("Another process builds the deformable attention; waiting for it.")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        # Some network file systems know no locks. Unlocked builds are still correct.
        logger.debug("No lock in %s", file.name)
        return False
    return True


def _build(device_type: str, directory: Path, library: Path, *, has_locks: bool) -> None:
    """Compile, load, and move the library into place."""
    log = directory / "build.log"
    logger.warning(
        "Compiling the deformable attention for %s, once for this machine; log: %s",
        device_type,
        log,
    )
    # Beside the library, so that it is moved into place at once and never seen in part.
    staging = Path(tempfile.mkdtemp(prefix="build-", dir=directory))
    # torch takes a lock where it builds, and fails where the file system has none.
    workspace = staging if has_locks else Path(tempfile.mkdtemp(prefix="hf_querydet-"))
    try:
        built, report = _compile(device_type, workspace)
        complete = Path(shutil.move(built, staging / library.name))
        with complete.open("rb") as file:
            # Or a crash of the machine could leave half of it, which kills a process that loads it.
            os.fsync(file.fileno())
        os.replace(complete, library)
        _write_log(log, report)
    except Exception as error:
        _write_log(log, str(error))
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(workspace, ignore_errors=True)


def _write_log(log: Path, text: str) -> None:
    # A full disk must not hide what the compiler said, which is in the error as well.
    with contextlib.suppress(OSError):
        log.write_text(text)


def _compile(device_type: str, workspace: Path) -> tuple[Path, str]:
    """Compile in `workspace` and load; return the library and a report for the log."""
    flags = compiler_flags(device_type)
    start = time.perf_counter()
    with _ninja_on_path():
        _cpp_extension().load(
            name=f"{LIBRARY_PREFIX}_{device_type}",
            sources=[str(source_directory() / source) for source in SOURCES[device_type]],
            extra_cflags=flags if device_type == "cpu" else list(CUDA_HOST_FLAGS),
            extra_cuda_cflags=flags if device_type == "cuda" else None,
            extra_ldflags=_cudart_flags(workspace) if device_type == "cuda" else None,
            build_directory=str(workspace),
            with_cuda=device_type == "cuda",
            is_python_module=False,
        )
    seconds = time.perf_counter() - start
    commands = (workspace / "build.ninja").read_text()
    (built,) = workspace.glob(f"{LIBRARY_PREFIX}*.so")
    return built, f"Built in {seconds:.1f} s with torch {torch.__version__}.\n\n{commands}"


def _cudart_flags(workspace: Path) -> list[str]:
    """Let the linker find the CUDA runtime that torch has loaded.

    torch links with -lcudart, but a toolkit from pip or conda may bring no file of that name.
    """
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    loaded = [line.split()[-1] for line in maps.read_text().splitlines() if "libcudart.so" in line]
    if not loaded:
        return []
    (workspace / "libcudart.so").symlink_to(loaded[0])
    return ["-L."]  # where the linker runs; a path may have spaces


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Let torch find the ninja of this environment, which need not be activated."""
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        raise FileNotFoundError("no ninja; pip install ninja")
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, sysconfig.get_path("scripts")])
    try:
        yield
    finally:
        os.environ["PATH"] = before
