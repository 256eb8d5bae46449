"""A GPU that computes nothing: shows the work of the host in a training step on a machine without a GPU (cuda.c).

    environment = idle_gpu.build(folder)                                   # for processes that shall see the GPU
    subprocess.run([sys.executable, "-m", …], env=os.environ | environment)

    gpu = idle_gpu.IdleGpu()                                               # in such a process
    gpu.watch(); …; gpu.kernels, gpu.stacks

Needs gcc and nm. DALI does not run on it, nor do several ranks: a collective returns the data of one rank.
"""

import ctypes
import re
import subprocess
import sysconfig
import traceback
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda.c")
FUNCTIONS = re.compile(r"(?:__cuda|cuda|cublas|cudnn|nccl|nvrtc|cu(?!dnn|blas|sparse|solver|rand|fft|file|pti)[A-Z])\w+")
LIBRARIES = ("libcuda.so.1", "libnvrtc.so.13")  # names by which PyTorch and Triton load it


def build(folder: Path) -> dict[str, str]:
    """Compiles the libraries into `folder`; returns the environment variables of a process that shall see the GPU."""
    packages = Path(sysconfig.get_path("platlib"))
    triton = packages / "triton" / "backends" / "nvidia"
    wanted = {*_undefined(*(packages / "torch" / "lib").glob("*.so")), *FUNCTIONS.findall((triton / "driver.c").read_text())}
    wanted |= {f"nvrtc{name}" for name in ("CreateProgram", "DestroyProgram", "CompileProgram", "AddNameExpression", "GetPTX", "GetCUBIN")}
    wanted |= {"nvrtcGetProgramLog"}
    written = set(re.findall(rf"\b({FUNCTIONS.pattern})\(", SOURCE.read_text()))
    others = folder / "others.c"
    others.write_text("".join(map(_successful, sorted(wanted - written))))
    version = (packages / "nvidia" / "cudnn" / "include" / "cudnn_version.h").read_text()
    major, minor, patch = (int(re.search(rf"CUDNN_{part} (\d+)", version)[1]) for part in ("MAJOR", "MINOR", "PATCHLEVEL"))  # type: ignore[index]
    for name in LIBRARIES:
        options = ["-shared", "-fPIC", "-O1", "-w", f"-I{triton / 'include'}", f"-DCUDNN={major * 10000 + minor * 100 + patch}"]
        subprocess.run(["gcc", *options, f"-Wl,-soname,{name}", "-o", folder / name, SOURCE, others, "-ldl", "-lpthread"], check=True)
    preloaded = ":".join(str(folder / name) for name in LIBRARIES)
    triton_compiles = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "triton")}
    return {"LD_PRELOAD": preloaded, "LD_LIBRARY_PATH": str(folder)} | triton_compiles


def _undefined(*libraries: Path) -> list[str]:
    """Returns the names of CUDA functions that the libraries use."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", *libraries], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1].partition("@")[0] for line in listed.splitlines() if line.startswith(" ")]
    return [symbol for symbol in symbols if FUNCTIONS.fullmatch(symbol)]


def _successful(name: str) -> str:
    body = "*made = calloc(1, 4096); " if "Create" in name else ""
    return f"extern void *calloc(unsigned long, unsigned long); int {name}(void **made) {{ {body}return 0; }}\n"


CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


class IdleGpu:
    """The GPU of this process.

    Attributes:
        kernels: launches since `watch`, by name; includes copies and graphs.
        stacks: waits of the host for the device since `watch`, by CUDA function and Python stack.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL(LIBRARIES[0])
        self._callbacks = CALLBACK(lambda name: self.kernels.update([name.decode()])), CALLBACK(self._waited)
        self.watch()

    def watch(self) -> None:
        """Starts counting from zero."""
        self.kernels, self.stacks = Counter[str](), Counter[str]()
        self._library.idle_watch(*self._callbacks)

    def rest(self) -> None:
        """Stops counting, which takes time."""
        self._library.idle_watch(None, None)

    def set_busy(self, is_busy: bool) -> None:
        """Sets whether events report launched work as unfinished; a wait ends at once all the same."""
        self._library.idle_busy(is_busy)

    def _waited(self, name: bytes) -> None:
        self.stacks.update([name.decode() + "\n" + "".join(traceback.format_stack()[:-1])])


def skip_trials() -> None:
    """Lets this process use kernels and graphs without comparing their results, as such a GPU computes none."""
    from pretrain.engine import fast_paths
    from pretrain.model.fast import cuda_graphs

    fast_paths._find_kernel_fault = lambda *_: None
    cuda_graphs._distance = lambda *_: 0.0
