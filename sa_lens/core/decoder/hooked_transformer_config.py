"""The configuration of the decoder, with TransformerLens's fields and defaults, so that files are compatible."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES
from transformer_lens.utilities.devices import get_device

NORMALIZATIONS = (None, "LN", "LNPre", "RMS", "RMSPre")
POSITIONS = ("standard", "rotary", "alibi", "shortformer")


@dataclass
class HookedTransformerConfig:
    """Shape and settings of a `HookedTransformer`.

    Fields that are None or -1 and can be derived are filled in when the object is made. Any value is accepted here;
    `check_supported` says what the decoder cannot run.

    Raises:
        ValueError: sizes that do not fit together, or a setting without its companion.
    """

    # sizes
    d_model: int
    d_head: int
    n_layers: int
    n_ctx: int
    """Longest sequence, in tokens."""
    n_heads: int = -1
    """-1: `d_model / d_head`."""
    d_mlp: int | None = None
    """None: `4 * d_model`."""
    d_vocab: int = -1
    """-1: that of the tokenizer."""
    d_vocab_out: int = -1
    """Number of logits; -1: `d_vocab`."""
    n_params: int | None = None
    """Number of weights in the matrices of attention and MLPs, computed; biases, embeddings and norms do not count."""

    # layers
    act_fn: str = "relu"
    gated_mlp: bool = False
    attn_only: bool = False
    parallel_attn_mlp: bool = False
    """Attention and MLP both read the block's input."""
    normalization_type: str | None = "LN"
    """`LN`, `RMS`, these without weights (`LNPre`, `RMSPre`), or None."""
    eps: float = 1e-5
    final_rms: bool = False
    """RMSNorm before the unembedding in a model with LayerNorm."""
    post_embedding_ln: bool = False
    """A LayerNorm on the embedding."""
    output_logits_soft_cap: float = -1.0
    """Logits become `cap * tanh(logits / cap)`; 0 or below: they do not."""
    tie_word_embeddings: bool = False
    """Whether W_U is the transposed W_E; a record only, as in TransformerLens."""

    # attention
    n_key_value_heads: int | None = None
    """Heads of keys and values, each shared by `n_heads / n_key_value_heads` queries; None: one for each query."""
    ungroup_grouped_query_attention: bool = False
    """Whether shared keys and values are computed once for each query, so that hooks see `n_heads` of them."""
    use_attn_scale: bool = True
    attn_scale: float = -1.0
    """Divisor of the scores; -1: `sqrt(d_head)`."""
    scale_attn_by_inverse_layer_idx: bool = False
    """Whether layer l also divides its scores by l + 1."""
    attn_scores_soft_cap: float = -1.0
    """Scores become `cap * tanh(scores / cap)`; 0 or below: they do not."""
    use_local_attn: bool = False
    attn_types: list | None = None
    """`global` or `local` for each layer; only with `use_local_attn`."""
    window_size: int | None = None
    """How many positions a local layer looks at, its own included."""

    # positions
    positional_embedding_type: str = "standard"
    """`standard` (learned, added to the embedding), `rotary`, `alibi`, or `shortformer` (learned, added to the inputs
    of queries and keys alone)."""
    rotary_dim: int | None = None
    """Leading dimensions of a head that are rotated; None: all."""
    rotary_base: float = 10000
    rotary_base_local: float | None = None
    """Base of local layers; None: that of all."""
    rotary_adjacent_pairs: bool = False
    """Whether dimensions 2i and 2i + 1 form a pair, as in GPT-J; otherwise i and i + rotary_dim / 2."""
    rotary_scaling_factor: float = 1.0
    """Factor of all wavelengths, except those of local layers."""
    use_NTK_by_parts_rope: bool = False
    """Wavelengths of Llama 3.1: long ones times a factor, short ones as they are, a blend between."""
    NTK_by_parts_low_freq_factor: float = 1.0
    NTK_by_parts_high_freq_factor: float = 4.0
    NTK_by_parts_factor: float = 8.0
    NTK_original_ctx_len: int = 8192

    # hook points that cost memory
    use_attn_result: bool = False
    """Whether what each head adds to the residual stream is computed on its own, for `hook_result`."""
    use_split_qkv_input: bool = False
    """Whether each head's query, key and value has an input of its own, for `hook_q_input` and the like."""
    use_attn_in: bool = False
    """Whether each head has an input of its own, for `hook_attn_in`."""
    use_hook_mlp_in: bool = False
    use_hook_tokens: bool = False

    # initial weights, precision and place
    init_weights: bool = True
    init_mode: str = "gpt2"
    initializer_range: float = -1.0
    """Standard deviation of `gpt2`, -1: `0.8 / sqrt(d_model)`; gain of the other modes, -1: 1."""
    seed: int | None = None
    """Seed of the initial weights; None: torch's global random state."""
    dtype: torch.dtype = torch.float32
    device: str | None = None
    """None: the best one that there is."""

    # tokenizer
    tokenizer_name: str | None = None
    default_prepend_bos: bool = True
    tokenizer_prepends_bos: bool | None = None
    """Whether the tokenizer puts a begin-of-text token before a text itself; set with the tokenizer."""
    trust_remote_code: bool = False

    # origin
    model_name: str = "custom"
    original_architecture: str | None = None
    from_checkpoint: bool = False
    checkpoint_index: int | None = None
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    uses_rms_norm: bool = False
    layer_norm_folding: bool = False

    # what TransformerLens 3 can run and this decoder cannot, or what means something in such models only
    attention_dir: str = "causal"
    n_devices: int = 1
    load_in_4bit: bool = False
    quantization_method: str | None = None
    use_normalization_before_and_after: bool = False
    use_qk_norm: bool = False
    use_attention_sinks: bool = False
    clip_qkv: float | None = None
    use_logn_attn: bool = False
    train_seq_length: int | None = None
    use_dynamic_ntk_rope: bool = False
    use_yarn_rope: bool = False
    yarn_factor: float = 1.0
    yarn_attention_factor: float = 1.0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_truncate: bool = True
    yarn_global_attn_only: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    norm_topk_prob: bool = False
    relative_attention_max_distance: int | None = None
    relative_attention_num_buckets: int | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.n_heads == -1:
            if self.d_model % self.d_head:
                raise ValueError(f"d_head={self.d_head} does not divide d_model={self.d_model}: give n_heads too")
            self.n_heads = self.d_model // self.d_head
        if self.n_key_value_heads is not None and self.n_heads % self.n_key_value_heads:
            raise ValueError(f"n_key_value_heads={self.n_key_value_heads} must divide n_heads={self.n_heads}")
        if self.use_local_attn and (self.window_size is None or self.attn_types is None):
            raise ValueError("use_local_attn=True needs window_size and attn_types")
        if not self.attn_only and self.act_fn is None:
            raise ValueError("act_fn=None is for models with attn_only=True: name an activation")
        if self.d_mlp is None:
            self.d_mlp = 4 * self.d_model
        if self.d_vocab_out == -1:
            self.d_vocab_out = self.d_vocab
        if self.rotary_dim is None and self.positional_embedding_type == "rotary":
            self.rotary_dim = self.d_head
        if self.use_attn_scale and self.attn_scale == -1.0:
            self.attn_scale = math.sqrt(self.d_head)
        if self.initializer_range < 0:
            self.initializer_range = 0.8 / math.sqrt(self.d_model) if self.init_mode == "gpt2" else 1.0
        if self.device is None:
            self.device = get_device()
        matrices = 0 if self.attn_only else self.d_mlp * (3 if self.gated_mlp else 2)
        self.n_params = self.n_layers * self.d_model * (4 * self.n_heads * self.d_head + matrices)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> HookedTransformerConfig:
        """Makes a configuration of these fields; missing fields have their defaults.

        Raises:
            ValueError: a field that does not exist, or values that do not fit together.
        """
        unknown = fields.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(
                f"HookedTransformerConfig has no field {min(unknown)!r}: see its documentation for the names"
            )
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields by name."""
        return dict(vars(self))

    def is_layer_norm_activation(self) -> bool:
        """Returns whether a norm follows the activation inside the MLP, as in `solu_ln`."""
        return self.act_fn is not None and self.act_fn.endswith("_ln")

    def check_supported(self) -> None:
        """Checks that the decoder can run a model of this configuration.

        Raises:
            ValueError: the first setting that it cannot run.
        """
        architecture = self.original_architecture
        refusals = {
            f"attention_dir={self.attention_dir!r}": self.attention_dir != "causal",
            f"normalization_type={self.normalization_type!r}": self.normalization_type not in NORMALIZATIONS,
            f"positional_embedding_type={self.positional_embedding_type!r}": (
                self.positional_embedding_type not in POSITIONS
            ),
            f"normalisation after the layers (original_architecture={architecture!r})": (
                self.use_normalization_before_and_after or architecture in POST_NORM_ARCHITECTURES
            ),
            "normalised queries and keys (use_qk_norm)": self.use_qk_norm or architecture == "OlmoeForCausalLM",
            "attention sinks (use_attention_sinks)": self.use_attention_sinks,
            f"clipped queries, keys and values (clip_qkv={self.clip_qkv})": self.clip_qkv is not None,
            "log-n attention (use_logn_attn)": self.use_logn_attn,
            "dynamic NTK rotary positions (use_dynamic_ntk_rope)": self.use_dynamic_ntk_rope,
            "YaRN rotary positions (use_yarn_rope)": self.use_yarn_rope,
            f"a mixture of experts (num_experts={self.num_experts})": bool(self.num_experts),
            "4-bit weights (load_in_4bit)": self.load_in_4bit,
            f"several devices (n_devices={self.n_devices})": self.n_devices > 1,
            f"a gated MLP with act_fn={self.act_fn!r}": self.gated_mlp and self.is_layer_norm_activation(),
            "use_attn_in with grouped queries; use use_split_qkv_input instead": (
                self.use_attn_in and self.n_key_value_heads is not None
            ),
        }
        for refusal, applies in refusals.items():
            if applies:
                raise ValueError(
                    f"sa_lens's decoder cannot run {refusal}: install transformer-lens<4, whose HookedTransformer is "
                    "used then, or choose another architecture"
                )
