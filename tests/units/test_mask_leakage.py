"""Masks that carry the answer are caught, masks that do not are not; every condition agrees with a loop over tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sa_lens as sa
from sa_lens.core import HookedTransformerConfig
from sa_lens.units import mask_leakage, probes
from sa_lens.units.mask_leakage import CONDITIONS, leakage, other_occurrences, permute_units

V, N_CTX = 6, 8


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    """Few steps are enough for probes of a few classes."""
    monkeypatch.setattr(probes, "PROBE_STEPS", 300)


def planted(kind, *, scope="local", gate_kind="hard"):
    """A model of texts `a b a b ...`, whose head in layer 0 copies the previous token: the answer.

    Residual stream: token (6), position (8), answer (6). Channels 0-5 of the head hold the copied token, the others
    nothing. Neuron j of layer 1 is always 1 and writes answer j. `honest`: the gates are static and keep channels 0-5,
    so that the ablated stream computes the answer itself. `smuggling`: channels 0-5 are never kept, but layer 1 keeps
    the neuron of the answer that the clean stream has computed.
    """
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=2 * V + N_CTX,
        n_heads=1,
        d_head=16,
        d_mlp=V,
        n_ctx=N_CTX,
        d_vocab=V,
        act_fn="relu",
        normalization_type=None,
        device="cpu",
        use_attn_scale=False,
    )
    gates = sa.GateConfig(scope=scope, k_attn=6, k_mlp=1, kind=gate_kind, temperature=0.02)
    model = sa.SelfAblatingTransformer(cfg, gates)
    token, position, answer = slice(0, V), slice(V, V + N_CTX), slice(V + N_CTX, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.W_E[:, token] = torch.eye(V)
        model.W_pos[:, position] = torch.eye(N_CTX)
        model.W_U[answer] = 5 * torch.eye(V)
        attn = model.blocks[0].attn
        for at in range(1, N_CTX):
            attn.W_Q[0, V + at, at - 1] = 100.0
        attn.W_K[0, position, :N_CTX] = torch.eye(N_CTX)
        attn.W_V[0, token, :V] = torch.eye(V)
        attn.W_O[0, :V, answer] = torch.eye(V)
        mlp = model.blocks[1].mlp
        mlp.b_in += 1
        mlp.W_out[:, answer] = torch.eye(V)
        for layer, block in enumerate(model.blocks):
            for name, parameter in (*block.attn_gate.named_parameters(), *block.mlp_gate.named_parameters()):
                if name.startswith("b_"):
                    parameter.copy_(-torch.arange(float(len(parameter))))
            for name, bias in block.attn_gate.named_parameters():
                if name.startswith("b_") and kind == "smuggling":
                    bias += 100.0 * (torch.arange(16) >= V)
            for name, weight in block.mlp_gate.named_parameters():
                if name.startswith("W_") and kind == "smuggling" and layer == 1:
                    weight[answer] = 100 * torch.eye(V)
    return model


def alternating(n=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.stack([torch.randperm(V, generator=generator)[:2] for _ in range(n)])
    return pairs.repeat(1, N_CTX // 2)


KINDS = [("local", "hard"), ("global", "hard"), ("both", "hard"), ("local", "soft"), ("global", "soft")]


@pytest.mark.parametrize(("scope", "gate_kind"), KINDS)
def test_a_smuggling_gate_is_caught(scope, gate_kind):
    model = planted("smuggling", scope=scope, gate_kind=gate_kind)
    found = leakage(model, alternating(), probe_tokens=400, progress=False)
    loss = found.losses.set_index("condition")
    assert found.summary["mask_share"] > 0.99
    assert loss.loc["mean_values", "difference"] == pytest.approx(0, abs=1e-3)
    for condition in ("other_occurrence", "shuffled", "random"):
        assert loss.loc[condition, "difference_low"] > 0.3
    probes = found.probes[found.probes["layer"] == 1].set_index("probe")
    assert probes.loc["mask", "nats"] < 0.5 * probes.loc["mask_shuffled", "nats"]
    assert found.summary["probe_mask_nats"] > 0.5
    if scope == "local":
        assert loss.loc["self_read", "difference_low"] > 0.3


@pytest.mark.parametrize(("scope", "gate_kind"), KINDS)
def test_an_honest_gate_is_not(scope, gate_kind):
    model = planted("honest", scope=scope, gate_kind=gate_kind)
    found = leakage(model, alternating(), probe_tokens=400, progress=False)
    loss = found.losses.set_index("condition")
    assert found.summary["mask_share"] == pytest.approx(0, abs=1e-3)
    assert loss.loc["mean_values", "difference_low"] > 0.3
    for condition in ("other_occurrence", "shuffled", *(["self_read"] if scope == "local" else [])):
        assert loss.loc[condition, "difference"] == pytest.approx(0, abs=1e-4)
    assert abs(found.summary["probe_mask_nats"]) < 1e-6


def noisy(scope="both", kind="hard", seed=1, **gates):
    """A model with random weights, noise on all of them."""
    cfg = sa.ModelConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=12, n_ctx=10, d_vocab=9, init="gpt2")
    model = sa.SelfAblatingTransformer(
        cfg, sa.GateConfig(scope=scope, kind=kind, k_attn=3, k_mlp=4, **gates), seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def text(n=6, length=7, seed=0, d_vocab=9):
    return torch.randint(0, d_vocab, (n, length), generator=torch.Generator().manual_seed(seed))


def nats_at(plain, sequence, t, value_of):
    """Nats of token t + 1, from the plain model on the tokens up to t, with units edited at position t alone."""

    def hook(x, hook):
        x[:, -1] = value_of(hook.name, x[:, -1])
        return x

    hooks = [(name, hook) for name in plain.hook_dict if name.endswith(("attn.hook_z", "mlp.hook_post"))]
    logits = plain.run_with_hooks(sequence[None, : t + 1], fwd_hooks=hooks)[0, -1]
    return float(-logits.log_softmax(-1)[sequence[t + 1]])


def gate_of(unit_hook):
    layer = unit_hook.split(".")[1]
    return f"blocks.{layer}.{'attn' if 'attn' in unit_hook else 'mlp'}_gate"


CASES = [
    {"scope": "local"},
    {"scope": "global", "attn_unit": "head"},
    {"kind": "soft"},
    {"scope": "local", "scores": "ablated"},
]


@pytest.mark.parametrize("gates", CASES, ids=str)
def test_every_condition_agrees_with_a_loop_over_tokens(gates):
    """The twin edits one position of one prompt of the plain model at a time, by ordinary hooks."""
    model, other, tokens = noisy(**gates), noisy(**gates, seed=2), text()
    found = leakage(model, tokens, other_seed=other, per_layer=True, probe_tokens=0, seed=4, progress=False)
    plain = model.to_hooked_transformer()
    fit, held_out = tokens[:3], tokens[3:]
    with torch.no_grad():
        fit_masks, masks = model.run_streams(fit).masks, model.run_streams(held_out).masks
        other_masks = other.run_streams(held_out).masks
    generator = torch.Generator().manual_seed(4)
    shuffled, donors = (other_occurrences(held_out, among, generator).tolist() for among in (held_out, fit))
    permuted = permute_units(masks, generator)

    def mean_of(gate):
        weighted, kept, plain_sum, n = 0, 0, 0, 0
        with torch.no_grad(), model.ablated():
            for sequence in fit:
                _, cache = model.run_with_cache(sequence[None])
                for t in range(len(sequence)):
                    value, mask = cache[f"{gate}.hook_in"][0, t], cache[f"{gate}.hook_mask"][0, t]
                    weighted, kept = weighted + value * mask, kept + mask
                    plain_sum, n = plain_sum + value, n + 1
        return torch.where(torch.as_tensor(kept) > 0, weighted / kept, plain_sum / n)

    means = {gate: mean_of(gate) for gate in {name.rsplit(".", 1)[0] for name in masks}}

    def mask_at(condition, gate, row, t):
        name, length = f"{gate}.hook_mask", held_out.shape[1]
        if condition == "clean":
            return torch.ones_like(masks[name][row, t])
        if condition in ("shuffled", "mean_values_shuffled"):
            return masks[name][divmod(shuffled[row][t], length)]
        if condition == "other_occurrence":
            return fit_masks[name][divmod(donors[row][t], length)]
        taken = {"random": permuted, "other_seed": other_masks}.get(condition, masks)
        return taken[name][row, t]

    for _, line in found.losses.iterrows():
        condition, layer = line["condition"], line["layer"]
        if condition == "self_read":
            assert gates.get("scores") != "ablated" or line["difference"] == pytest.approx(0, abs=1e-6)
            continue
        at = {"shuffled": shuffled, "mean_values_shuffled": shuffled, "other_occurrence": donors}.get(condition)
        nats, unchanged = [], []
        for row, sequence in enumerate(held_out):
            for t in range(len(sequence) - 1):
                if at is not None and at[row][t] < 0:
                    continue

                def edited(name, value, row=row, t=t, condition=condition, layer=layer):
                    gate = gate_of(name)
                    acts = layer in ("all", int(gate.split(".")[1]))
                    if acts and condition.startswith("mean_values"):
                        value = means[gate].expand_as(value)
                    return value * mask_at(condition if acts else "ablated", gate, row, t)

                def ablated(name, value, row=row, t=t):
                    return value * masks[f"{gate_of(name)}.hook_mask"][row, t]

                with torch.no_grad():
                    nats.append(nats_at(plain, sequence, t, edited))
                    unchanged.append(nats_at(plain, sequence, t, ablated))
        assert line["n"] == len(nats)
        assert line["loss"] == pytest.approx(np.mean(nats), abs=1e-5), (condition, layer)
        assert line["ablated"] == pytest.approx(np.mean(unchanged), abs=1e-5)
        assert line["difference"] == pytest.approx(np.mean(nats) - np.mean(unchanged), abs=1e-5)
        assert line["difference_low"] <= line["difference"] <= line["difference_high"]
    expected = [c for c in CONDITIONS if c != "self_read" or gates.get("scope") == "local"]
    assert found.losses.loc[found.losses["layer"] == "all", "condition"].tolist() == expected


def test_self_reading_selects_by_the_ablated_stream_itself():
    """The twin runs layer by layer on one prompt, with masks from the residual stream at hand."""
    model, tokens = noisy("local"), text()
    found = leakage(model, tokens, probe_tokens=0, progress=False).losses.set_index("condition")
    plain = model.to_hooked_transformer()
    nats = []
    for sequence in tokens[3:]:
        for t in range(len(sequence) - 1):
            resid = {}

            def keep(x, hook, resid=resid):
                resid[hook.layer()] = x[0, -1]

            def edit(x, hook, resid=resid):
                gate = model.get_submodule(gate_of(hook.name))
                scores = resid[hook.layer()] @ gate.W_local + gate.b_local
                mask = torch.zeros_like(scores).index_fill(0, scores.topk(gate.k).indices, 1)
                x[0, -1] = x[0, -1] * mask.view_as(x[0, -1])
                return x

            hooks = [(f"blocks.{layer}.hook_resid_pre", keep) for layer in range(2)]
            hooks += [
                (f"blocks.{layer}.{name}", edit) for layer in range(2) for name in ("attn.hook_z", "mlp.hook_post")
            ]
            with torch.no_grad():
                logits = plain.run_with_hooks(sequence[None, : t + 1], fwd_hooks=hooks)[0, -1]
            nats.append(float(-logits.log_softmax(-1)[sequence[t + 1]]))
    assert found.loc["self_read", "loss"] == pytest.approx(np.mean(nats), abs=1e-5)


def test_the_same_seed_gives_the_same_tables_and_leaves_the_random_state(monkeypatch):
    monkeypatch.setattr(mask_leakage, "PROBE_CLASSES", 4)
    model, tokens = noisy(), text(n=8)
    state = torch.random.get_rng_state()
    first, second, third = (leakage(model, tokens, seed=seed, progress=False) for seed in (3, 3, 5))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.losses.equals(second.losses)
    assert first.probes.equals(second.probes)
    assert not first.losses.equals(third.losses)
    assert set(first.probes["probe"]) == {"frequency", "token", "mask", "mask_shuffled", "residual"}
    assert set(first.probes["layer"]) == {0, 1, "all"}


def test_masks_of_another_seed_have_their_probe():
    found = leakage(noisy(), text(n=8), other_seed=noisy(seed=2), progress=False)
    assert set(found.probes.loc[found.probes["probe"] == "mask_other_seed", "layer"]) == {0, 1, "all"}


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (text(n=3), "3 blocks of 7 tokens: at least 4"),
        (text(length=1), "6 blocks of 1 tokens"),
        (text().float(), "integers"),
        (text()[0], "integers"),
        (text(length=11), "longer than n_ctx=10"),
        (text(d_vocab=12), "vocabulary of 9"),
        (torch.arange(8).reshape(4, 2), "no token occurs twice"),
    ],
)
def test_texts_that_do_not_fit_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        leakage(noisy(), tokens, progress=False)


def test_models_that_do_not_fit_are_refused():
    model = noisy()
    ungated = sa.SelfAblatingTransformer(
        sa.ModelConfig(n_layers=1, d_model=8, n_heads=2, n_ctx=8, d_vocab=9), sa.GateConfig(scope="none")
    )
    with pytest.raises(ValueError, match="needs gates"):
        leakage(ungated, text(), progress=False)
    with pytest.raises(ValueError, match="a second model"):
        leakage(model, text(), other_seed=model, progress=False)
    with pytest.raises(ValueError, match="differs from the model in kind"):
        leakage(model, text(), other_seed=noisy(kind="soft"), progress=False)
    with pytest.raises(ValueError, match="differs from the model in scope"):
        leakage(noisy(scope="local"), text(), other_seed=noisy(scope="global"), progress=False)
    with pytest.raises(ValueError, match="probe_tokens=-1"):
        leakage(model, text(), probe_tokens=-1, progress=False)


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=6), st.integers(0, 9))
def test_another_occurrence_of_the_same_token(rows, seed):
    tokens = torch.tensor(rows)
    flat = tokens.flatten().tolist()
    permutation = other_occurrences(tokens, tokens, torch.Generator().manual_seed(seed)).flatten().tolist()
    for i, donor in enumerate(permutation):
        if flat.count(flat[i]) == 1:
            assert donor == -1
        else:
            assert donor != i
            assert flat[donor] == flat[i]
    used = [donor for donor in permutation if donor >= 0]
    assert sorted(used) == [i for i, token in enumerate(flat) if flat.count(token) > 1]
    among = tokens[:1].clone()
    drawn = other_occurrences(tokens, among, torch.Generator().manual_seed(seed)).flatten().tolist()
    for token, donor in zip(flat, drawn, strict=True):
        assert (donor == -1) == (token not in rows[0])
        assert donor == -1 or rows[0][donor] == token


def test_donors_are_drawn_evenly():
    tokens, among = torch.zeros(1, 4000, dtype=torch.long), torch.tensor([[0, 1, 0, 0, 1]])
    drawn = other_occurrences(tokens, among, torch.Generator().manual_seed(0)).flatten()
    counts = torch.bincount(drawn, minlength=5)
    assert counts[1] == counts[4] == 0
    assert counts[[0, 2, 3]].min() > 1200


def test_permuted_masks_are_as_large_and_elsewhere():
    generator = torch.Generator().manual_seed(0)
    masks = {"a": torch.rand(3, 4, 2, 5), "b": (torch.rand(3, 4, 7) > 0.5)}
    permuted = permute_units(masks, generator)
    for name, mask in masks.items():
        assert permuted[name].shape == mask.shape
        assert torch.equal(permuted[name].flatten(2).sort(-1).values, mask.flatten(2).sort(-1).values)
        assert not torch.equal(permuted[name], mask)
