"""`SelfAblatingTransformer`: a HookedTransformer with learned top-k gates and two streams.

What makes the ablated stream is in `streams.py`, what a gate computes in `gate.py`. Saving, loading and exchange with
other formats are in `checkpoints.py`, `reference.py` and `export.py`.
"""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import LocallyOverridenDefaults, Slice, get_attention_mask
from transformers import PreTrainedTokenizerBase

from sa_lens.config import GateConfig, Masks, ModelConfig
from sa_lens.core import architecture, embedding
from sa_lens.core.gate import Gate
from sa_lens.core.loss_terms import cross_entropy, reconstruction_loss
from sa_lens.core.streams import (
    Ablation,
    CleanPass,
    Hooks,
    StreamPoint,
    StreamState,
    ablated_hooks,
    copy_cache,
    gated_points,
    position_mask,
    run_clean_pass,
    user_hooks,
)
from sa_lens.data.tokenizers import prompt_tokenizer
from sa_lens.data.tokens import vocabulary_of

log = logging.getLogger(__name__)

_FORWARD_ARGUMENTS = (
    "loss_per_token",
    "prepend_bos",
    "padding_side",
    "start_at_layer",
    "tokens",
    "shortformer_pos_embed",
    "attention_mask",
    "stop_at_layer",
    "past_kv_cache",
)
"""Positional order of `HookedTransformer.forward` after `input` and `return_type`."""
_END = object()
"""What is left of a generator at its end."""


class Streams(NamedTuple):
    """Both streams of one batch, from `SelfAblatingTransformer.run_streams`.

    With `gates.scope="none"` every field of the ablated stream is None.
    """

    tokens: Int[Tensor, "batch pos"]
    """What was run."""
    clean_logits: Float[Tensor, "batch pos d_vocab"]
    """Logits of the clean stream."""
    ablated_logits: Float[Tensor, "batch pos d_vocab"] | None
    """Logits of the ablated stream."""
    mask_attn: Float[Tensor, "layer batch pos head d_head"] | None
    """Masks of the attention units; last axis 1 where the unit is a head."""
    mask_mlp: Float[Tensor, "layer batch pos d_mlp"] | None
    """Masks of the neurons; None in an attention-only model."""
    clean_loss: Float[Tensor, ""]
    """Cross-entropy of the clean stream, mean nats per predicted token."""
    ablated_loss: Float[Tensor, ""] | None
    """Cross-entropy of the ablated stream, mean nats per predicted token."""
    reconstruction: Float[Tensor, ""] | None
    """R: mean over the layer outputs and the final LayerNorm of the mean squared difference between the L2-normalised
    clean and ablated vectors."""

    @property
    def masks(self) -> dict[str, Tensor]:
        """Masks by hook name, as `model.ablated(masks=...)` takes them."""
        named = {}
        for gate_name, stacked in (("attn_gate", self.mask_attn), ("mlp_gate", self.mask_mlp)):
            for layer, mask in enumerate(stacked if stacked is not None else ()):
                named[f"blocks.{layer}.{gate_name}.hook_mask"] = mask
        return named


class SelfAblatingTransformer(HookedTransformer):
    """A HookedTransformer whose gates decide, token by token, which units stay in its ablated stream.

    By default everything runs on the clean stream, bit for bit as `HookedTransformer` does; inside
    `with model.ablated():` the same calls run on the ablated one.

    Args:
        cfg: shape of the transformer, TransformerLens's or sa_lens's own.
        gates: the gates; default: local, k = 8.
        tokenizer: a Hugging Face tokenizer, for strings.
        seed: seed of the initial weights and gates; None: `cfg.seed`, else 0. The global random state is left alone.
        device: where the model lives; None: `cfg.device`, else TransformerLens's choice.
        default_padding_side: as in HookedTransformer.

    Raises:
        ValueError: k larger than the units of a layer, or an architecture whose ablated stream would not be exact.

    Source: arXiv 2505.00509, section 3.
    """

    gates: GateConfig

    def __init__(
        self,
        cfg: HookedTransformerConfig | ModelConfig,
        gates: GateConfig | None = None,
        tokenizer: Any = None,
        *,
        seed: int | None = None,
        device: str | torch.device | None = None,
        default_padding_side: Literal["left", "right"] | None = None,
    ) -> None:
        gates = gates if gates is not None else GateConfig()
        own = cfg if isinstance(cfg, ModelConfig) else None
        tl_cfg = (
            architecture.hooked_config(cfg, tokenizer=tokenizer, device=device)
            if isinstance(cfg, ModelConfig)
            else copy.deepcopy(cfg)
        )
        if device is not None:
            tl_cfg.device = str(device)
        architecture.check_supported(tl_cfg, gates)
        # TransformerLens would run Python code of a tokenizer on the Hub
        tl_cfg.trust_remote_code = False
        seed = next(s for s in (seed, tl_cfg.seed, 0) if s is not None)
        tl_cfg.seed = None
        gpus = [torch.device(str(tl_cfg.device))] if "cuda" in str(tl_cfg.device) else []
        with torch.random.fork_rng(devices=gpus), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="HookedTransformer is deprecated", category=DeprecationWarning)
            # torch.manual_seed would also seed GPUs that this model is not on
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
            super().__init__(tl_cfg, tokenizer=tokenizer, default_padding_side=default_padding_side)
        self.cfg.seed = seed
        self.gates = gates
        self._streams = StreamState()
        generator = torch.Generator().manual_seed(seed + 1)
        if own is not None and own.init == "reference":
            architecture.initialise_as_reference(self, torch.Generator().manual_seed(seed))
        if gates.gated:
            self._attach_gates(generator)
        self.qkv_bias = own.qkv_bias if own is not None else True
        self.unembed_bias = own.unembed_bias if own is not None else True
        self.freeze_unused_biases()
        if self.cfg.tie_word_embeddings:
            self.unembed = embedding.TiedUnembed(self.cfg, self.embed, self.unembed)
        self.setup()

    def set_tokenizer(self, tokenizer: Any, default_padding_side: Literal["left", "right"] | None = None) -> None:
        """As in TransformerLens, for any Hugging Face tokenizer, also one that was never on disk.

        The model keeps a copy that puts one token before a text: the one before the documents of a training text, see
        `boundary_tokens`. It never reads the tokenizer from its folder again, so that no code there is run.

        Args:
            default_padding_side: `left` or `right`; None: the tokenizer's own.

        Raises:
            ValueError: no Hugging Face tokenizer, or one without begin- and end-of-text token.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"the tokenizer is a {type(tokenizer).__name__}, but must be a Hugging Face one; wrap one of the "
                "tokenizers library in PreTrainedTokenizerFast(tokenizer_object=..., eos_token=...)"
            )
        if default_padding_side not in ("left", "right", None):
            raise ValueError(f"default_padding_side={default_padding_side!r} must be 'left', 'right' or None")
        self.tokenizer = prompt_tokenizer(tokenizer)
        self.tokenizer.padding_side = default_padding_side or self.tokenizer.padding_side or "right"
        self.cfg.tokenizer_prepends_bos = True
        if self.cfg.d_vocab == -1:
            self.cfg.d_vocab = vocabulary_of(self.tokenizer)
        if self.cfg.d_vocab_out == -1:
            self.cfg.d_vocab_out = self.cfg.d_vocab

    def _attach_gates(self, generator: torch.Generator) -> None:
        cfg = self.cfg
        attn_shape = (cfg.n_heads, cfg.d_head if self.gates.attn_unit == "channel" else 1)
        for block in self.blocks:
            shapes: dict[str, tuple[int, tuple[int, ...]]] = {"attn_gate": (self.gates.k_attn, attn_shape)}
            if not cfg.attn_only:
                assert cfg.d_mlp is not None
                shapes["mlp_gate"] = (self.gates.k_mlp, (cfg.d_mlp,))
            for name, (k, shape) in shapes.items():
                gate = Gate(self.gates, k, cfg.d_model, shape, cfg.dtype, block.attn.b_O.device)
                gate.reset_parameters(generator)
                block.add_module(name, gate)

    def freeze_unused_biases(self) -> None:
        for name in self.zero_biases:
            self.get_parameter(name).requires_grad_(False)

    def _admit_filled_biases(self) -> None:
        """Makes biases the model's own that it did not have and that weight processing has filled."""
        unused = self.zero_biases
        filled = {name.rsplit(".", 1)[-1] for name in unused if bool(self.get_parameter(name).any())}
        self.qkv_bias = self.qkv_bias or bool(filled - {"b_U"})
        self.unembed_bias = self.unembed_bias or "b_U" in filled
        for name in unused:
            self.get_parameter(name).requires_grad_(name not in self.zero_biases)

    @property
    def zero_biases(self) -> list[str]:
        """Names of the biases that TransformerLens creates but this model does not have; they stay zero."""
        unused = set() if self.qkv_bias else {"b_Q", "b_K", "b_V", "_b_K", "_b_V"}
        if not self.unembed_bias:
            unused.add("b_U")
        return [name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in unused]

    def setup(self) -> None:
        """As in TransformerLens, after which the hook points know about the streams."""
        super().setup()
        if "_streams" not in self.__dict__:
            return
        for point in self.hook_dict.values():
            if type(point) is HookPoint:
                point.__class__ = StreamPoint
                cast(StreamPoint, point).streams = self._streams

    @property
    def tied(self) -> bool:
        """Whether embedding and unembedding are one parameter."""
        return isinstance(self.unembed, embedding.TiedUnembed)

    # ------------------------------------------------------------------------------------------------------ streams

    @contextmanager
    def ablated(
        self,
        position: int | Sequence[int] | Tensor | None = None,
        *,
        masks: Masks | Mapping[str, Tensor] = "frozen",
        clean_hooks: Hooks = (),
    ) -> Iterator[SelfAblatingTransformer]:
        """Inside the context, this model and thread run the ablated stream.

        Without a position, all positions are ablated at once: each attends to the clean keys and values of earlier
        ones, so an edit at a position changes the logits there alone. With a position, the pass is an ordinary one in
        which the masks act at that position only; its logits there are the ablated stream's, and information flows
        between positions as in any transformer. Use this form for patching and circuits.

        Contexts nest; the innermost one counts. Gradients follow the caller's grad mode and flow through the clean
        pass too.

        Args:
            position: where the masks act: one for all prompts or one for each; negative ones count from the end.
            masks: `frozen`: masks of a clean pass on the same tokens in which no user hook fires. `live`: the user's
                hooks fire in that pass as well, so that the gates see the edits (and hooks fire twice); only with a
                position. Or given masks by hook name (`run_streams(...).masks`, or any cache that holds them): where
                they cover every gate, `hook_scores` stays silent, and with a position the clean pass is skipped.
            clean_hooks: hooks of the clean pass, in TransformerLens's form.

        Raises:
            ValueError: a model without gates, an unknown choice, masks of another model.
        """
        self._require_gates("model.ablated()")
        if not isinstance(masks, str):
            masks = self._checked_masks(masks)
        elif masks not in get_args(Masks):
            raise ValueError(f"masks={masks!r} must be 'frozen', 'live' or masks by hook name")
        elif masks == "live" and position is None:
            raise ValueError(
                "masks='live' needs a position; to edit the clean pass at all positions use clean_hooks=[(name, fn)]"
            )
        elif masks == "live" and clean_hooks:
            raise ValueError("masks='live' recomputes the masks under your own hooks: do not give clean_hooks too")
        with self._streams.entered(Ablation(position, masks, tuple(clean_hooks))):
            yield self

    @contextmanager
    def clean(self) -> Iterator[SelfAblatingTransformer]:
        """Inside the context, this model and thread run the clean stream, also within `ablated()`."""
        with self._streams.entered(None):
            yield self

    def _require_gates(self, what: str) -> None:
        if not self.gates.gated:
            raise ValueError(
                f"{what} needs gates, but this model has none (gates.scope='none'): it has a clean stream only. "
                "Put gates on it with SelfAblatingTransformer.from_hooked(model, GateConfig(...))"
            )

    def _checked_masks(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        chosen = {}
        for layer, block in enumerate(self.blocks):
            for gate_name, _ in gated_points(block):
                name = f"blocks.{layer}.{gate_name}.hook_mask"
                if name not in masks:
                    continue
                expected = getattr(block, gate_name).unit_shape
                found = tuple(masks[name].shape[2:])
                if found != expected:
                    raise ValueError(f"masks[{name!r}] has units of shape {found}, this model's are {expected}")
                chosen[name] = masks[name]
        if not chosen:
            raise ValueError(
                f"masks holds no mask of this model: its keys are hook names such as {name!r}; "
                "take them from model.run_streams(tokens).masks"
            )
        return chosen

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[Any] = (),
        bwd_hooks: Sequence[Any] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[SelfAblatingTransformer]:
        """As in TransformerLens, but while the context lasts the hooks fire in passes of this thread alone."""
        given: list[Any] = [(name, function, "fwd") for name, function in fwd_hooks]
        given += [(name, function, "bwd") for name, function in bwd_hooks]
        with self._streams.lock:
            self.context_level += 1
        try:
            with user_hooks(self, given, remove=reset_hooks_end):
                yield self
        finally:
            with self._streams.lock:
                self.context_level -= 1
            if reset_hooks_end and clear_contexts:
                self.clear_contexts()

    def get_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        """As in TransformerLens, with `pos_slice` on the axis of positions at every hook point, those of gates too.

        TransformerLens knows the axis by the names of a few hooks; at others it would cut the axis of heads.
        """
        kept = Slice.unwrap(pos_slice)
        saved, fwd_hooks, bwd_hooks = super().get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)

        def sliced(save: Any) -> Any:
            def hook(tensor: Tensor, hook: HookPoint) -> None:
                by_query = str(hook.name).endswith(("hook_attn_scores", "hook_pattern"))
                save(kept.apply(tensor, dim=-2 if by_query else 1), hook=hook)

            return hook

        if kept.mode != "identity":
            fwd_hooks, bwd_hooks = ([(name, sliced(save)) for name, save in hooks] for hooks in (fwd_hooks, bwd_hooks))
        return saved, fwd_hooks, bwd_hooks

    @torch.compiler.disable
    def forward(self, input: Any, return_type: Any = "logits", *args: Any, **kwargs: Any) -> Any:
        """As `HookedTransformer.forward`, on the stream that this thread has chosen.

        In the ablated stream `start_at_layer` must be None or 0; all else is as in TransformerLens. `torch.compile`
        leaves this method as it is, because the stream is chosen when it runs; to compile training, wrap
        `TwoStreamLoss`.

        Threads may run one model at the same time, each on its own stream and with the hooks of its own `hooks`,
        `run_with_hooks` and `run_with_cache`. `prepend_bos` and `padding_side` act on the whole model while a pass
        lasts: with several threads, tokenize first.
        """
        kwargs.update(zip(_FORWARD_ARGUMENTS, args, strict=False))
        self._streams.threads.add(threading.get_ident())
        ablation = self._streams.current
        _say_that_the_stream_is_fixed(ablation)
        if ablation is not None:
            return self._ablated_forward(input, return_type, kwargs, ablation)
        if self._streams.of_thread.pass_hooks is None:
            return super().forward(input, return_type, **kwargs)
        # called by a hook of an outer pass, whose own hooks are not meant for this one
        with self._streams.attached():
            return super().forward(input, return_type, **kwargs)

    def _ablated_forward(self, input: Any, return_type: Any, kwargs: dict[str, Any], ablation: Ablation) -> Any:
        if kwargs.get("start_at_layer") not in (None, 0):
            raise ValueError(
                f"start_at_layer={kwargs['start_at_layer']} is not possible in the ablated stream: its keys and values "
                "come from a clean pass from layer 0. Use start_at_layer=0, or the clean stream"
            )
        if isinstance(input, Tensor) and not input.is_floating_point():
            check_tokens(input, len(self.embed.W_E))
        stop = kwargs.get("stop_at_layer")
        if stop is not None:
            stop = stop + self.cfg.n_layers if stop < 0 else stop
        cache = kwargs.get("past_kv_cache")
        if cache is not None and ablation.position is not None:
            raise ValueError(
                "past_kv_cache does not fit ablated(position=...): its keys would depend on the masks. "
                "Generate with model.ablated(), or run without a cache"
            )
        cache_before = copy_cache(cache) if cache is not None else None
        clean = None
        if ablation.position is None or not self._covers_every_gate(ablation.given):
            clean = self._clean_pass(input, kwargs, ablation, stop_at_layer=stop, want_keys=ablation.position is None)
            if ablation.position is not None and clean.resid_post is not None:
                position_mask(ablation.position, *clean.resid_post.shape[:2])
        if cache is not None:
            kwargs = {**kwargs, "past_kv_cache": cache_before}
        with self._streams.attached(ablated_hooks(self, clean, ablation, stop)):
            return super().forward(input, return_type, **kwargs)

    def _clean_pass(self, input: Any, kwargs: dict[str, Any], ablation: Ablation, **wants: Any) -> CleanPass:
        return run_clean_pass(self, super().forward, input, kwargs, ablation, **wants)

    def _covers_every_gate(self, masks: Mapping[str, Tensor]) -> bool:
        return all(
            f"blocks.{layer}.{name}.hook_mask" in masks
            for layer, block in enumerate(self.blocks)
            for name, _ in gated_points(block)
        )

    def run_streams(
        self,
        input: str | list[str] | Int[Tensor, "batch pos"],
        targets: Int[Tensor, "batch pos"] | None = None,
        *,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> Streams:
        """Both streams of the same tokens in one record.

        The caller's hooks fire in the ablated pass alone, as in `ablated()`; without gates, in the clean one.

        Args:
            targets: the token to predict at each position; None: the next token of the input, T - 1 predictions.
            attention_mask: 1 for tokens, 0 for padding; None: known for strings, and for tokens computed as
                TransformerLens does when padding is on the left. Padding is left out of the losses.
            prepend_bos: for strings; None: the model's default.
            padding_side: for strings; None: the tokenizer's.
        """
        given = {"prepend_bos": prepend_bos, "padding_side": padding_side}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        side = padding_side or (None if self.tokenizer is None else self.tokenizer.padding_side)
        texts = None if isinstance(input, Tensor) else [input] if isinstance(input, str) else input
        if not isinstance(input, Tensor):
            input = self.to_tokens(input, **options)
        tokens = input[None] if input.ndim == 1 else input
        check_tokens(tokens, len(self.embed.W_E))
        tokens = tokens.to(self.embed.W_E.device, torch.long)
        if targets is not None:
            targets = targets.to(tokens)
        seen = attention_mask
        if attention_mask is None and texts is not None:
            lengths = [self.to_tokens(text, **options).shape[1] for text in texts]
            attention_mask = padding_mask(lengths, tokens.shape[1], side == "left").to(tokens.device)
            # what comes after a token never reaches it, so that padding on the right needs no mask in the passes
            seen = attention_mask if side == "left" else None
        elif attention_mask is None and side == "left" and self.tokenizer is not None:
            bos = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
            with LocallyOverridenDefaults(self, padding_side=side):
                seen = attention_mask = get_attention_mask(self.tokenizer, tokens, bos)
        both = self.run_both_passes(tokens, seen)

        def loss(logits: Tensor) -> Tensor:
            return cross_entropy(logits, tokens, targets, attention_mask)

        gated = both.ablated_logits is not None
        return Streams(
            tokens=tokens,
            clean_logits=both.clean_logits,
            ablated_logits=both.ablated_logits,
            mask_attn=torch.stack(both.masks["attn_gate"]) if gated else None,
            mask_mlp=torch.stack(both.masks["mlp_gate"]) if gated and both.masks["mlp_gate"] else None,
            clean_loss=loss(both.clean_logits),
            ablated_loss=loss(both.ablated_logits) if both.ablated_logits is not None else None,
            reconstruction=(
                reconstruction_loss(both.clean_outputs, both.ablated_outputs, attention_mask) if gated else None
            ),
        )

    @torch.compiler.disable
    def run_both_passes(
        self, tokens: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> BothPasses:
        """A clean and an ablated pass by hooks, with everything that the loss terms need."""
        kwargs: dict[str, Any] = {"attention_mask": attention_mask}
        self._streams.threads.add(threading.get_ident())
        with self.clean(), self._streams.attached():
            if not self.gates.gated:
                return BothPasses(super().forward(tokens, **kwargs), None, {}, [], [])
            ablation = Ablation()
            clean = self._clean_pass(tokens, kwargs, ablation, want_final=True)
            assert clean.resid_post is not None
            assert clean.final is not None
            with self._streams.attached(silent=True):
                clean_logits = self.logits_from_final(clean.final)
            masks: dict[str, list[Tensor]] = {"attn_gate": [], "mlp_gate": []}
            outputs: list[Tensor] = []
            readers: list[Any] = [(block.hook_resid_post, outputs.append, False) for block in self.blocks]
            for block in self.blocks:
                for gate_name, _ in gated_points(block):
                    readers.append((getattr(block, gate_name).hook_mask, masks[gate_name].append, False))
            with self._streams.attached([*ablated_hooks(self, clean, ablation, None), *readers]):
                resid = super().forward(tokens, stop_at_layer=self.cfg.n_layers, **kwargs)
                final = self.ln_final(resid) if self.cfg.normalization_type is not None else resid
                ablated_logits = self.logits_from_final(final)
        return BothPasses(
            clean_logits,
            ablated_logits,
            masks,
            [*clean.resid_pre[1:], clean.resid_post, clean.final],
            [*outputs, final],
        )

    def logits_from_final(self, final: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits from the final LayerNorm's output."""
        return architecture.soft_capped(self.unembed(final), self.cfg)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `HookedTransformer.generate`, from the stream that this thread has chosen; train or eval mode is kept."""
        with self._mode_kept():
            return super().generate(*args, **kwargs)

    def generate_stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:  # type: ignore[override]
        """As `HookedTransformer.generate_stream`, from the stream that this thread has chosen at the call.

        Train or eval mode is kept.
        """
        chosen = self._streams.current
        parts = super().generate_stream(*args, **kwargs)

        def stream() -> Iterator[Any]:
            with self._mode_kept():
                while True:
                    with self._streams.entered(chosen):
                        part = next(parts, _END)
                    if part is _END:
                        return
                    yield part

        return stream()

    @contextmanager
    def _mode_kept(self) -> Iterator[None]:
        training = {module: module.training for module in self.modules()}
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode

    # ------------------------------------------------------------------------------------------------------ weights

    @classmethod
    def from_hooked(
        cls, model: HookedTransformer, gates: GateConfig | None = None, *, seed: int = 0
    ) -> SelfAblatingTransformer:
        """A copy of a decoder-only HookedTransformer with fresh gates on it.

        Embeddings are tied only if the configuration says so and the weights agree.

        Args:
            gates: the gates; default: local, k = 8.
            seed: seed of the gates' initial weights.

        Raises:
            ValueError: an architecture whose ablated stream would not be exact, with the reason.
        """
        if not isinstance(model, HookedTransformer):
            raise ValueError(f"from_hooked takes a HookedTransformer, not a {type(model).__name__}")
        cfg = architecture.actual_config(model)
        cfg.init_weights = False
        cfg.tie_word_embeddings = embedding.agree(model) and bool(model.cfg.tie_word_embeddings)
        cfg.tokenizer_name = None
        copied = cls(cfg, gates, seed=seed)
        copied.cfg.tokenizer_name = model.cfg.tokenizer_name
        if model.tokenizer is not None:
            copied.set_tokenizer(model.tokenizer)
        base = {key: value for key, value in model.state_dict().items() if "_gate." not in key}
        copied.load_base(base)
        if isinstance(model, SelfAblatingTransformer):
            copied.qkv_bias, copied.unembed_bias = model.qkv_bias, model.unembed_bias
            copied.freeze_unused_biases()
        return copied

    def load_base(self, state: Mapping[str, Tensor]) -> None:
        """Loads everything but the gates.

        Raises:
            ValueError: a missing or unknown weight.
        """
        result = self.load_state_dict(dict(state), strict=False)
        parameters = dict(self.named_parameters())
        missing = [key for key in result.missing_keys if key in parameters and "_gate." not in key]
        if missing or result.unexpected_keys:
            raise ValueError(f"weights do not fit: missing {missing}, unknown {result.unexpected_keys}")

    def to_hooked_transformer(self) -> HookedTransformer:
        """A plain HookedTransformer with a copy of the clean stream's weights and no gates."""
        cfg = architecture.actual_config(self)
        cfg.init_weights = False
        cfg.tie_word_embeddings = False
        name, cfg.tokenizer_name = cfg.tokenizer_name, None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="HookedTransformer is deprecated", category=DeprecationWarning)
            plain = HookedTransformer(cfg)
        plain.cfg.tokenizer_name = name
        plain.tokenizer = self.tokenizer
        plain.load_state_dict({k: v for k, v in self.state_dict().items() if "_gate." not in k})
        plain.train(self.training)
        return plain

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; with tied embeddings, refuses a state whose W_U is not the transpose of its W_E.

        Raises:
            ValueError: W_U and W_E differ although the embeddings are tied. Nothing is loaded then.
        """
        if self.tied:
            embedding.check_tied(state_dict, self.embed.W_E)
        found = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._admit_filled_biases()
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As in torch, where `to`, `half`, `double`, `cuda` and the like end; the configuration follows."""
        moved = super()._apply(fn, recurse)
        self.cfg.dtype, self.cfg.device = self.W_E.dtype, str(self.W_E.device)
        return moved

    def untie(self) -> None:
        """Gives the unembedding a parameter of its own, equal to the transposed embedding."""
        if isinstance(self.unembed, embedding.TiedUnembed):
            self.unembed = embedding.untied(self.unembed)
            self.cfg.tie_word_embeddings = False
            self.setup()

    def process_weights_(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """As in TransformerLens, refusing what would change the ablated stream; see `load_and_process_state_dict`.

        Value biases are left where they are.
        """
        self.load_and_process_state_dict(
            self.state_dict(),
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=not self.gates.gated,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )

    def load_and_process_state_dict(
        self,
        state_dict: dict[str, Tensor],
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """As in TransformerLens. On a gated model `fold_ln` and `center_unembed` keep both streams as they are.

        Gates that the state does not hold stay this model's own.

        Raises:
            ValueError: on a gated model, a processing that would change a stream, with the reason.
        """
        if self.gates.gated:
            architecture.check_processing(
                self.cfg,
                state_dict,
                fold_ln=fold_ln,
                center_writing_weights=center_writing_weights,
                center_unembed=center_unembed,
                fold_value_biases=fold_value_biases,
                refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            )
        gates = {key: value for key, value in self.state_dict().items() if "_gate." in key}
        state_dict = {key: value.clone() for key, value in {**gates, **state_dict}.items()}
        if self.tied and (fold_ln or center_writing_weights or center_unembed):
            log.warning("embedding and unembedding are untied: weight processing changes them apart")
            self.untie()
        if fold_ln and self.gates.reads_global:
            architecture.fold_final_norm_into_gates(state_dict)
        super().load_and_process_state_dict(
            state_dict,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )
        self._admit_filled_biases()

    # -------------------------------------------------------------------------------------------------------- files

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes config.json, model.safetensors and the tokenizer, whole or not at all. See `checkpoints.save`."""
        from sa_lens.core import checkpoints

        return checkpoints.save(self, folder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        *,
        which: Literal["best", "last"] = "best",
        device: str | torch.device | None = None,
        **unknown: Any,
    ) -> SelfAblatingTransformer:
        """Loads a run folder, a model shipped with sa_lens (`sa.models()` lists them), or a model on the Hub.

        Args:
            name: folder, name of a shipped model, or Hub id `owner/name`. A bare name that is both a shipped model's
                and a folder's means the shipped model; `./NAME` or a `Path` means the folder.
            which: `best`: the weights with the lowest validation loss; `last`: those of the latest checkpoint.
            device: where the model lives.

        Raises:
            FileNotFoundError: no such folder, or no model in it.
            ValueError: TransformerLens's own keywords or model names, a damaged or foreign file.
        """
        from sa_lens.core import checkpoints

        checkpoints.refuse_transformer_lens_arguments(name, unknown)
        return checkpoints.load(name, which=which, device=device)

    @classmethod
    def from_reference(
        cls, source: str | Path | Mapping[str, Tensor], gates: GateConfig, n_heads: int = 16
    ) -> SelfAblatingTransformer:
        """Loads weights of the paper's code. See `reference.load`."""
        from sa_lens.core import reference

        return reference.load(source, gates, n_heads)


def _is_recorded() -> bool:
    """Whether a program is being recorded by torch, which cannot decide by the values of tensors."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return capturing or torch.jit.is_tracing() or torch.compiler.is_compiling()


def _say_that_the_stream_is_fixed(ablation: Ablation | None) -> None:
    """Warns where a pass is being recorded, since the record cannot ask for the stream again."""
    if _is_recorded():
        stream = "clean" if ablation is None else "ablated"
        warnings.warn(
            f"what is recorded here (torch.export, torch.jit.trace, a CUDA graph) is the {stream} stream, whatever "
            "stream is chosen when it runs: record each stream that you need",
            stacklevel=3,
        )


def check_tokens(tokens: Int[Tensor, "*shape"], d_vocab: int) -> None:
    """Returns if every token is one of the vocabulary; torch would count negative ones from its end.

    Raises:
        ValueError: a token below 0 or beyond the vocabulary. A program that torch records is not checked.
    """
    if _is_recorded():
        return
    strange = tokens[(tokens < 0) | (tokens >= d_vocab)]
    if len(strange):
        raise ValueError(f"token {int(strange[0])} is not in the vocabulary: tokens are from 0 to {d_vocab - 1}")


def padding_mask(lengths: Sequence[int], length: int, left: bool) -> Int[Tensor, "batch pos"]:
    """1 for the tokens of prompts of these lengths, 0 for their padding to one length."""
    place = torch.arange(length)
    size = torch.tensor(lengths)[:, None]
    return (place >= length - size if left else place < size).long()


class BothPasses(NamedTuple):
    """A clean and an ablated pass; the ablated parts are None or empty without gates."""

    clean_logits: Float[Tensor, "batch pos d_vocab"]
    ablated_logits: Float[Tensor, "batch pos d_vocab"] | None
    masks: dict[str, list[Tensor]]
    """Masks by kind of gate, a tensor a layer."""
    clean_outputs: list[Float[Tensor, "batch pos d_model"]]
    """Each layer's output, then the final LayerNorm's, of the clean stream."""
    ablated_outputs: list[Float[Tensor, "batch pos d_model"]]
    """The same of the ablated stream."""
