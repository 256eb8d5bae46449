"""Loads the authors' model from a checkout of their VAN-Classification."""

import hashlib
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

from torch import nn

MODULE = "benchmarks_training_authors"  # their models/van.py in sys.modules


def load(folder: Path) -> ModuleType:
    """Imports their models/van.py. timm's registry keeps our models of the same names.

    Raises:
        ValueError: there is no such file, or it can't be imported.
    """
    file = folder / "models" / "van.py"
    spec = importlib.util.spec_from_file_location(MODULE, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"--peer {folder}: it has no models/van.py; name a checkout of the authors' VAN-Classification")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of timm's old module names, which their code imports
        import timm.models.registry as registry
    register = registry.register_model
    registry.register_model = lambda fn: fn
    module = sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"--peer {folder}: models/van.py can't be imported: {error}") from error
    finally:
        registry.register_model = register
    return module


def build(module: ModuleType, model_name: str, classes: int, drop_path: float) -> nn.Module:
    """Builds their model of that name.

    Raises:
        ValueError: there is no such function.
    """
    function = getattr(module, model_name, None)
    if function is None:
        raise ValueError(f"--peer: {module.__file__} has no {model_name}")
    return function(num_classes=classes, drop_path_rate=drop_path)


def fingerprint(module: ModuleType) -> str:
    """Returns the SHA-256 of the file, as a checkout need not be a repository."""
    return hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
