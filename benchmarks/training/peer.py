"""Loads the authors' model from a checkout of their VAN-Classification."""

import hashlib
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

from torch import nn

MODULE = "benchmarks_training_authors"  # the authors' models/van.py in sys.modules


def load(folder: Path) -> ModuleType:
    """Imports the authors' models/van.py without replacing our models of the same names in timm's registry.

    Raises:
        ValueError: there is no such file, or it can't be imported.
    """
    file = folder / "models" / "van.py"
    spec = importlib.util.spec_from_file_location(MODULE, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"--peer {folder}: it has no models/van.py; name a checkout of the authors' VAN-Classification")
    module = sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about timm's old module names, which the authors' code imports
        import timm.models.registry as registry

        register, registry.register_model = registry.register_model, lambda fn: fn
        try:
            spec.loader.exec_module(module)
        except (ImportError, SyntaxError) as error:
            raise ValueError(f"--peer {folder}: models/van.py can't be imported: {error}") from error
        finally:
            registry.register_model = register
    return module


def build(module: ModuleType, model_name: str, classes: int, drop_path: float) -> nn.Module:
    """Builds the authors' model of this name.

    Raises:
        ValueError: there is no such model.
    """
    function = getattr(module, model_name, None)
    if function is None:
        raise ValueError(f"--peer: {module.__file__} has no {model_name}")
    return function(num_classes=classes, drop_path_rate=drop_path)


def fingerprint(module: ModuleType) -> str:
    """Returns the SHA-256 of the module's file, as a checkout need not be a repository."""
    return hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
