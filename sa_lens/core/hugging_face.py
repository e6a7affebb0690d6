"""A model of `transformers` on disk, a folder or a GGUF file, as a plain `HookedTransformer` with the same logits.

`read_files` says what a model is before its weights are read. `hooked_from_files` reads them: `transformers` loads the
model, TransformerLens wraps it as a bridge, and `bridge.py` makes a HookedTransformer of the bridge and compares the
logits of both. Nothing is fetched, and Python code that a folder brings is never run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sa_lens.core.base import HookedTransformer
from sa_lens.core.bridge import LONGEST, hooked_from_bridge
from sa_lens.data.tokenizers import files_of, is_gguf, load_tokenizer
from sa_lens.data.whole_files import read_json

ARCHITECTURES = (
    *("ArceeForCausalLM", "BloomForCausalLM", "CodeGenForCausalLM", "GemmaForCausalLM", "GPT2LMHeadModel"),
    *("GPTBigCodeForCausalLM", "GPTJForCausalLM", "GPTNeoForCausalLM", "GPTNeoXForCausalLM", "LlamaForCausalLM"),
    *("MistralForCausalLM", "OlmoForCausalLM", "OPTForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM"),
    *("Qwen2ForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM"),
)
"""Architectures of `transformers` whose models gates fit, as the tests show."""


_HOOKED_ONLY = {"BloomForCausalLM": "a LayerNorm on the embedding"}
"""Those that the fused path of the loss does not cover, with the reason that it gives for the loaded model."""


@dataclass(frozen=True)
class ModelFiles:
    """A model of `transformers` on disk, as its configuration describes it; weights are not read."""

    path: Path
    """The folder or GGUF file."""
    architecture: str
    """The class of `transformers`, such as `LlamaForCausalLM`."""
    stored: str
    """How the weights are stored: a type such as `bfloat16`, or `GGUF`."""
    parameters: int
    """Number of weights, tied ones once."""
    n_layers: int
    """Number of layers."""
    d_model: int
    """Width of the residual stream."""
    n_heads: int
    """Attention heads per layer."""
    d_head: int
    """Width of a head."""
    d_mlp: int
    """Neurons per layer."""
    d_vocab: int
    """Size of the vocabulary."""
    n_ctx: int | None
    """Longest sequence that the model takes; None where nothing limits it."""
    learned_positions: bool
    """Whether positions are learned, so that the context cannot be cut."""
    config: Any
    """The configuration of `transformers`."""

    @property
    def why_not_fused(self) -> str | None:
        """What the fused path of the loss does not cover of this model; None if it covers it."""
        if self.architecture in _HOOKED_ONLY:
            return _HOOKED_ONLY[self.architecture]
        settings = self.path / "tokenizer_config.json"
        if not (self.path.is_dir() and settings.is_file()):
            return None
        side = read_json(settings, remedy="fetch the model's files again").get("padding_side")
        return "a tokenizer that pads on the left" if side == "left" else None

    def context(self, wanted: int) -> int:
        """The context of the HookedTransformer, if sequences of `wanted` tokens are to be run.

        Raises:
            ValueError: the model does not take so long a sequence.
        """
        if self.n_ctx is not None and wanted > self.n_ctx:
            raise ValueError(
                f"n_ctx={wanted} is more than the {self.n_ctx} positions of {self.path}: it is the length of the "
                "sequences that are run, set it to that or less"
            )
        longest = max(LONGEST, wanted)
        return longest if self.n_ctx is None else self.n_ctx if self.learned_positions else min(self.n_ctx, longest)


def is_hugging_face(name: str | Path) -> bool:
    """Whether the path is a folder or GGUF file with a model of `transformers`."""
    path = Path(name)
    if is_gguf(path):
        return True
    if not (path / "config.json").is_file():
        return False
    try:
        config = read_json(path / "config.json", remedy="fetch the model's files again")
    except ValueError:
        return False
    return isinstance(config, dict) and "model_type" in config


def read_files(name: str | Path) -> ModelFiles:
    """What a model's files say about it, without its weights.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a damaged configuration, or a model that gates do not fit, with the reason and the way out.
    """
    path = Path(name)
    if not is_hugging_face(path):
        raise FileNotFoundError(
            f"{path} is neither a folder with the config.json of a model of transformers nor a .gguf file"
        )
    source = files_of(path)
    with _named(path):
        config = AutoConfig.from_pretrained(**source, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None and not is_gguf(path):
        raise ValueError(
            f"the weights in {path} are quantized ({config.quantization_config['quant_method']}): take a folder of the "
            "same model that is not"
        )
    empty = None
    if type(config) in AutoModelForCausalLM._model_mapping:
        with _named(path), torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    architecture = type(empty).__name__
    if empty is None or architecture not in ARCHITECTURES:
        given = architecture if empty is not None else f"model of type {config.model_type}, which is no language model"
        raise ValueError(
            f"the model in {path} is a {given}. Supported are "
            f"{', '.join(ARCHITECTURES)}. If you can make a HookedTransformer of it yourself, put gates on that with "
            "SelfAblatingTransformer.from_hooked(model, GateConfig(...)), save the result with save_pretrained(FOLDER) "
            "and start from that folder"
        )
    d_model, n_heads = config.hidden_size, config.num_attention_heads
    d_mlp = next(
        size
        for size in (
            *(getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner")),
            4 * d_model,
        )
        if size is not None
    )
    return ModelFiles(
        path=path,
        architecture=architecture,
        stored="GGUF" if is_gguf(path) else str(config.dtype or torch.float32).removeprefix("torch."),
        parameters=sum(p.numel() for p in empty.parameters()),
        n_layers=config.num_hidden_layers,
        d_model=d_model,
        n_heads=n_heads,
        d_head=getattr(config, "head_dim", None) or d_model // n_heads,
        d_mlp=d_mlp,
        d_vocab=config.vocab_size,
        n_ctx=getattr(config, "max_position_embeddings", None),
        learned_positions=architecture
        in ("GPT2LMHeadModel", "GPTBigCodeForCausalLM", "GPTNeoForCausalLM", "OPTForCausalLM"),
        config=config,
    )


def hooked_from_files(files: ModelFiles, *, n_ctx: int) -> HookedTransformer:
    """A model of `transformers` on disk as a plain float32 HookedTransformer on the CPU, with its tokenizer.

    Args:
        n_ctx: length of the sequences to be run. The context of a model without learned positions is cut to 2,048
            tokens, or to this if it is longer.

    Raises:
        ValueError: a context that is too short, damaged or missing weights, or logits that differ from those of
            `transformers`.
    """
    from transformer_lens.model_bridge import TransformerBridge

    context = files.context(n_ctx)
    loaded: Any = None
    with _named(files.path):
        loaded = AutoModelForCausalLM.from_pretrained(
            **files_of(files.path),
            trust_remote_code=False,
            config=files.config,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(
            f"{files.path} lacks weights of a {files.architecture}, such as {min(report['missing_keys'])}: it may "
            "hold a model without its output layer; save it with AutoModelForCausalLM"
        )
    model.config.architectures = [files.architecture]
    bridge = TransformerBridge.boot_transformers(
        str(files.path), hf_model=model, tokenizer=_placeholder(), device="cpu", trust_remote_code=False
    )
    hooked = hooked_from_bridge(bridge, longest=context)
    hooked.tokenizer = load_tokenizer(files.path) if _has_tokenizer(files.path) else None
    return hooked


def _has_tokenizer(path: Path) -> bool:
    return is_gguf(path) or any((path / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def _placeholder() -> Any:
    """A tokenizer for the bridge, which would change the model's own; without bos_token it is not read again."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    inner = Tokenizer(models.WordLevel({end: 0}, unk_token=end))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, pad_token=end, unk_token=end)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Makes what `transformers` raises on a file a ValueError that names it; its warnings are not shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(f"the model in {path} needs Python code of its own, which is never run") from error
        reason = str(error).split("\n")[0]
        raise ValueError(f"transformers cannot read the model in {path}: {reason}") from error
