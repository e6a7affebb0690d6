"""Models on disk: `config.json`, `model.safetensors` and the tokenizer in one folder. No pickle is ever read.

A run folder also holds `state/step-N/`, checkpoints of training that count only once their marker file exists; what is
in them beside the weights is the trainer's affair (`sa_lens.training`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens import HookedTransformerConfig
from transformers import AutoTokenizer

from sa_lens.config import GateConfig, from_dict, to_dict
from sa_lens.core.model import SelfAblatingTransformer
from sa_lens.data.writing import atomic_write, staged_folder

FORMAT = "sa_lens"
VERSION = 1
CONFIG, WEIGHTS, MARKER = "config.json", "model.safetensors", "complete"

_NOT_SAVED = ("device", "dtype", "seed", "tokenizer_name", "init_weights", "n_devices", "model_name", "n_params")
"""Fields of HookedTransformerConfig that belong to a process, or are written in another way."""


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors as safetensors.

    Raises:
        OSError: a full disk or a folder that cannot be written.
    """
    try:
        save_file(dict(weights), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def weights_of(model: SelfAblatingTransformer) -> dict[str, Tensor]:
    """The model's parameters by name, contiguous on the CPU; a tied unembedding is not among them."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}


def describe(model: SelfAblatingTransformer) -> dict[str, Any]:
    """What `config.json` holds: everything needed to rebuild the model without its weights."""
    cfg = {
        f.name: getattr(model.cfg, f.name)
        for f in dataclasses.fields(model.cfg)
        if f.name not in _NOT_SAVED and _is_plain(getattr(model.cfg, f.name))
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "qkv_bias": model.qkv_bias,
        "unembed_bias": model.unembed_bias,
        "tokenizer": model.tokenizer is not None,
        "gates": to_dict(model.gates),
        "model": cfg,
    }


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list)


def save(model: SelfAblatingTransformer, folder: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Writes the model into a folder: tokenizer, `model.safetensors` and `config.json`, all of them or none.

    A new folder appears under its name only when complete. Other files of an existing folder are left alone.

    Args:
        extra: further entries of `config.json`, such as the training run's configuration.

    Raises:
        ValueError: a bias that the model does not have is not zero.
        NotADirectoryError: the folder's name is a file.
        OSError: a full disk or a folder that cannot be written; what was there before is still there.
    """
    for name in model.zero_biases:
        if bool(model.get_parameter(name).any()):
            raise ValueError(f"{name} is not zero, but this model has no such bias: set it to zero before saving")
    folder = Path(folder)
    with staged_folder(folder, last=CONFIG) as temporary:
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, temporary)
        write_weights(weights_of(model), temporary / WEIGHTS)
        config = {**describe(model), **(extra or {})}
        (temporary / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes the tokenizer as a Hugging Face folder's files, each whole or not at all.

    Raises:
        OSError: a full disk or a folder that cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            tokenizer.save_pretrained(scratch)
        except Exception as error:
            # the tokenizers library reports a failed write as a bare Exception
            if type(error) is not Exception:
                raise
            raise OSError(f"cannot write the tokenizer: {error}") from error
        for file in Path(scratch).iterdir():
            if file.is_file():
                atomic_write(folder / file.name, file.read_bytes())


def load(
    name: str | Path, *, which: Literal["best", "last"] = "best", device: str | torch.device | None = None
) -> SelfAblatingTransformer:
    """Loads a model from a run folder or the Hub; see `SelfAblatingTransformer.from_pretrained`."""
    if which not in ("best", "last"):
        raise ValueError(f"which={which!r} must be 'best' or 'last'")
    folder = _folder(name)
    config = read_config(folder)
    weights = folder / WEIGHTS
    if which == "last":
        steps = complete_steps(folder)
        if not steps:
            raise FileNotFoundError(f"{folder} has no complete checkpoint under state/: use which='best'")
        weights = steps[-1] / WEIGHTS
    model = build(config, folder, device=device)
    load_weights(model, weights)
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model folder's `config.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, of another program, or of a later version.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}: it is not a model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by sa_lens. A Hugging Face model goes through TransformerLens first: "
            "SelfAblatingTransformer.from_hooked(HookedTransformer.from_pretrained(name), GateConfig(...))"
        )
    version = config.get("version")
    if not isinstance(version, int):
        raise ValueError(f"{path} is damaged: its version is {version!r}")
    if version > VERSION:
        raise ValueError(f"{path} has version {version}, this sa_lens reads up to {VERSION}: upgrade sa_lens")
    missing = [key for key in ("dtype", "qkv_bias", "unembed_bias", "gates", "model") if key not in config]
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {missing[0]!r}")
    return config


def build(
    config: Mapping[str, Any], folder: Path | None = None, *, device: str | torch.device | None = None
) -> SelfAblatingTransformer:
    """The model that a `config.json` describes, with weights still to be loaded, and its tokenizer if there is one.

    Raises:
        ValueError: a description that makes no model.
    """
    known = {f.name for f in dataclasses.fields(HookedTransformerConfig)}
    dtype = getattr(torch, str(config["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{CONFIG} is damaged: dtype {config['dtype']!r} is unknown")
    try:
        cfg = HookedTransformerConfig(
            **{key: value for key, value in config["model"].items() if key in known},
            dtype=dtype,
            init_weights=False,
            device=None if device is None else str(device),
        )
    except (TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{CONFIG} is damaged: its model is not a HookedTransformer's ({error})") from error
    gates = from_dict(GateConfig, config["gates"], where="gates.")
    model = SelfAblatingTransformer(cfg, gates)
    model.qkv_bias, model.unembed_bias = config["qkv_bias"], config["unembed_bias"]
    with torch.no_grad():
        for name in model.zero_biases:
            model.get_parameter(name).zero_()
    model.freeze_unused_biases()
    if folder is not None and config.get("tokenizer") and (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model.set_tokenizer(tokenizer)
    return model


def load_weights(model: SelfAblatingTransformer, path: Path) -> None:
    """Loads a `model.safetensors` into the model it belongs to.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or weights of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the model's weights are missing")
    try:
        weights = load_file(path, device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))[0]
        raise ValueError(
            f"{path} does not fit this model: {odd} has shape {found.get(odd)}, expected {expected.get(odd)}"
        )
    model.load_state_dict(weights, strict=False)


def complete_steps(run: str | Path) -> list[Path]:
    """Folders of a run's complete training checkpoints, oldest first."""
    steps = [
        (int(match.group(1)), folder)
        for folder in (Path(run) / "state").glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", folder.name)) and (folder / MARKER).is_file()
    ]
    return [folder for _, folder in sorted(steps)]


def _folder(name: str | Path) -> Path:
    """The local folder of a model: itself, or a snapshot of the Hub's."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{path} is a file, not a model folder: give the folder that holds {CONFIG}")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        raise FileNotFoundError(f"no folder {str(name)!r}: give a run folder, or a Hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from sa_lens.data.hub import HubUnreachable, require_hub

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        require_hub(
            f"model {str(name)!r}, no local folder but a Hub id,",
            instead="check the path, or download the model's files into a folder and pass that folder",
        )
    except HubUnreachable:
        try:
            return Path(snapshot_download(str(name), allow_patterns=wanted, local_files_only=True))
        except LocalEntryNotFoundError:
            pass
        raise
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted))
    except HfHubHTTPError as error:
        raise ValueError(
            f"no local folder {str(name)!r}, and the Hub has no such model that you may read: {error}"
        ) from error


def refuse_transformer_lens_arguments(name: str | Path, unknown: Mapping[str, Any]) -> None:
    """Refuses what `HookedTransformer.from_pretrained` takes and this loader does not.

    Raises:
        ValueError: with the way to the same end.
    """
    way = (
        "load it with HookedTransformer.from_pretrained(...), then "
        "SelfAblatingTransformer.from_hooked(model, GateConfig())"
    )
    if "dtype" in unknown and Path(name).exists():
        raise ValueError(
            "from_pretrained loads a model in the dtype that it was saved in, so dtype is no argument; change it "
            f"afterwards: SelfAblatingTransformer.from_pretrained({str(name)!r}).to({unknown['dtype']})"
        )
    if unknown:
        raise ValueError(
            f"from_pretrained has no argument {next(iter(unknown))!r}; it loads sa_lens's own models as they are. "
            f"For a TransformerLens model {way}"
        )
    if not Path(name).exists() and _is_transformer_lens_name(str(name)):
        raise ValueError(f"{str(name)!r} is a model of TransformerLens, without gates: {way}")


def _is_transformer_lens_name(name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens.loading_from_pretrained import get_official_model_name

        try:
            get_official_model_name(name)
        except ValueError:
            return False
    return True
