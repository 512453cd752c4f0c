"""The policy in a Hugging Face folder or under a Hub name: its configuration and its model, or one line that says what is wrong with it.

Rollout and learner both load it here, so that neither samples from weights that the other refuses.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from toolrl_ray.errors import UserError

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
INDEX = ".index.json"
WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")  # as transformers looks
COMPLETE = "give a complete model folder"


def load_config(path: str) -> Any:
    """The Hugging Face configuration in `path`. Raises UserError with one line."""
    from transformers import AutoConfig

    if not Path(path).is_dir() and not HUB_NAME.fullmatch(path):
        raise UserError(f"policy.path={path!r}: no such folder; give a Hugging Face model folder, a Hub name, or tiny")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(f"policy.path={path!r}: the folder has no config.json; give a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # whatever its reader trips over
        raise UserError(_not_loadable(path, error)) from None


def load_model(auto_class: Any, path: str, dtype: str, device: str | None = None) -> Any:
    """The model that auto_class makes of `path`, every dropout rate 0. Raises UserError with one line where there is no complete one.

    device: "meta" reads no more than the names and shapes of the weights.
    """
    import torch
    from transformers.utils import logging

    config = load_config(path)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)  # ratios are only right without dropout
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of unused weights; those that are missing or do not fit are an error here
    options = {"dtype": getattr(torch, dtype), "output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": device}
    try:
        model, info = auto_class.from_pretrained(path, config=config, **options)
    except Exception as error:  # as above; a damaged file of weights alone has half a dozen
        raise UserError(_not_loadable(path, error)) from None
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"policy.path={path!r}: {len(missing)} weights are missing, {missing[0]} among them; {COMPLETE}")
    if others := sorted(info["mismatched_keys"]):
        name, found, wanted = others[0]
        raise UserError(
            f"policy.path={path!r}: {len(others)} weights contradict config.json, {name} among them: its shape is {list(found)}, and "
            f"config.json says {list(wanted)}; {COMPLETE}"
        )
    return model


def check_weights(path: str) -> None:
    """The folder's weights are there, all of them, and none is cut off, as far as names, sizes and headers tell. Raises UserError with one
    line: vLLM would sample from what memory holds where a weight is missing."""
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForCausalLM

    files = _weight_files(Path(path))
    if not files:
        raise UserError(f"policy.path={path!r}: the folder has no weights ({WEIGHTS[0]}, or shards with their index); {COMPLETE}")
    for file in files:
        where = f"policy.path={path!r}: {file.name}"
        if not file.is_file():
            raise UserError(f"{where}, which its index names, is missing; {COMPLETE}")
        if file.stat().st_size == 0:
            raise UserError(f"{where} is empty; {COMPLETE}")
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "np"):  # reads and checks the header, which knows the file's length
                    pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{where} is damaged or cannot be read ({one_line(error)}); {COMPLETE}") from None
    if not hasattr(load_config(path), "quantization_config"):  # whose names are those of a package that may be vLLM's alone
        load_model(AutoModelForCausalLM, path, "float32", device="meta")


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers takes, the shards where it is an index; where it finds none, those that vLLM takes."""
    for path in (folder / name for name in WEIGHTS):
        if path.is_file() and not path.name.endswith(INDEX):
            return [path]
        if path.is_file():
            try:
                return [folder / name for name in sorted(set(json.loads(path.read_text())["weight_map"].values()))]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"policy.path={str(folder)!r}: {path.name} is damaged ({type(error).__name__}); {COMPLETE}") from None
    return sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))


def share_weights(folder: Path) -> None:
    """Gives weights just saved the mode of the JSON files beside them: safetensors lets their owner alone read them, whatever the umask."""
    for path in folder.glob("*.safetensors"):
        path.chmod(next(folder.glob("*.json")).stat().st_mode & 0o777)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _not_loadable(path: str, error: Exception) -> str:
    return f"policy.path={path!r} is not a model that transformers can load ({type(error).__name__}: {one_line(error)})"
