"""`SelfAblatingTransformer`: a HookedTransformer with learned top-k gates and two streams.

Here a model runs its streams. Its gates and weights are in `gated.py`, what makes the ablated stream in `streams.py`,
files and other formats in `save_and_load.py`, `reference.py` and `export.py`.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities.activation_functions import apply_softcap

from sa_lens.config import GateConfig, Masks, Which
from sa_lens.core import architecture, reference, save_and_load, tied_embedding
from sa_lens.core.base import HookedTransformer, hooked_transformer
from sa_lens.core.bridge import hooked_from_bridge, is_bridge
from sa_lens.core.fused.eligible_models import has_user_hooks
from sa_lens.core.gate import belongs_to_gate
from sa_lens.core.gated import GatedTransformer
from sa_lens.core.hugging_face import hooked_from_files, read_files
from sa_lens.core.inputs import check_tokens, is_recorded, tokens_and_padding
from sa_lens.core.loss_terms import cross_entropy, reconstruction_loss
from sa_lens.core.pass_hooks import Ablation, Hooks, pause_traces, running_traces
from sa_lens.core.streams import (
    CleanPass,
    ablated_hooks,
    copy_cache,
    gated_points,
    position_mask,
    record_scores,
    run_clean_pass,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_FORWARD = inspect.signature(HookedTransformer.forward)
_END = object()
"""Default value that `next` returns at the end of a generator."""


class Streams(NamedTuple):
    """Both streams of one batch, from `SelfAblatingTransformer.run_streams`.

    With `gates.scope="none"` every field of the ablated stream is None.
    """

    tokens: Int[Tensor, "batch pos"]
    """The tokens that were run."""
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


class BothPasses(NamedTuple):
    """Results of a clean and an ablated pass; without gates, those of the ablated pass are None or empty."""

    clean_logits: Float[Tensor, "batch pos d_vocab"]
    ablated_logits: Float[Tensor, "batch pos d_vocab"] | None
    masks: dict[str, list[Tensor]]
    """Masks by kind of gate, one tensor per layer."""
    clean_outputs: list[Float[Tensor, "batch pos d_model"]]
    """Each layer's output, then the final LayerNorm's, of the clean stream."""
    ablated_outputs: list[Float[Tensor, "batch pos d_model"]]
    """The same of the ablated stream."""


class SelfAblatingTransformer(GatedTransformer):
    """A HookedTransformer whose gates decide, token by token, which units stay in its ablated stream.

    By default everything runs on the clean stream, bit for bit as `HookedTransformer` does. Inside
    `with model.ablated():` the same calls run on the ablated stream.

    Args:
        cfg: shape of the transformer, TransformerLens's or sa_lens's own.
        gates: the gates; default: local, k = 8.
        tokenizer: a Hugging Face tokenizer, for strings.
        seed: seed of the initial weights and gates; None: `cfg.seed`, else 0. The global random state is left alone.
        device: device of the model; None takes `cfg.device`, or else the one that TransformerLens chooses.
        default_padding_side: as in HookedTransformer.

    Raises:
        ValueError: k larger than the units of a layer, or an architecture whose ablated stream would not be exact.

    Source: arXiv 2505.00509, section 3.
    """

    @contextmanager
    def ablated(
        self,
        position: int | Sequence[int] | Tensor | None = None,
        *,
        masks: Masks | Mapping[str, Tensor] = "frozen",
        clean_hooks: Hooks = (),
    ) -> Iterator[SelfAblatingTransformer]:
        """Runs this model in the ablated stream, within the context and this thread.

        Without a position, all positions are ablated at once: each attends to the clean keys and values of earlier
        ones, so an edit at a position changes the logits there alone. With a position, the pass is an ordinary one in
        which the masks act at that position only; its logits there are the ablated stream's, and information flows
        between positions as in any transformer. Use this form for patching and circuits.

        Contexts nest, and the innermost one applies. Gradients follow the caller's grad mode and flow through the clean
        pass too.

        Args:
            position: position at which the masks act, one for all prompts or one for each; negative ones count from
                the end.
            masks: `frozen`: masks of a clean pass on the same tokens in which no user hook fires. `live`: the user's
                hooks fire in that pass as well, so that the gates see the edits (and hooks fire twice); only with a
                position. Or given masks by hook name (`run_streams(...).masks`, or any cache that holds them): where
                they cover every gate, `hook_scores` stays silent, and with a position the clean pass is skipped.
                Gates that read the ablated stream (`scores="ablated"`) take `frozen` masks from an ablated pass in
                which no user hook fires; with `live` they read the pass itself, with or without a position.
            clean_hooks: hooks of the clean pass, in TransformerLens's form.

        Raises:
            ValueError: the model has no gates, a choice is unknown, or masks are those of another model.
        """
        self._require_gates("model.ablated()")
        if not isinstance(masks, str):
            masks = self._checked_masks(masks)
        elif masks not in get_args(Masks):
            raise ValueError(f"masks={masks!r} must be 'frozen', 'live' or masks by hook name")
        elif masks == "live" and position is None and not self.gates.reads_ablated:
            raise ValueError(
                "masks='live' needs a position; to edit the clean pass at all positions use clean_hooks=[(name, fn)]"
            )
        elif masks == "live" and clean_hooks and not self.gates.reads_ablated:
            raise ValueError("masks='live' recomputes the masks under your own hooks: do not give clean_hooks too")
        if clean_hooks and position is not None and self.gates.reads_ablated:
            raise ValueError(
                "clean_hooks need gates that read the clean stream, or an ablation of all positions: these gates "
                "(scores='ablated') at one position need no clean pass. Use masks='live' and hooks of the pass itself"
            )
        with self._streams.enter(Ablation(position, masks, tuple(clean_hooks))):
            yield self

    @contextmanager
    def clean(self) -> Iterator[SelfAblatingTransformer]:
        """Runs this model in the clean stream, within the context and this thread, also inside `ablated()`."""
        with self._streams.enter(None):
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
                given = tuple(masks[name].shape[2:])
                if given != expected:
                    raise ValueError(f"masks[{name!r}] has units of shape {given}, this model's are {expected}")
                chosen[name] = masks[name]
        if not chosen:
            raise ValueError(
                f"masks holds no mask of this model: its keys are hook names such as {name!r}; "
                "take them from model.run_streams(tokens).masks"
            )
        return chosen

    @torch.compiler.disable
    def forward(self, input: Any, return_type: Any = "logits", *args: Any, **kwargs: Any) -> Any:
        """Runs the stream that this thread has chosen; arguments as in `HookedTransformer.forward`.

        In the ablated stream `start_at_layer` must be None or 0; all else is as in TransformerLens. `torch.compile`
        leaves this method as it is, because the stream is chosen when it runs; to compile training, wrap
        `TwoStreamLoss`.

        Threads may run one model at the same time, each on its own stream and with the hooks of its own `hooks`,
        `run_with_hooks` and `run_with_cache`. `prepend_bos` and `padding_side` act on the whole model while a pass
        lasts: with several threads, tokenize first.
        """
        if args:
            given = _FORWARD.bind(self, input, return_type, *args, **kwargs).arguments
            kwargs = {name: value for name, value in given.items() if name not in ("self", "input", "return_type")}
        self._streams.threads.add(threading.get_ident())
        ablation = self._streams.current
        _say_that_the_stream_is_fixed(ablation)
        if ablation is not None:
            return self._ablated_forward(input, return_type, kwargs, ablation)
        if self._streams.of_thread.pass_hooks is None:
            return super().forward(input, return_type, **kwargs)
        # called by a hook of an outer pass, whose own hooks are not meant for this one
        with self._streams.attach():
            return super().forward(input, return_type, **kwargs)

    def _ablated_forward(self, input: Any, return_type: Any, kwargs: dict[str, Any], ablation: Ablation) -> Any:
        if kwargs.get("start_at_layer") not in (None, 0):
            raise ValueError(
                f"start_at_layer={kwargs['start_at_layer']} is not possible in the ablated stream: its keys and values "
                "come from a clean pass from layer 0. Use start_at_layer=0, or the clean stream"
            )
        if isinstance(input, Tensor) and not input.is_floating_point():
            check_tokens(input, len(self.embed.W_E))
        if ablation.position is not None and return_type in ("loss", "both"):
            warnings.warn(
                "the loss in ablated(position=...) is that of the clean logits at all other positions, because the "
                "masks act at one position only: use model.ablated() without a position for the ablated loss",
                stacklevel=4,
            )
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
        clean, gates_choose = None, not self._covers_every_gate(ablation.given)
        if ablation.position is None or (gates_choose and not self.gates.reads_ablated):
            clean = self._clean_pass(input, kwargs, ablation, stop_at_layer=stop, want_keys=ablation.position is None)
            if ablation.position is not None and clean.resid_post is not None:
                position_mask(ablation.position, *clean.resid_post.shape[:2])
        recorded = None
        if gates_choose:
            before = {} if cache_before is None else {"past_kv_cache": copy_cache(cache_before)}
            recorded = self._frozen_scores(input, {**kwargs, **before}, clean, ablation, stop)
        if cache is not None:
            kwargs = {**kwargs, "past_kv_cache": cache_before}
        with self._streams.attach(ablated_hooks(self, clean, ablation, stop, recorded)):
            return super().forward(input, return_type, **kwargs)

    def _clean_pass(self, input: Any, kwargs: dict[str, Any], ablation: Ablation, **wants: Any) -> CleanPass:
        return run_clean_pass(self, super().forward, input, kwargs, ablation, **wants)

    def _frozen_scores(
        self, input: Any, kwargs: dict[str, Any], clean: CleanPass | None, ablation: Ablation, stop: int | None = None
    ) -> dict[str, Tensor] | None:
        """Returns the scores of an unedited ablated pass where they differ from those of the pass itself, or None."""
        if not self.gates.reads_ablated or ablation.masks == "live":
            return None
        edited = bool(ablation.given) or has_user_hooks(self) or bool(running_traces(self))
        return record_scores(self, super().forward, input, kwargs, clean, ablation, stop) if edited else None

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
        """Runs both streams on the same tokens and returns one record.

        The caller's hooks fire in the ablated pass alone, as in `ablated()`; without gates, in the clean one.

        Args:
            targets: the token to predict at each position; None: the next token of the input, T - 1 predictions.
            attention_mask: 1 for tokens, 0 for padding; None: known for strings, and for tokens computed as
                TransformerLens does when padding is on the left. Padding is left out of the losses.
            prepend_bos: whether a begin-of-text token is put before strings; None takes the model's default.
            padding_side: side on which strings are padded; None takes the tokenizer's.
        """
        tokens, attention_mask, seen = tokens_and_padding(self, input, attention_mask, prepend_bos, padding_side)
        if targets is not None:
            targets = targets.to(tokens)
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
        """Runs a clean and an ablated pass by hooks, with everything that the loss terms need."""
        kwargs: dict[str, Any] = {"attention_mask": attention_mask}
        self._streams.threads.add(threading.get_ident())
        with self.clean(), self._streams.attach():
            if not self.gates.gated:
                return BothPasses(super().forward(tokens, **kwargs), None, {}, [], [])
            ablation = Ablation()
            clean = self._clean_pass(tokens, kwargs, ablation, want_final=True)
            assert clean.resid_post is not None
            assert clean.final is not None
            with pause_traces(self), self._streams.attach(silent=True):
                clean_logits = self.logits_from_final(clean.final)
            masks: dict[str, list[Tensor]] = {"attn_gate": [], "mlp_gate": []}
            outputs: list[Tensor] = []
            readers: list[Any] = [(block.hook_resid_post, outputs.append, False) for block in self.blocks]
            for block in self.blocks:
                for gate_name, _ in gated_points(block):
                    readers.append((getattr(block, gate_name).hook_mask, masks[gate_name].append, False))
            recorded = self._frozen_scores(tokens, kwargs, clean, ablation)
            with self._streams.attach([*ablated_hooks(self, clean, ablation, None, recorded), *readers]):
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

    def record_masks(self, tokens: Int[Tensor, "batch pos"]) -> dict[str, list[Float[Tensor, "batch pos ..."]]]:
        """Returns masks by kind of gate (`attn_gate`, `mlp_gate`), one per layer; no hook of the user fires.

        Gates that read the clean stream need a clean pass alone, which is half the cost of both passes.

        Raises:
            ValueError: the model has no gates.
        """
        self._require_gates("model.record_masks()")
        clean = self._clean_pass(tokens, {}, Ablation(), want_keys=self.gates.reads_ablated)
        scores: dict[str, Tensor] = {}
        if self.gates.reads_ablated:
            scores = record_scores(self, super().forward, tokens, {}, clean, Ablation())
        masks: dict[str, list[Tensor]] = {"attn_gate": [], "mlp_gate": []}
        for layer, (resid_pre, block) in enumerate(zip(clean.resid_pre, self.blocks, strict=True)):
            for name, _ in gated_points(block):
                gate = getattr(block, name)
                own = scores.get(f"blocks.{layer}.{name}")
                masks[name].append(gate.select(gate.project(resid_pre, clean.final) if own is None else own))
        return masks

    def logits_from_final(self, final: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Returns the logits from the output of the final LayerNorm."""
        return apply_softcap(self.unembed(final), self.cfg.output_logits_soft_cap)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates text from the stream that this thread has chosen; arguments as in `HookedTransformer.generate`."""
        with self._keep_mode():
            return super().generate(*args, **kwargs)

    def generate_stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:  # type: ignore[override]
        """Generates text in parts from the stream that this thread has chosen at the call.

        Arguments as in `HookedTransformer.generate_stream`. Train or eval mode is kept.
        """
        chosen = self._streams.current
        parts = super().generate_stream(*args, **kwargs)

        def stream() -> Iterator[Any]:
            with self._keep_mode():
                while True:
                    with self._streams.enter(chosen):
                        part = next(parts, _END)
                    if part is _END:
                        return
                    yield part

        return stream()

    @contextmanager
    def _keep_mode(self) -> Iterator[None]:
        training = {module: module.training for module in self.modules()}
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode

    # --------------------------------------------------------------------------------------- other models and files

    @classmethod
    def from_hooked(
        cls, model: HookedTransformer | TransformerBridge, gates: GateConfig | None = None, *, seed: int = 0
    ) -> SelfAblatingTransformer:
        """A copy of a decoder-only HookedTransformer or TransformerBridge with fresh gates on it.

        The logits of a bridge and of the copy are compared on random tokens. Embeddings are tied only if the
        configuration says so and the weights agree.

        Args:
            gates: the gates; default: local, k = 8.
            seed: seed of the gates' initial weights.

        Raises:
            ValueError: an architecture whose ablated stream would not be exact, with the reason; or a bridge whose
                logits the copy does not have.
        """
        if is_bridge(model):
            model = hooked_from_bridge(model)
        if not isinstance(model, HookedTransformer):
            given = type(model).__name__
            raise ValueError(f"from_hooked takes a HookedTransformer or a TransformerBridge, not a {given}")
        cfg = architecture.actual_config(model)
        cfg.init_weights = False
        cfg.tie_word_embeddings = tied_embedding.agree(model) and bool(model.cfg.tie_word_embeddings)
        cfg.tokenizer_name = None
        copied = cls(cfg, gates, seed=seed)
        copied.cfg.tokenizer_name = model.cfg.tokenizer_name
        if model.tokenizer is not None:
            copied.set_tokenizer(model.tokenizer)
        base = {key: value for key, value in model.state_dict().items() if not belongs_to_gate(key)}
        copied.load_base(base)
        if isinstance(model, SelfAblatingTransformer):
            copied.qkv_bias, copied.unembed_bias = model.qkv_bias, model.unembed_bias
            copied.freeze_unused_biases()
        return copied

    @classmethod
    def from_hugging_face(
        cls, folder: str | Path, gates: GateConfig | None = None, *, n_ctx: int = 1, seed: int = 0
    ) -> SelfAblatingTransformer:
        """Puts fresh gates on a model of `transformers` in a local folder or GGUF file, with its tokenizer, offline.

        The logits are compared with those of `transformers` on random tokens. The model is on the CPU, in float32.

        Args:
            folder: the folder, with `config.json`, weights and tokenizer; or a `.gguf` file (`pip install
                'sa-lens[gguf]'`), whose weights are turned into float32.
            gates: the gates; default: local, k = 8.
            n_ctx: length of the sequences to be run. The context of a model without learned positions is cut to 2,048
                tokens, or to this if it is longer.
            seed: seed of the gates' initial weights.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: an architecture that gates do not fit, quantized or damaged weights, a model that needs Python
                code of its own, or a context that is too short.
        """
        files, gates = read_files(folder), gates if gates is not None else GateConfig()
        architecture.check_units(gates, files.d_model, files.n_heads, files.d_head, files.d_mlp)
        return cls.from_hooked(hooked_from_files(files, n_ctx=n_ctx), gates, seed=seed)

    def to_hooked_transformer(self) -> HookedTransformer:
        """Returns a plain HookedTransformer with a copy of the clean stream's weights and no gates."""
        cfg = architecture.actual_config(self)
        cfg.init_weights = False
        cfg.tie_word_embeddings = False
        name, cfg.tokenizer_name = cfg.tokenizer_name, None
        plain = hooked_transformer(cfg)
        plain.cfg.tokenizer_name = name
        plain.tokenizer = self.tokenizer
        plain.load_state_dict({k: v for k, v in self.state_dict().items() if not belongs_to_gate(k)})
        plain.train(self.training)
        return plain

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes config.json, model.safetensors and the tokenizer, whole or not at all. See `save_and_load.save`."""
        return save_and_load.save(self, folder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        *,
        which: Which = "best",
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
        save_and_load.refuse_transformer_lens_arguments(name, unknown)
        return save_and_load.load(cls, name, which=which, device=device)

    @classmethod
    def from_reference(
        cls, source: str | Path | Mapping[str, Tensor], gates: GateConfig, n_heads: int = 16
    ) -> SelfAblatingTransformer:
        """Loads weights of the paper's code; see `reference.load`."""
        return reference.load(cls, source, gates, n_heads)


def _say_that_the_stream_is_fixed(ablation: Ablation | None) -> None:
    """Warns while torch records a program, which cannot choose the stream when it runs."""
    if is_recorded():
        stream = "clean" if ablation is None else "ablated"
        warnings.warn(
            f"the recorded program (torch.export, torch.jit.trace, a CUDA graph) runs the {stream} stream, whatever "
            "stream is chosen when it runs: record each stream that you need",
            stacklevel=3,
        )
