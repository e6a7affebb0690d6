"""`GatedTransformer`: a HookedTransformer with top-k gates in its layers, and the processing of its weights.

Construction, tokenizer, hook points, tied embeddings, biases that the model does not have, loading and processing of
weights. What the gates do when the model runs is in `model.py`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities import Slice
from transformers import PreTrainedTokenizerBase

from sa_lens.config import GateConfig, ModelConfig
from sa_lens.core import architecture, tied_embedding
from sa_lens.core.base import HookedTransformer, HookedTransformerConfig, ignore_deprecation
from sa_lens.core.gate import Gate, belongs_to_gate
from sa_lens.core.pass_hooks import StreamPoint, StreamState, user_hooks
from sa_lens.data.tokenizers import prompt_tokenizer
from sa_lens.data.tokens import vocabulary_of

log = logging.getLogger(__name__)


class GatedTransformer(HookedTransformer):
    """A HookedTransformer with gates in its layers; use the class `SelfAblatingTransformer`."""

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
        with torch.random.fork_rng(devices=gpus), ignore_deprecation():
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
            self.unembed = tied_embedding.TiedUnembed(self.cfg, self.embed, self.unembed)
        self.setup()

    def set_tokenizer(self, tokenizer: Any, default_padding_side: Literal["left", "right"] | None = None) -> None:
        """Sets the tokenizer as TransformerLens does, also for a tokenizer that was never saved to disk.

        The model keeps a copy that puts one token before a text: the one before the documents of a training text, see
        `boundary_tokens`. It never reads the tokenizer from its folder again, so that no code there is run.

        Args:
            default_padding_side: `left` or `right`; None: the tokenizer's own.

        Raises:
            ValueError: this is no Hugging Face tokenizer, or it has neither a begin- nor an end-of-text token.
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
        """Makes biases trainable that the model did not have and that weight processing has filled."""
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
        """Sets up the hook points as TransformerLens does, and connects them to the streams."""
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
        return isinstance(self.unembed, tied_embedding.TiedUnembed)

    # -------------------------------------------------------------------------------------------------------- hooks

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[Any] = (),
        bwd_hooks: Sequence[Any] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[GatedTransformer]:
        """Adds hooks as TransformerLens does; within the context they fire only in passes of this thread."""
        given: list[Any] = [(name, function, "fwd") for name, function in fwd_hooks]
        given += [(name, function, "bwd") for name, function in bwd_hooks]
        with self._streams.lock:
            self.context_level += 1
        try:
            with user_hooks(self, self._streams, given, remove=reset_hooks_end):
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
        """Returns hooks as TransformerLens does, with `pos_slice` on the axis of positions at every hook point.

        TransformerLens knows the axis by the names of a few hooks; at others it would cut the axis of heads.
        """
        kept = Slice.unwrap(pos_slice)
        saved, fwd_hooks, bwd_hooks = super().get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)

        def cut(save: Any) -> Any:
            def hook(tensor: Tensor, hook: HookPoint) -> None:
                by_query = str(hook.name).endswith(("hook_attn_scores", "hook_pattern"))
                save(kept.apply(tensor, dim=-2 if by_query else 1), hook=hook)

            return hook

        if kept.mode != "identity":
            fwd_hooks, bwd_hooks = ([(name, cut(save)) for name, save in hooks] for hooks in (fwd_hooks, bwd_hooks))
        return saved, fwd_hooks, bwd_hooks

    # ------------------------------------------------------------------------------------------------------ weights

    def gate_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of the gates, for an optimizer; empty without gates.

        Do not look for "gate" in the names of parameters: `mlp.W_gate` is a weight of a gated MLP, as in Llama.
        """
        return [parameter for name, parameter in self.named_parameters() if belongs_to_gate(name)]

    def base_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of the transformer under the gates, with biases that stay zero (`zero_biases`)."""
        return [parameter for name, parameter in self.named_parameters() if not belongs_to_gate(name)]

    def freeze_base(self, frozen: bool = True) -> Self:
        """Freezes the transformer under the gates, so that only the gates are trained; returns the model.

        The clean stream then stays as it is. Call it before you build the optimizer.

        Args:
            frozen: False: the base is trained again, except the biases that the model does not have (`zero_biases`).
        """
        for parameter in self.base_parameters():
            parameter.requires_grad_(not frozen)
        self.freeze_unused_biases()
        return self

    def load_base(self, state: Mapping[str, Tensor]) -> None:
        """Loads all weights except those of the gates.

        Raises:
            ValueError: a weight is missing or unknown.
        """
        result = self.load_state_dict(dict(state), strict=False)
        parameters = dict(self.named_parameters())
        missing = [key for key in result.missing_keys if key in parameters and not belongs_to_gate(key)]
        if missing or result.unexpected_keys:
            raise ValueError(f"weights do not fit: missing {missing}, unknown {result.unexpected_keys}")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads weights as torch does, after two checks.

        Raises:
            ValueError: weights of queries or keys that are not finite; or W_U that is not the transpose of W_E
                although the embeddings are tied. Nothing is loaded then.
        """
        architecture.check_queries_and_keys(state_dict)
        if self.tied:
            tied_embedding.check_tied(state_dict, self.embed.W_E)
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._admit_filled_biases()
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves or casts the model as torch does for `to`, `half`, `double`, `cuda`, ...; the configuration follows."""
        moved = super()._apply(fn, recurse)
        self.cfg.dtype, self.cfg.device = self.W_E.dtype, str(self.W_E.device)
        return moved

    def untie(self) -> None:
        """Gives the unembedding its own parameter, equal to the transposed embedding."""
        if isinstance(self.unembed, tied_embedding.TiedUnembed):
            self.unembed = tied_embedding.untie(self.unembed)
            self.cfg.tie_word_embeddings = False
            self.setup()

    def process_weights_(
        self,
        fold_ln: bool | None = None,
        center_writing_weights: bool | None = None,
        center_unembed: bool | None = None,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """As in TransformerLens, where it keeps both streams as they are; afterwards direct logit attribution adds up.

        An option that is None, the default, is applied where it is exact: everywhere without gates; with gates usually
        `fold_ln` and `center_unembed`, and a warning in the log names the options that were left out, with the reason.
        With gates, value biases are left where they are.

        Raises:
            ValueError: an option that is True would change a stream of a gated model.
        """
        given = {
            "fold_ln": fold_ln,
            "center_writing_weights": center_writing_weights,
            "center_unembed": center_unembed,
            "fold_value_biases": not self.gates.gated,
            "refactor_factored_attn_matrices": refactor_factored_attn_matrices,
        }
        options = {name: value is not False for name, value in given.items()}
        state = self.state_dict()
        if self.gates.gated:
            for name, reason in architecture.inexact_processing(self.cfg, state, **options).items():
                if given[name] is None:
                    options[name] = False
                    log.warning("process_weights_ leaves %s out, which would change %s", name, reason)
        self.load_and_process_state_dict(state, **options)

    def load_and_process_state_dict(
        self,
        state_dict: dict[str, Tensor],
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> None:
        """Loads and processes weights as TransformerLens does, by the options that keep both streams exact.

        Gates that the state does not hold stay this model's own.

        Raises:
            ValueError: on a gated model, a processing that would change a stream, with the reason.
        """
        options = {
            "fold_ln": fold_ln,
            "center_writing_weights": center_writing_weights,
            "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases,
            "refactor_factored_attn_matrices": refactor_factored_attn_matrices,
        }
        if self.gates.gated:
            for name, reason in architecture.inexact_processing(self.cfg, state_dict, **options).items():
                raise ValueError(
                    f"{name}=True would change {reason}. Pass {name}=False, or process model.to_hooked_transformer() "
                    "instead"
                )
        gates = {key: value for key, value in self.state_dict().items() if belongs_to_gate(key)}
        state_dict = {key: value.clone() for key, value in {**gates, **state_dict}.items()}
        if self.tied and (fold_ln or center_writing_weights or center_unembed):
            log.warning("embedding and unembedding are untied: weight processing changes them apart")
            self.untie()
        if fold_ln and self.gates.reads_global:
            architecture.fold_final_norm_into_gates(state_dict)
        super().load_and_process_state_dict(state_dict, **options)
        self._admit_filled_biases()
