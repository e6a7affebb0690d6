"""Gates that read the ablated stream (`scores="ablated"`), against the equations written out token by token."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_models import SHAPES, gated_model, gates_for, plain_model, random_tokens
from torch import Tensor

from sa_lens.config import GateConfig, LossConfig, ModelConfig
from sa_lens.core import HookedTransformer, SelfAblatingTransformer, TwoStreamLoss
from sa_lens.core.fused import fused_units

SHAPE = ModelConfig(n_layers=3, d_model=16, n_heads=4, d_mlp=20, n_ctx=8, d_vocab=23)
GATES = GateConfig(k_attn=3, k_mlp=4, temperature=0.7, scores="ablated")
LOSS = LossConfig(clean=0.7, ablated=1.3, reconstruction=0.3)


# ------------------------------------------------------------------------------------------------------ the slow twins


def straight_through(scores: Tensor, k: int, cfg: GateConfig) -> Tensor:
    """The mask of one row of scores, with the gradient of the soft weights."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))
    g, width = (scores[order[k - 1]] + scores[order[k]]) / 2, scores[order[k - 1]] - scores[order[k]]
    u = (scores - g) / (cfg.temperature * width + 1e-12)
    if cfg.surrogate == "sigmoid":
        v = torch.sigmoid(u)
        w = k * v / v.sum()
    else:
        w = torch.exp(u - u.max().detach())
        w = w / w.sum()
    if cfg.kind == "soft":
        return w
    hard = torch.zeros_like(scores)
    hard[order[:k]] = 1
    return hard + w - w.detach()


def slow_losses(
    p: dict[str, Tensor], tokens: Tensor, gates: GateConfig, n_layers: int, n_heads: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Clean loss, ablated loss, R and the masks of neurons by layer, for one sequence, from the parameters by name."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean()
        return centred / torch.sqrt((centred**2).mean() + 1e-5) * p[f"{name}.w"] + p[f"{name}.b"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    length = len(tokens)
    start = [p["embed.W_E"][tokens[t]] + p["pos_embed.W_pos"][t] for t in range(length)]
    clean, ablated, kept = list(start), list(start), []
    pairs: list[tuple[Tensor, Tensor]] = []
    for layer in range(n_layers):
        b = f"blocks.{layer}"

        def project(x: Tensor, which: str, b: str = b) -> Tensor:
            return torch.einsum("d,hde->he", norm(x, f"{b}.ln1"), p[f"{b}.attn.W_{which}"])

        keys, values = [project(x, "K") for x in clean], [project(x, "V") for x in clean]
        own_input = ablated if gates.scores == "ablated" else clean
        new_clean, new_ablated, masks = [], [], []
        for t in range(length):
            outputs = []
            for stream in (clean, ablated):
                x, is_ablated = stream[t], stream is ablated
                k = torch.stack([*keys[:t], project(x, "K")])
                v = torch.stack([*values[:t], project(x, "V")])
                z = []
                for head in range(n_heads):
                    a = torch.softmax(k[:, head] @ project(x, "Q")[head], 0)
                    z.append(a @ v[:, head])
                units = torch.cat(z)
                if is_ablated:
                    name = f"{b}.attn_gate"
                    scores = own_input[t] @ p[f"{name}.W_local"] + p[f"{name}.b_local"]
                    units = units * straight_through(scores, gates.k_attn, gates)
                x = x + units @ p[f"{b}.attn.W_O"].flatten(0, 1) + p[f"{b}.attn.b_O"]
                post = gelu(norm(x, f"{b}.ln2") @ p[f"{b}.mlp.W_in"] + p[f"{b}.mlp.b_in"])
                if is_ablated:
                    name = f"{b}.mlp_gate"
                    scores = own_input[t] @ p[f"{name}.W_local"] + p[f"{name}.b_local"]
                    masks.append(straight_through(scores, gates.k_mlp, gates))
                    post = post * masks[-1]
                outputs.append(x + post @ p[f"{b}.mlp.W_out"] + p[f"{b}.mlp.b_out"])
            new_clean.append(outputs[0])
            new_ablated.append(outputs[1])
        clean, ablated = new_clean, new_ablated
        kept.append(torch.stack(masks).detach())
        pairs += zip(clean, ablated, strict=True)
    final = [[norm(x, "ln_final") for x in stream] for stream in (clean, ablated)]
    pairs += zip(*final, strict=True)
    losses = []
    for stream in final:
        logits = [x @ p["embed.W_E"].T for x in stream]
        losses.append(-sum(torch.log_softmax(logits[t], 0)[tokens[t + 1]] for t in range(length - 1)) / (length - 1))
    distances = [((c / c.norm() - a / a.norm()) ** 2).mean() for c, a in pairs]
    return losses[0], losses[1], sum(distances) / len(distances), kept


def slow_ablated_logits(
    plain: HookedTransformer, model: SelfAblatingTransformer, tokens: Tensor, edit: tuple[str, Tensor] | None = None
) -> Tensor:
    """Ablated logits at every position: each prefix runs in the plain model, masked at its end, layer after layer.

    Args:
        edit: (hook point, what is added there at the end of each prefix).
    """
    weights = {name: p.detach() for name, p in model.named_parameters() if "_gate." in name}
    rows = []
    for t in range(tokens.shape[1]):
        prefix = tokens[:, : t + 1]
        masks: dict[str, Tensor] = {}

        def mask_end(x: Tensor, hook: object, masks: dict[str, Tensor] = masks) -> Tensor:
            x = x.clone()
            x[:, -1] *= masks[hook.name].view_as(x[:, -1])
            return x

        def add(x: Tensor, hook: object) -> Tensor:
            x = x.clone()
            x[:, -1] += edit[1]
            return x

        added = [] if edit is None else [(edit[0], add)]
        for layer in range(plain.cfg.n_layers):
            seen: list[Tensor] = []
            read = (f"blocks.{layer}.hook_resid_pre", lambda x, hook, seen=seen: seen.append(x[:, -1]))
            plain.run_with_hooks(prefix, fwd_hooks=[*added, *[(name, mask_end) for name in masks], read])
            for gate, k, name in (
                ("attn_gate", model.gates.k_attn, "attn.hook_z"),
                ("mlp_gate", model.gates.k_mlp, "mlp.hook_post"),
            ):
                prefix_of = f"blocks.{layer}.{gate}"
                if f"{prefix_of}.W_local" in weights:
                    scores = seen[0] @ weights[f"{prefix_of}.W_local"] + weights[f"{prefix_of}.b_local"]
                    chosen = torch.stack([row.argsort(descending=True, stable=True)[:k] for row in scores])
                    masks[f"blocks.{layer}.{name}"] = torch.zeros_like(scores).scatter(1, chosen, 1.0)
        rows.append(plain.run_with_hooks(prefix, fwd_hooks=[*added, *[(n, mask_end) for n in masks]])[:, -1])
    return torch.stack(rows, 1)


def own_gates(shape: str = "gpt2") -> GateConfig:
    return gates_for(shape, "local", scores="ablated")


# ---------------------------------------------------------------------------------------------------- losses, gradients


@pytest.mark.parametrize("scores", ["ablated", "learned"])
@pytest.mark.parametrize(("kind", "surrogate"), [("hard", "sigmoid"), ("hard", "softmax"), ("soft", "sigmoid")])
def test_losses_and_gradients_are_those_of_the_equations(kind: str, surrogate: str, scores: str) -> None:
    gates = dataclasses.replace(GATES, kind=kind, surrogate=surrogate, scores=scores)
    model = SelfAblatingTransformer(SHAPE, gates, seed=2, device="cpu").to(torch.float64, print_details=False)
    with torch.no_grad():  # far enough from the clean stream that it matters which one is read
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name != "pos_embed.W_pos":
                parameter.mul_(2)
    tokens = torch.randint(0, 23, (1, 7), generator=torch.Generator().manual_seed(1))
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    clean, ablated, distance, masks = slow_losses(parameters, tokens[0], gates, SHAPE.n_layers, SHAPE.n_heads)
    (0.7 * clean + 1.3 * ablated + 0.3 * distance).backward()
    for path in ("hooked", "fused"):
        model.zero_grad()
        terms = TwoStreamLoss(model, LOSS, path=path)(tokens)
        terms.total.backward()
        found = [x.item() for x in (terms.clean, terms.ablated, terms.reconstruction)]
        assert found == pytest.approx([x.item() for x in (clean, ablated, distance)], rel=1e-8)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                gradient = parameters[name].grad
                assert float((parameter.grad - gradient).norm()) <= 1e-8 * float(gradient.norm()), (path, name)
    streams = model.run_streams(tokens)
    torch.testing.assert_close(streams.mask_mlp[:, 0].detach(), torch.stack(masks), rtol=1e-10, atol=1e-10)
    if scores == "ablated" and kind == "hard":
        clean_masks = SelfAblatingTransformer.from_hooked(model, dataclasses.replace(gates, scores="learned"))
        clean_masks.load_state_dict(model.state_dict())
        assert not torch.equal(clean_masks.run_streams(tokens).mask_mlp, streams.mask_mlp), "the test can fail"


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("unit", ["channel", "head"])
@pytest.mark.parametrize("shape", ["gpt2", "llama", "pythia", "attention-only"])
def test_the_fused_path_equals_the_hooked_one(shape: str, unit: str, frozen: bool) -> None:
    gates = gates_for(shape, "local", scores="ablated", attn_unit=unit)
    model = SelfAblatingTransformer.from_hooked(plain_model(shape), gates).to(torch.float64, print_details=False)
    model.freeze_base(frozen)
    tokens, found = random_tokens(3, 9), {}
    for options in ({"path": "hooked"}, {"path": "fused"}, {"path": "fused", "checkpoint_activations": True}):
        model.zero_grad()
        terms = TwoStreamLoss(model, LOSS, **options)(tokens)
        terms.total.backward()
        found[str(options)] = terms, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    (expected, gradients), *others = found.values()
    assert all("_gate." in name for name in gradients) == frozen
    for terms, theirs in others:
        assert [x.item() for x in terms] == pytest.approx([x.item() for x in expected], rel=1e-8)
        assert theirs.keys() == gradients.keys()
        scale = 1e-15 * sum(float(g.norm()) for g in gradients.values())
        for name, gradient in gradients.items():
            assert float((theirs[name] - gradient).norm()) <= 1e-8 * float(gradient.norm()) + scale, name


# ---------------------------------------------------------------------------------------------------------- the streams


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_ablated_logits_are_those_of_prefixes_masked_layer_after_layer(shape: str) -> None:
    plain, tokens = plain_model(shape), random_tokens()
    model = SelfAblatingTransformer.from_hooked(plain, own_gates(shape))
    expected = slow_ablated_logits(plain, model, tokens)
    with model.ablated():
        torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)
    for position in (0, 3, -1):
        for masks in ("frozen", "live"):
            with model.ablated(position=position, masks=masks):
                logits, cache = model.run_with_cache(tokens)
            torch.testing.assert_close(logits[:, position], expected[:, position], rtol=1e-4, atol=1e-5)
            assert int(cache["mask", 0, "attn_gate"][:, position].sum()) == model.gates.k_attn * len(tokens)
    assert torch.equal(model(tokens), plain(tokens))
    streams = model.run_streams(tokens)
    recorded = model.record_masks(tokens)
    assert torch.equal(torch.stack(recorded["attn_gate"]), streams.mask_attn)
    assert streams.mask_mlp is None or torch.equal(torch.stack(recorded["mlp_gate"]), streams.mask_mlp)


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.0.hook_attn_out"])
@torch.no_grad()
def test_live_masks_see_edits_and_frozen_ones_do_not(hook: str) -> None:
    plain, tokens = plain_model(), random_tokens()
    model = SelfAblatingTransformer.from_hooked(plain, own_gates())
    change = torch.linspace(-2, 2, 16).square()

    def add(x: Tensor, hook: object) -> Tensor:
        return x + change

    def add_last(x: Tensor, hook: object) -> Tensor:
        x = x.clone()
        x[:, -1] += change
        return x

    expected = slow_ablated_logits(plain, model, tokens, (hook, change))
    own = model.run_streams(tokens).masks
    with model.ablated(masks="live"):
        live = model.run_with_hooks(tokens, fwd_hooks=[(hook, add)])
    torch.testing.assert_close(live, expected, rtol=1e-4, atol=1e-5)
    with model.ablated(position=-1, masks="live"):
        live_last = model.run_with_hooks(tokens, fwd_hooks=[(hook, add_last)])
    torch.testing.assert_close(live_last[:, -1], expected[:, -1], rtol=1e-4, atol=1e-5)
    for form, edit in (({}, add), ({"position": -1}, add_last)):
        with model.ablated(**form):
            frozen = model.run_with_hooks(tokens, fwd_hooks=[(hook, edit)])
        with model.ablated(**form, masks=own):
            given = model.run_with_hooks(tokens, fwd_hooks=[(hook, edit)])
        torch.testing.assert_close(frozen[:, -1], given[:, -1])
        assert float((frozen[:, -1] - expected[:, -1]).abs().max()) > 1e-2


@torch.no_grad()
def test_masks_given_for_some_gates_leave_the_others_as_they_are() -> None:
    model, tokens = SelfAblatingTransformer.from_hooked(plain_model(), own_gates()), random_tokens()
    own = model.run_streams(tokens).masks
    name = "blocks.0.mlp_gate.hook_mask"
    other = {name: own[name].roll(5, -1)}
    with model.ablated(masks=other):
        some = model(tokens)
    with model.ablated(masks={**own, **other}):
        torch.testing.assert_close(some, model(tokens))


@torch.no_grad()
def test_generation_is_that_of_prefixes_with_a_cache_and_without(tokenizer) -> None:
    plain, tokens = plain_model(), random_tokens(2, 4)
    plain.set_tokenizer(tokenizer)
    model = SelfAblatingTransformer.from_hooked(plain, own_gates())
    expected = tokens
    for _ in range(6):
        following = slow_ablated_logits(plain, model, expected)[:, -1].argmax(-1)
        expected = torch.cat([expected, following[:, None]], 1)
    options = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    seen: list[int] = []
    with model.ablated():
        assert torch.equal(model.generate(tokens, **options), expected)
        assert torch.equal(model.generate(tokens, use_past_kv_cache=False, **options), expected)
        with model.hooks([("blocks.1.mlp_gate.hook_mask", lambda x, hook: seen.append(x.shape[1]))]):
            assert torch.equal(model.generate(tokens, **options), expected)
    assert seen == [4, 1, 1, 1, 1, 1]
    assert not torch.equal(model.generate(tokens, **options), expected)


@torch.no_grad()
def test_units_read_without_hooks_are_those_of_hooks() -> None:
    model, tokens = SelfAblatingTransformer.from_hooked(plain_model(), own_gates()), random_tokens()
    found = fused_units(model, tokens)
    with model.ablated():
        _, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(found.ablated[1, "attn"], cache["z", 1].flatten(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.ablated[1, "mlp"], cache["post", 1], rtol=1e-4, atol=1e-5)
    assert torch.equal(found.masks[1, "mlp"], cache["mask", 1, "mlp_gate"])


# ------------------------------------------------------------------------------------------ files and refused arguments


def test_saved_and_loaded(tmp_path) -> None:
    model, tokens = SelfAblatingTransformer.from_hooked(plain_model(), own_gates()), random_tokens()
    loaded = SelfAblatingTransformer.from_pretrained(model.save_pretrained(tmp_path / "model"), device="cpu")
    assert loaded.gates == model.gates
    assert loaded.gates.reads_ablated
    assert torch.equal(loaded.run_streams(tokens).ablated_logits, model.run_streams(tokens).ablated_logits)
    assert all(p.requires_grad for p in loaded.gate_parameters())


@pytest.mark.parametrize("scope", ["global", "both"])
def test_gates_that_would_read_their_own_end_are_refused(scope: str) -> None:
    with pytest.raises(ValueError, match=rf"does not fit gates.scope='{scope}'.*set gates.scope='local'"):
        GateConfig(scope=scope, scores="ablated")
    assert not GateConfig(scope="none", scores="ablated").reads_ablated


def test_hooks_of_a_clean_pass_that_is_not_run_are_refused() -> None:
    model = SelfAblatingTransformer.from_hooked(plain_model(), own_gates())
    hooks = [("hook_embed", lambda x, hook: x)]
    with pytest.raises(ValueError, match="need no clean pass"), model.ablated(position=-1, clean_hooks=hooks):
        pass
    with model.ablated(masks="live", clean_hooks=hooks):
        model(random_tokens())
    with pytest.raises(ValueError, match="needs a position"), gated_model().ablated(masks="live"):
        pass
