"""Saving and loading models: `config.json`, `model.safetensors` and the tokenizer in one folder, without pickle.

A key that `config.json` lacks is never filled with a default, so that a folder holds the same model in every version of
sa_lens. The key `version` names the format. This sa_lens reads version 1, the format of 0.1; files written during the
development of 0.1 are read if they are complete, and otherwise refused with the key that they lack.

A run folder also holds `state/step-N/`, checkpoints of training that count only once their marker file exists.
`sa_lens.training` writes what they hold beside the weights.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from sa_lens.catalogue import CONFIG, local_folder, shipped_folder
from sa_lens.config import GateConfig, Which, from_dict, to_dict
from sa_lens.core import architecture
from sa_lens.core.base import HookedTransformerConfig, official_name
from sa_lens.core.gate import Gate
from sa_lens.core.gated import GatedTransformer
from sa_lens.data.whole_files import DamagedFile, atomic_write, check_object, read_json, staged_folder

Model = TypeVar("Model", bound=GatedTransformer)

FORMAT = "sa_lens"
VERSION = 1
WEIGHTS, MARKER = "model.safetensors", "complete"

DTYPES = ("float32", "float64", "bfloat16", "float16")
REMEDY = "save the model again, or fetch its files again"

_NOT_SAVED = ("device", "dtype", "seed", "tokenizer_name", "init_weights", "n_devices", "model_name", "n_params")
"""Fields of HookedTransformerConfig that belong to a process or are stored elsewhere."""

_NAMES = """
NTK_by_parts_factor NTK_by_parts_high_freq_factor NTK_by_parts_low_freq_factor NTK_original_ctx_len act_fn
attention_dir attn_only attn_scale attn_scores_soft_cap attn_types checkpoint_index checkpoint_label_type
checkpoint_value d_head d_mlp d_model d_vocab d_vocab_out decoder_start_token_id default_prepend_bos eps
experts_per_token final_rms from_checkpoint gated_mlp init_mode initializer_range layer_norm_folding load_in_4bit
n_ctx n_heads n_key_value_heads n_layers norm_topk_prob normalization_type num_experts original_architecture
output_logits_soft_cap parallel_attn_mlp positional_embedding_type post_embedding_ln
relative_attention_max_distance relative_attention_num_buckets rotary_adjacent_pairs rotary_base rotary_base_local
rotary_dim rotary_scaling_factor scale_attn_by_inverse_layer_idx tie_word_embeddings tokenizer_prepends_bos
trust_remote_code ungroup_grouped_query_attention use_NTK_by_parts_rope use_attn_in use_attn_result use_attn_scale
use_hook_mlp_in use_hook_tokens use_local_attn use_normalization_before_and_after use_qk_norm use_split_qkv_input
use_yarn_rope uses_rms_norm window_size yarn_attention_factor yarn_beta_fast yarn_beta_slow yarn_factor
yarn_original_max_position_embeddings
"""
_MODEL_KEYS = frozenset(_NAMES.split())
"""Fields of HookedTransformerConfig that every file holds: those of the oldest TransformerLens that sa_lens runs on."""

_LATER_KEYS: dict[str, Any] = {
    "clip_qkv": None,
    "quantization_method": None,
    "train_seq_length": None,
    "use_attention_sinks": False,
    "use_dynamic_ntk_rope": False,
    "use_logn_attn": False,
    "yarn_global_attn_only": False,
    "yarn_truncate": True,
}
"""Fields that later releases of TransformerLens added, and the value that stands for what earlier ones do."""


@contextmanager
def name_failed_writes(path: Path) -> Iterator[None]:
    """Turns every failed write within the context into an OSError whose message contains `path`.

    Full disks come as errors without a name, and from safetensors and the tokenizers library as errors of their own.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    except OSError as error:
        if error.filename is not None or str(path) in str(error):
            raise
        if error.errno is None:
            raise OSError(f"cannot write {path}: {error}") from error
        raise type(error)(error.errno, f"{error.strerror}: cannot write {path}") from error


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors as safetensors.

    Raises:
        OSError: a full disk or a folder that cannot be written.
    """
    with name_failed_writes(path):
        save_file(dict(weights), path, metadata={"format": "pt"})


def weights_of(model: GatedTransformer) -> dict[str, Tensor]:
    """Returns the model's parameters by name, contiguous on the CPU, without a tied unembedding."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}


def describe(model: GatedTransformer) -> dict[str, Any]:
    """Returns the content of `config.json`: all that is needed to rebuild the model without its weights.

    Raises:
        ValueError: a field of the model's configuration that JSON cannot express.
    """
    cfg = architecture.actual_config(model)
    described = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name not in _NOT_SAVED}
    for name, value in described.items():
        if not (value is None or isinstance(value, bool | int | float | str | list | tuple)):
            raise ValueError(
                f"model.cfg.{name} is a {type(value).__name__}, which {CONFIG} cannot hold: set it to a number, a "
                "text, a list or None before saving"
            )
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "qkv_bias": model.qkv_bias,
        "unembed_bias": model.unembed_bias,
        "tokenizer": model.tokenizer is not None,
        "gates": to_dict(model.gates),
        "model": {**_LATER_KEYS, **described},
    }


def check_description(model: GatedTransformer, described: Mapping[str, Any]) -> None:
    """Checks that a model built from its description equals this one except for the weights.

    Raises:
        ValueError: the description is wrong about a parameter or a setting of a module.
    """

    def settings(module: torch.nn.Module) -> dict[str, Any]:
        # private ones are caches of TransformerLens and marks of FSDP
        plain = bool | int | float | GateConfig
        return {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, plain) and name != "training" and not name.startswith("_")
        }

    twin = build(type(model), described, device="meta")
    wanted = {name: (tuple(p.shape), p.dtype) for name, p in twin.named_parameters()}
    actual = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    for name, module in twin.named_modules():
        if isinstance(module, Gate) or name.endswith((".attn", ".ln1", ".ln2", "ln_final")):
            wanted[name], actual[name] = settings(module), settings(model.get_submodule(name))  # type: ignore[assignment]
    for name in sorted(wanted.keys() | actual.keys()):
        if wanted.get(name) != actual.get(name):
            raise ValueError(
                f"the model cannot be saved: by its cfg and gates {name} is {wanted.get(name)}, but it is "
                f"{actual.get(name)}; make them agree first"
            )


def save(model: GatedTransformer, folder: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Writes the model into a folder: tokenizer, `model.safetensors` and `config.json`, all of them or none.

    A new folder appears under its name only when complete. Other files of an existing folder are left alone.

    Args:
        extra: further entries of `config.json`, such as the training run's configuration.

    Raises:
        ValueError: a bias that the model does not have is not zero, a weight is not finite, or the configuration does
            not describe the model.
        NotADirectoryError: the folder's name is a file.
        OSError: a full disk or a folder that cannot be written; what was there before is still there.
    """
    for name in model.zero_biases:
        if bool(model.get_parameter(name).any()):
            raise ValueError(f"{name} is not zero, but this model has no such bias: set it to zero before saving")
    folder, weights, described = Path(folder), weights_of(model), describe(model)
    check_description(model, described)
    architecture.check_weights(weights, model.W_E.dtype, "the model cannot be saved")
    with name_failed_writes(folder), staged_folder(folder, last=CONFIG) as temporary:
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, temporary)
        write_weights(weights, temporary / WEIGHTS)
        text = json.dumps({**described, **(extra or {})}, indent=2, allow_nan=False)
        (temporary / CONFIG).write_text(text, encoding="utf-8")
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
    cls: type[Model],
    name: str | Path,
    *,
    which: Which = "best",
    device: str | torch.device | None = None,
) -> Model:
    """Loads a model from a run folder or the Hub; see `SelfAblatingTransformer.from_pretrained`."""
    if which not in get_args(Which):
        raise ValueError(f"which={which!r} must be 'best' or 'last'")
    folder = _folder(name)
    config = read_config(folder)
    path = folder / WEIGHTS
    if which == "last":
        steps = complete_steps(folder)
        if not steps:
            raise FileNotFoundError(f"{folder} has no complete checkpoint under state/: use which='best'")
        path = steps[-1] / WEIGHTS
    weights = _read_weights(path)
    layers = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if isinstance(n_layers := config["model"].get("n_layers"), int) and n_layers > layers:
        # checked before memory is taken for that many layers
        raise ValueError(f"{path} does not fit this model: it has {layers} layers, expected {n_layers}")
    model = build(cls, config, folder, device=device)
    _fill(model, weights, path, config.get("stored_dtype"))
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the `config.json` of a model folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, of another program, or of a later version.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}: it is not a model folder")
    config = read_json(path, remedy=REMEDY)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by sa_lens. Gates on a Hugging Face model: "
            f"SelfAblatingTransformer.from_hugging_face({str(folder)!r}, GateConfig(...)), or "
            f"sa-lens train --init {folder}"
        )
    version = config.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _damage_error(path, f"its version is {version!r}")
    if version > VERSION:
        raise ValueError(f"{path} has version {version}, this sa_lens reads up to {VERSION}: upgrade sa_lens")
    try:
        check_object(
            config,
            {"dtype": str, "qkv_bias": bool, "unembed_bias": bool, "tokenizer": bool, "gates": dict, "model": dict},
            {"stored_dtype": str},
            other_keys=True,
        )
        if (stored := config.get("stored_dtype", config["dtype"])) not in DTYPES:
            raise ValueError(f"stored_dtype {stored!r} is unknown, it must be one of {', '.join(DTYPES)}")
    except ValueError as error:
        raise _damage_error(path, error) from error
    return config


def _damage_error(path: Path, fault: object) -> DamagedFile:
    return DamagedFile(f"{path} is damaged: {fault}; {REMEDY}")


def build(
    cls: type[Model],
    config: Mapping[str, Any],
    folder: Path | None = None,
    *,
    device: str | torch.device | None = None,
) -> Model:
    """Builds the model that a `config.json` describes, without its weights, and loads its tokenizer if it has one.

    Raises:
        ValueError: no model can be built from the description, or the tokenizer is damaged.
    """
    if device is not None:
        # a missing device is not the file's fault
        torch.empty(0, device=device)
    try:
        model = _described_model(cls, config, device)
    except (ValueError, TypeError, AttributeError, KeyError, AssertionError, ArithmeticError, RuntimeError) as error:
        raise _damage_error(Path(CONFIG) if folder is None else folder / CONFIG, error) from error
    if folder is not None and config["tokenizer"]:
        model.set_tokenizer(_tokenizer_of(folder))
    return model


def _described_model(cls: type[Model], config: Mapping[str, Any], device: str | torch.device | None) -> Model:
    if config["dtype"] not in DTYPES:
        raise ValueError(f"dtype {config['dtype']!r} is unknown, it must be one of {', '.join(DTYPES)}")
    cfg = HookedTransformerConfig(
        **_checked_shape(config["model"]),
        dtype=getattr(torch, config["dtype"]),
        init_weights=False,
        device=None if device is None else str(device),
    )
    gates = from_dict(GateConfig, config["gates"], where="gates.")
    # files that are older than low-rank gates do not name the rank
    lacking = [name for name in to_dict(gates) if name not in config["gates"] and name != "rank"]
    if lacking:
        raise ValueError(f"gates lacks {lacking[0]!r}")
    model = cls(cfg, gates)
    model.qkv_bias, model.unembed_bias = config["qkv_bias"], config["unembed_bias"]
    with torch.no_grad():
        for name in model.zero_biases:
            model.get_parameter(name).zero_()
    model.freeze_unused_biases()
    return model


def _checked_shape(shape: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a HookedTransformerConfig from a file after checks of their names and types.

    Raises:
        ValueError: a field is missing or wrong; the message names the first one.
    """
    hints = {**typing.get_type_hints(HookedTransformerConfig), "act_fn": str | None}
    shape = {key: value for key, value in shape.items() if key in hints or _LATER_KEYS.get(key, _UNKNOWN) != value}
    required = {key: hints.get(key, object) for key in _MODEL_KEYS | (_LATER_KEYS.keys() & hints.keys())}
    later = {key: hint for key, hint in hints.items() if key not in required and key not in _NOT_SAVED}
    check_object(shape, required, later, where="model.")
    limits = {
        "a whole number above 0": [
            *("d_model", "d_head", "d_vocab", "d_vocab_out", "n_layers", "n_heads", "n_ctx"),
            *(key for key in ("d_mlp", "n_key_value_heads", "rotary_dim", "window_size") if shape[key] is not None),
        ],
        # -1 stands for no scale
        "above 0": ["rotary_base", *(["attn_scale"] if shape["use_attn_scale"] or shape["attn_scale"] != -1 else [])],
    }
    for limit, names in limits.items():
        for name in names:
            if not shape[name] > 0:
                raise ValueError(f"model.{name}={shape[name]} must be {limit}")
    if shape["eps"] < 0:
        raise ValueError(f"model.eps={shape['eps']} must be 0 or above")
    return shape


_UNKNOWN = object()
"""Stands for a field that this module does not know."""


def _tokenizer_of(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{folder} lacks the tokenizer of its model (tokenizer_config.json, ...): {REMEDY}")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # the tokenizers library reports a damaged file as a bare Exception
        raise DamagedFile(f"the tokenizer in {folder} is damaged: {error}; {REMEDY}") from error


def load_weights(model: GatedTransformer, path: Path) -> None:
    """Loads a `model.safetensors` into the model to which it belongs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, weights of another model or type, or weights that are not finite.
    """
    _fill(model, _read_weights(path), path)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the model's weights are missing")
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise _damage_error(path, error) from error


def _fill(model: GatedTransformer, weights: dict[str, Tensor], path: Path, stored_dtype: str | None = None) -> None:
    """Fills a model with weights of its own type, or of the narrower type in which they are stored."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != given:
        odd = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))[0]
        raise ValueError(
            f"{path} does not fit this model: {odd} has shape {given.get(odd)}, expected {expected.get(odd)}"
        )
    dtype = model.W_E.dtype if stored_dtype is None else getattr(torch, stored_dtype)
    architecture.check_weights(weights, dtype, f"{path} cannot be loaded")
    model.load_state_dict(weights, strict=False)


def complete_steps(run: str | Path) -> list[Path]:
    """Returns the folders of a run's complete training checkpoints, oldest first."""
    steps = [
        (int(match.group(1)), folder)
        for folder in (Path(run) / "state").glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", folder.name)) and (folder / MARKER).is_file()
    ]
    return [folder for _, folder in sorted(steps)]


def _folder(name: str | Path) -> Path:
    """The local folder of a model: a shipped one's, itself, or a snapshot of the Hub's."""
    local = local_folder(name)
    if local is not None:
        return local
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
    """Refuses arguments of `HookedTransformer.from_pretrained` that this loader does not have.

    Raises:
        ValueError: an argument is not known here; the message says what to do instead.
    """
    way = (
        "load it with TransformerBridge.boot_transformers(...), then "
        "SelfAblatingTransformer.from_hooked(bridge, GateConfig())"
    )
    local = shipped_folder(name) is not None or Path(name).exists()
    if "dtype" in unknown and local:
        raise ValueError(
            "from_pretrained loads a model in the dtype that it was saved in, so dtype is no argument; change it "
            f"afterwards: SelfAblatingTransformer.from_pretrained({str(name)!r}).to({unknown['dtype']})"
        )
    if unknown:
        raise ValueError(
            f"from_pretrained has no argument {next(iter(unknown))!r}; it loads sa_lens's own models as they are. "
            f"For a TransformerLens model {way}"
        )
    if not local and official_name(str(name)) is not None:
        raise ValueError(f"{str(name)!r} is a model of TransformerLens, without gates: {way}")
