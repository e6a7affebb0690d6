"""What a stream is from outside: which positions and hooks it touches, how contexts nest, what goes back as it was."""

from __future__ import annotations

import copy
import pickle
import threading

import oracle
import pytest
import torch
from small_models import SHAPES, gated_model, gates_for, plain_model, random_tokens

from sa_lens.config import GateConfig
from sa_lens.core import SelfAblatingTransformer

ATTN_MASK = "blocks.{}.attn_gate.hook_mask"
FORMS = {"all": {}, "one": {"position": -1}}


def ablated_logits(model, tokens, **options):
    with model.ablated(**options):
        return model(tokens)


# ----------------------------------------------------------------------------------------------- streams and positions


@pytest.mark.parametrize("shape", SHAPES)
def test_clean_logits_are_those_of_the_plain_transformer_bit_for_bit(shape):
    plain, tokens = plain_model(shape), random_tokens()
    model = SelfAblatingTransformer.from_hooked(plain, gates_for(shape, "both"))
    assert torch.equal(model(tokens), plain(tokens))
    assert torch.equal(model.run_streams(tokens).clean_logits, plain(tokens))
    assert torch.equal(model.to_hooked_transformer()(tokens), plain(tokens))


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_all_units_make_the_ablated_stream_the_clean_one(shape, kind):
    plain, tokens = plain_model(shape), random_tokens()
    model = SelfAblatingTransformer.from_hooked(plain, GateConfig(scope="both", k_attn=16, k_mlp=24, kind=kind))
    for form in FORMS.values():
        torch.testing.assert_close(ablated_logits(model, tokens, **form), plain(tokens), rtol=1e-6, atol=1e-6)


def bump(position):
    def hook(x, hook):
        x = x.clone()
        x[:, position] += torch.linspace(-1, 1, x.shape[-1]).square()
        return x

    return hook


@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.0.hook_resid_pre", "blocks.0.attn.hook_v", "blocks.0.attn.hook_k"]
)
@pytest.mark.parametrize("scope", ["local", "global"])
@torch.no_grad()
def test_where_an_edit_shows(scope, name):
    model, tokens = gated_model(scope=scope), random_tokens()
    before = ablated_logits(model, tokens)
    with model.ablated():
        after = model.run_with_hooks(tokens, fwd_hooks=[(name, bump(2))])
    moved = (after - before).abs().amax((0, 2)) > 1e-4  # rounding leaves 1e-6 elsewhere
    assert moved.tolist() == [t == 2 for t in range(7)]
    for i in range(7):
        with model.ablated(position=4):
            before, after = model(tokens), model.run_with_hooks(tokens, fwd_hooks=[(name, bump(i))])
        assert bool((after - before)[:, 4].abs().max() > 1e-4) == (i <= 4)


@pytest.mark.parametrize("shape", ["gpt2", "pythia", "alibi"])
@pytest.mark.parametrize("scope", ["local", "global", "both"])
@torch.no_grad()
def test_no_future_token_changes_the_past(shape, scope):
    model, tokens = gated_model(shape, scope), random_tokens()
    changed = tokens.clone()
    changed[:, 4:] = (tokens[:, 4:] + 1) % 23
    first, second = model.run_streams(tokens), model.run_streams(changed)
    torch.testing.assert_close(first.clean_logits[:, :4], second.clean_logits[:, :4])
    torch.testing.assert_close(first.ablated_logits[:, :4], second.ablated_logits[:, :4])
    assert torch.equal(first.mask_attn[:, :, :4], second.mask_attn[:, :, :4])
    assert torch.equal(first.mask_mlp[:, :, :4], second.mask_mlp[:, :, :4])
    assert not torch.equal(first.ablated_logits[:, 4:], second.ablated_logits[:, 4:])


@pytest.mark.parametrize("attn_unit", ["channel", "head"])
@pytest.mark.parametrize("scope", ["local", "global", "both"])
@torch.no_grad()
def test_exactly_k_units_stay_per_token_and_layer(scope, attn_unit):
    model = gated_model(scope=scope, attn_unit=attn_unit)
    with torch.no_grad():  # a constant and a duplicated score in every row
        for block in model.blocks:
            for gate in (block.attn_gate, block.mlp_gate):
                for parameter in gate.parameters():
                    parameter[..., 1:4] = 0
    streams = model.run_streams(random_tokens(3, 9))
    assert (streams.mask_attn.flatten(3).sum(-1) == model.gates.k_attn).all()
    assert (streams.mask_mlp.sum(-1) == model.gates.k_mlp).all()
    assert set(streams.mask_attn.unique().tolist()) == {0.0, 1.0}
    assert streams.mask_attn.shape == (2, 3, 9, 4, 4 if attn_unit == "channel" else 1)


# --------------------------------------------------------------------------------------------------------------- hooks


def gate_hooks(layer):
    return [f"blocks.{layer}.{g}_gate.hook_{h}" for g in ("attn", "mlp") for h in ("in", "scores", "mask")]


def test_names_of_the_hooks():
    model = gated_model(scope="both")
    of_a_layer = [
        *("attn.hook_k", "attn.hook_q", "attn.hook_v", "attn.hook_z", "attn.hook_attn_scores", "attn.hook_pattern"),
        *("attn.hook_result", "attn_gate.hook_in", "attn_gate.hook_scores", "attn_gate.hook_mask"),
        *("mlp.hook_pre", "mlp.hook_post", "mlp_gate.hook_in", "mlp_gate.hook_scores", "mlp_gate.hook_mask"),
        *("ln1.hook_scale", "ln1.hook_normalized", "ln2.hook_scale", "ln2.hook_normalized"),
        *("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in", "hook_attn_out"),
        *("hook_mlp_out", "hook_resid_pre", "hook_resid_mid", "hook_resid_post"),
    ]
    expected = [
        *("hook_embed", "hook_pos_embed", "ln_final.hook_scale", "ln_final.hook_normalized"),
        *("unembed.hook_in", "unembed.hook_out"),
        *(f"blocks.{layer}.{name}" for layer in range(2) for name in of_a_layer),
    ]
    assert sorted(model.hook_dict) == sorted(expected)
    plain = plain_model()
    assert set(model.hook_dict) - set(plain.hook_dict) == {*gate_hooks(0), *gate_hooks(1)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scope", ["local", "global", "both"])
@pytest.mark.parametrize("shape", ["gpt2", "pythia", "llama", "attention-only"])
@torch.no_grad()
def test_every_hook_fires_once_in_a_cached_ablated_pass(shape, scope, form):
    plain, tokens = plain_model(shape), random_tokens()
    model = SelfAblatingTransformer.from_hooked(plain, gates_for(shape, scope))
    for each in (plain, model):
        each.set_use_attn_result(True)
        if shape != "attention-only":
            each.set_use_hook_mlp_in(True)
    _, clean_cache = plain.run_with_cache(tokens)
    gates = [name for layer in range(2) for name in gate_hooks(layer) if name in model.hook_dict]
    fired: dict[str, list[str]] = {}
    for each, into in ((plain, "plain"), (model, "model")):
        names = {*clean_cache, *gates}
        names_here = fired.setdefault(into, [])
        each.add_hook(names.__contains__, lambda x, hook, names_here=names_here: names_here.append(hook.name))
    plain.run_with_cache(tokens)
    with model.ablated(**FORMS[form]):
        _, cache = model.run_with_cache(tokens)
    assert set(cache) == {*clean_cache, *gates}
    for name in clean_cache:
        assert cache[name].shape == clean_cache[name].shape, name
    assert sorted(fired["model"]) == sorted([*fired["plain"], *gates])
    # TransformerLens itself runs ln1 three times, for query, key and value
    assert all(fired["model"].count(name) == 1 for name in cache if ".ln1." not in name)
    fired["model"].clear()
    model.run_with_cache(tokens)
    assert sorted(fired["model"]) == sorted(fired["plain"])


@torch.no_grad()
def test_shapes_and_values_at_the_gates_hooks():
    model, plain, tokens = gated_model(), plain_model(), random_tokens()
    with model.ablated():
        _, cache = model.run_with_cache(tokens)
    assert cache["mask", 1, "attn_gate"].shape == (2, 7, 4, 4)
    assert cache["scores", 0, "attn_gate"].shape == (2, 7, 4, 4)
    assert cache["mask", 1, "mlp_gate"].shape == (2, 7, 24)
    masks = oracle.slow_masks(plain, model, tokens)
    for layer in range(2):
        for gate, point in (("attn_gate", "attn.hook_z"), ("mlp_gate", "mlp.hook_post")):
            name = f"blocks.{layer}.{gate}"
            assert torch.equal(cache[f"{name}.hook_mask"], masks[f"blocks.{layer}.{point}"])
            product = cache[f"{name}.hook_in"] * cache[f"{name}.hook_mask"]
            assert torch.equal(cache[f"blocks.{layer}.{point}"], product)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*gate_hooks(0), *gate_hooks(1)])
@torch.no_grad()
def test_an_edit_at_a_gate_changes_the_ablated_stream_alone(name, form):
    model, tokens = gated_model(), random_tokens()

    def reverse(x, hook):
        return 1 - x if "mask" in hook.name else -x

    hooks = [(name, reverse)]
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=hooks), model(tokens))
    with model.ablated(**FORMS[form]):
        edited = model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert (edited - model(tokens))[:, -1].abs().max() > 1e-4
    with model.hooks(fwd_hooks=hooks):
        streams = model.run_streams(tokens)
    assert torch.equal(streams.clean_logits, model(tokens))
    assert (streams.ablated_logits - ablated_logits(model, tokens)).abs().max() > 1e-4


@torch.no_grad()
def test_an_edit_of_the_scores_selects_again():
    model, tokens = gated_model(), random_tokens()
    masks = {}

    def force(x, hook):
        x = x.clone()
        x[..., 0] = float("inf")
        x[..., 1] = -float("inf")
        return x

    hooks = [
        ("blocks.0.mlp_gate.hook_scores", force),
        ("blocks.0.mlp_gate.hook_mask", lambda x, hook: masks.__setitem__(0, x)),
    ]
    with model.ablated():
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert logits.isfinite().all()
    assert (masks[0][..., 0] == 1).all()
    assert (masks[0][..., 1] == 0).all()
    assert (masks[0].sum(-1) == model.gates.k_mlp).all()


@pytest.mark.parametrize("stream", ["clean", *FORMS])
@pytest.mark.parametrize("shape", ["gpt2", "pythia", "llama", "attention-only", "alibi"])
@torch.no_grad()
def test_decompositions_add_up_to_the_residual_stream(shape, stream):
    model, tokens = gated_model(shape), random_tokens()
    if stream == "clean":
        _, cache = model.run_with_cache(tokens)
    else:
        with model.ablated(**FORMS[stream]):
            _, cache = model.run_with_cache(tokens)
    end = cache["resid_post", 1]

    def adds_up(parts):
        torch.testing.assert_close(parts, end, rtol=1e-4, atol=2e-5)

    parts = cache.decompose_resid()
    adds_up(parts.sum(0))
    if shape != "attention-only":
        adds_up(cache.accumulated_resid(layer=-1)[-1])
    else:
        adds_up(cache.accumulated_resid(layer=-1, incl_mid=False)[-1])
    attn_bias = sum(block.attn.b_O for block in model.blocks)
    embedded = sum(cache[name] for name in ("hook_embed", "hook_pos_embed") if name in cache)
    if shape == "alibi":
        embedded = cache["resid_pre", 0]
    mlps = sum(cache["mlp_out", layer] for layer in range(2)) if shape != "attention-only" else 0
    adds_up(cache.stack_head_results().sum(0) + attn_bias + embedded + mlps)
    if shape != "attention-only":
        mlp_bias = sum(block.mlp.b_out for block in model.blocks)
        attns = sum(cache["attn_out", layer] for layer in range(2))
        adds_up(cache.stack_neuron_results(layer=2).sum(0) + mlp_bias + attns + embedded)


# ------------------------------------------------------------------------------------------------ contexts and threads


@torch.no_grad()
def test_contexts_nest_and_restore():
    model, tokens = gated_model(), random_tokens()
    clean, everywhere = model(tokens), ablated_logits(model, tokens)
    one = ablated_logits(model, tokens, position=2)
    with model.ablated() as same:
        assert same is model
        assert torch.equal(model(tokens), everywhere)
        with model.clean():
            assert torch.equal(model(tokens), clean)
            with model.ablated(position=2):
                assert torch.equal(model(tokens), one)
            assert torch.equal(model(tokens), clean)
        assert torch.equal(model(tokens), everywhere)
        assert torch.equal(model.run_streams(tokens).clean_logits, clean)
    assert torch.equal(model(tokens), clean)


def tables(model):
    """Every hook table of the model, to be compared before and after."""
    return {
        name: (list(point._forward_hooks), len(point.fwd_hooks), len(point._backward_hooks))
        for name, point in model.hook_dict.items()
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["blocks.0.attn.hook_z", "blocks.1.mlp_gate.hook_mask", "hook_embed"])
@torch.no_grad()
def test_an_exception_leaves_everything_as_it_was(name, form):
    model, tokens = gated_model(), random_tokens()
    kept: list[torch.Tensor] = []
    model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: kept.append(x))
    clean, before = model(tokens), tables(model)

    def fail(x, hook):
        raise RuntimeError("from a hook")

    def as_it_was():
        assert tables(model) == before
        kept.clear()
        assert torch.equal(model(tokens), clean)
        assert len(kept) == 1

    with pytest.raises(RuntimeError, match="from a hook"), model.ablated(**FORMS[form]):
        model.run_with_hooks(tokens, fwd_hooks=[(name, fail)])
    as_it_was()
    with pytest.raises(RuntimeError, match="from a hook"), model.ablated(clean_hooks=[("hook_embed", fail)]):
        model(tokens)
    as_it_was()
    with pytest.raises(RuntimeError, match="from a hook"), model.hooks(fwd_hooks=[(name, fail)]):
        model.run_streams(tokens)
    as_it_was()
    with model.ablated():
        expected = model(tokens)
        with (
            pytest.raises(RuntimeError, match="from a hook"),
            model.clean(),
            model.hooks(fwd_hooks=[("hook_embed", fail)]),
        ):
            model(tokens)
        assert torch.equal(model(tokens), expected)


@torch.no_grad()
def test_hooks_of_the_caller_survive_and_fire_in_the_ablated_pass_alone():
    model, tokens = gated_model(), random_tokens()
    seen: list[str] = []
    model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: seen.append(hook.name))
    before = tables(model)
    for run in (lambda: ablated_logits(model, tokens), lambda: model.run_streams(tokens)):
        seen.clear()
        run()
        assert len(seen) == 1
        assert tables(model) == before


@torch.no_grad()
def test_a_context_belongs_to_its_model_and_thread():
    model, other, tokens = gated_model(), gated_model(seed=5), random_tokens()
    clean, everywhere = model(tokens), ablated_logits(model, tokens)
    other_clean = other(tokens)
    barrier, results = threading.Barrier(2), {}

    def work(stream):
        context = model.ablated() if stream == "ablated" else model.clean()
        with torch.no_grad(), context:
            found = []
            for _ in range(20):
                barrier.wait(timeout=30)
                found.append(model(tokens))
            results[stream] = found

    threads = [threading.Thread(target=work, args=(stream,)) for stream in ("clean", "ablated")]
    with model.ablated(position=0):
        assert torch.equal(other(tokens), other_clean)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found, clean) for found in results["clean"])
    assert all(torch.equal(found, everywhere) for found in results["ablated"])
    assert len(results["clean"]) == len(results["ablated"]) == 20


def test_grad_mode_is_the_callers():
    model, tokens = gated_model(), random_tokens()
    for form in FORMS.values():
        assert ablated_logits(model, tokens, **form).requires_grad
        with torch.no_grad():
            assert not ablated_logits(model, tokens, **form).requires_grad
        with torch.inference_mode():
            assert ablated_logits(model, tokens, **form).is_inference()


@pytest.mark.parametrize("form", FORMS)
def test_gradients_flow_through_the_clean_pass(form):
    """By finite differences, on the soft gates, whose forward value is differentiable."""
    plain = plain_model("gpt2", dtype=torch.float64)
    model = SelfAblatingTransformer.from_hooked(plain, gates_for("gpt2", "both", kind="soft"), seed=3)
    tokens = random_tokens(1, 5)

    def value():
        return ablated_logits(model, tokens, **FORMS[form])[0, -1].square().sum()

    value().backward()
    generator = torch.Generator().manual_seed(0)
    for name in ("embed.W_E", "blocks.0.attn.W_V", "blocks.1.mlp.W_in", "blocks.0.mlp_gate.W_global", "ln_final.w"):
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        expected = (parameter.grad * direction).sum()
        ends = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                parameter += step * direction
                ends.append(value())
        with torch.no_grad():
            parameter += 1e-6 * direction
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, expected, rtol=1e-4, atol=1e-6)


def test_backward_hooks_of_the_caller_fire_once():
    model, tokens = gated_model(), random_tokens()
    with model.ablated():
        _, cache = model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
        gradients = {}
        model.zero_grad()
        with model.hooks(bwd_hooks=[("blocks.0.attn.hook_z", lambda g, hook: gradients.setdefault(hook.name, g))]):
            model(tokens, return_type="loss").backward()
    assert "blocks.0.attn.hook_z_grad" in cache
    torch.testing.assert_close(cache["blocks.0.attn.hook_z_grad"], gradients["blocks.0.attn.hook_z"])


@pytest.mark.filterwarnings("ignore:the loss in ablated")
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@pytest.mark.parametrize("options", [{}, {"position": -1}, {"position": -1, "masks": "live"}], ids=str)
def test_backward_hooks_get_the_gradient_of_what_is_added_at_their_point(shape, options):
    """The slow twin adds a tensor of zeros at the hook point and asks for its gradient."""
    model, tokens = gated_model(shape), random_tokens()
    rotary = shape == "llama"
    names = [f"blocks.0.attn.hook_{at}" for at in ("q", "k", "v", "attn_scores", "pattern", "z")]
    names += ["blocks.1.attn.hook_v", "blocks.1.hook_resid_pre", "blocks.1.mlp.hook_post", "blocks.1.hook_resid_post"]
    names += [f"blocks.{layer}.attn.hook_rot_{at}" for layer in (0, 1) for at in "qk"] if rotary else []
    for name in names:
        found: list[torch.Tensor] = []
        added: list[torch.Tensor] = []

        def add(x, hook, added=added):
            added.append(torch.zeros_like(x, requires_grad=True))
            return x + added[-1]

        with model.ablated(**options):
            with model.hooks(bwd_hooks=[(name, lambda g, hook, found=found: found.append(g.clone()))]):
                model(tokens, return_type="loss").backward()
            with model.hooks(fwd_hooks=[(name, add)]):
                loss = model(tokens, return_type="loss")
        # with live gates the point is passed twice, and the first time may have no consequence
        expected = torch.autograd.grad(loss, added, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(sum(found), sum(expected), msg=lambda text, name=name: f"{name}: {text}")


def test_the_loss_with_masks_at_the_last_position_is_the_clean_one_and_says_so():
    model, tokens = gated_model(), random_tokens()
    with model.ablated(position=-1), pytest.warns(UserWarning, match="is that of the clean logits"):
        loss = model(tokens, return_type="loss")
    torch.testing.assert_close(loss, model(tokens, return_type="loss"))


def test_a_backward_hook_may_change_the_gradient():
    model, tokens = gated_model(), random_tokens()
    with model.ablated(), model.hooks(bwd_hooks=[("blocks.0.attn.hook_v", lambda g, hook: (torch.zeros_like(g),))]):
        model(tokens, return_type="loss").backward()
    # keys and values of earlier positions are the clean stream's, whose hooks are silent
    with model.ablated(), model.hooks(fwd_hooks=[("blocks.0.attn.hook_v", lambda x, hook: x.detach())]):
        loss = model(tokens, return_type="loss")
    parameter = model.blocks[0].attn.W_V
    torch.testing.assert_close(parameter.grad, torch.autograd.grad(loss, parameter)[0])
    assert not any(point._backward_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_hook_that_writes_into_a_mask_leaves_what_was_given_alone(form):
    model, tokens = gated_model(), random_tokens()
    masks = model.run_streams(tokens).masks
    before = {name: mask.clone() for name, mask in masks.items()}

    def nothing_stays(mask, hook):
        mask[:] = 0
        return mask

    with model.ablated(masks=masks, **FORMS[form]):
        model.run_with_hooks(tokens, fwd_hooks=[(ATTN_MASK.format(0), nothing_stays)])
    assert all(torch.equal(masks[name], mask) for name, mask in before.items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@torch.no_grad()
def test_copies_are_equal_and_start_on_the_clean_stream(copied):
    for model in (gated_model(), gated_model("gpt2", "both")):
        tokens = random_tokens()
        with model.ablated():
            expected = model(tokens)
            twin = copied(model)
            assert torch.equal(twin(tokens), plain_model()(tokens))
        assert torch.equal(ablated_logits(twin, tokens), expected)
        assert torch.equal(twin(tokens), model(tokens))
        with twin.ablated():
            assert torch.equal(model(tokens), twin.run_streams(tokens).clean_logits)
        twin.embed.W_E += 1
        assert not torch.equal(twin(tokens), model(tokens))


# ------------------------------------------------------------------------------------------------ gates, masks, edits


@torch.no_grad()
def test_frozen_gates_do_not_see_edits_and_live_gates_do():
    model, tokens = gated_model(), random_tokens()
    masks = {}
    hooks = [
        ("blocks.0.hook_resid_pre", lambda x, hook: -x),
        ("blocks.0.attn_gate.hook_mask", lambda x, hook: masks.__setitem__(0, x.clone())),
    ]
    unedited = model.run_streams(tokens).mask_attn[0]
    with model.ablated(position=-1):
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert torch.equal(masks[0], unedited)
    with model.ablated(position=-1, masks="live"):
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    gate = model.blocks[0].attn_gate
    _, cache = model.run_with_cache(tokens)
    scores = -cache["resid_pre", 0] @ gate.W_local + gate.b_local
    expected = [oracle.slow_top_k(row, 4) for row in scores.flatten(0, 1).tolist()]
    assert masks[0].flatten(2).flatten(0, 1).tolist() == expected


@torch.no_grad()
def test_given_masks_are_used_and_silence_the_scores():
    model, tokens, others = gated_model(), random_tokens(), random_tokens(seed=1)
    masks = model.run_streams(others).masks
    plain = plain_model()
    fired: list[str] = []
    model.add_hook(lambda name: "_gate" in name, lambda x, hook: fired.append(hook.name))
    hooks = oracle.masking_hooks(oracle.slow_masks(plain, model, others), 3)
    with model.ablated(position=3, masks=masks):
        torch.testing.assert_close(model(tokens), plain.run_with_hooks(tokens, fwd_hooks=hooks), rtol=1e-5, atol=1e-5)
    assert sorted(fired) == sorted(n for layer in range(2) for n in gate_hooks(layer) if "scores" not in n)
    model.reset_hooks()
    assert torch.equal(ablated_logits(model, others, masks=masks), ablated_logits(model, others))
    assert not torch.equal(ablated_logits(model, tokens, masks=masks), ablated_logits(model, tokens))
    with model.ablated():
        _, cache = model.run_with_cache(others)
    assert torch.equal(ablated_logits(model, others, masks=cache), ablated_logits(model, others))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_some_masks_given_and_the_others_computed(form):
    model, tokens = gated_model(), random_tokens()
    name = ATTN_MASK.format(1)
    ones = torch.ones(2, 7, 4, 4)
    given = ablated_logits(model, tokens, masks={name: ones.bool()}, **FORMS[form])
    with model.ablated(**FORMS[form]):
        expected = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: ones)])
    assert torch.equal(given, expected)


@torch.no_grad()
def test_clean_hooks_edit_the_clean_pass():
    """Editing the clean pass's embedding moves keys, values and masks of the ablated one, which keeps its own."""
    plain, model, tokens = plain_model(), gated_model(), random_tokens()

    def shift(x, hook):
        return x + torch.linspace(-1, 1, x.shape[-1])

    with plain.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", shift)]):
        masks = oracle.slow_masks(plain, model, tokens)
        _, clean = plain.run_with_cache(tokens)
    t = 4

    def keep_earlier(x, hook):
        x = x.clone()
        x[:, :t] = clean[hook.name][:, :t]
        return x

    points = [f"blocks.{layer}.attn.hook_{letter}" for layer in range(2) for letter in "kv"]
    hooks = [*oracle.masking_hooks(masks, t), *((point, keep_earlier) for point in points)]
    expected = plain.run_with_hooks(tokens, fwd_hooks=hooks)[:, t]
    found = ablated_logits(model, tokens, clean_hooks=[("blocks.0.hook_resid_pre", shift)])[:, t]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    by_filter = ablated_logits(model, tokens, clean_hooks=[(lambda n: n == "blocks.0.hook_resid_pre", shift)])[:, t]
    assert torch.equal(found, by_filter)


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_model_without_gates_says_so():
    model = gated_model(scope="none")
    with pytest.raises(ValueError, match=r"scope='none'.*from_hooked"), model.ablated():
        pass
    assert not any("gate" in name for name in model.hook_dict)
    streams = model.run_streams(random_tokens())
    assert streams.ablated_logits is None
    assert streams.masks == {}
    with model.clean():
        assert torch.equal(model(random_tokens()), streams.clean_logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": "thawed", "position": 1}, "masks='thawed'"),
        ({"masks": "live"}, "needs a position"),
        ({"masks": "live", "position": 1, "clean_hooks": [("hook_embed", lambda x, hook: x)]}, "clean_hooks"),
        ({"masks": {}}, "holds no mask"),
        ({"masks": {ATTN_MASK.format(7): torch.ones(2, 7, 4, 4)}}, "holds no mask"),
        ({"masks": {ATTN_MASK.format(0): torch.ones(2, 7, 16)}}, r"shape \(16,\), this model's are \(4, 4\)"),
        ({"masks": {ATTN_MASK.format(0): torch.ones(2, 6, 4, 4)}}, r"2 prompts of 6 tokens.*2 prompts of 7"),
        ({"masks": {ATTN_MASK.format(0): torch.ones(1, 7, 4, 4)}}, r"1 prompts of 7 tokens.*2 prompts of 7"),
        ({"position": 7}, "position=7 lies outside the prompt of 7 tokens: it must be from -7 to 6"),
        ({"position": -8}, "position=-8"),
        ({"position": [0, 9]}, "position=9"),
        ({"position": [0, 1, 2]}, "3 entries, but there are 2 prompts"),
        ({"position": 1.5}, "whole number"),
        ({"clean_hooks": [("blocks.9.hook_z", lambda x, hook: x)]}, "no hook point matches 'blocks.9.hook_z'"),
        ({"clean_hooks": [("blocks.0.mlp_gate.hook_mask", lambda x, hook: x)]}, "never fires in the clean pass"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else None,
)
def test_wrong_requests(options, message):
    model, tokens = gated_model(), random_tokens()
    before = tables(model)
    with pytest.raises(ValueError, match=message), model.ablated(**options):
        model(tokens)
    assert tables(model) == before
    assert torch.equal(model(tokens), plain_model()(tokens))


def test_only_layer_0_may_start_the_ablated_stream():
    model, tokens = gated_model(), random_tokens()
    with model.ablated(), pytest.raises(ValueError, match="start_at_layer=1"):
        model(torch.zeros(2, 7, 16), start_at_layer=1)
    assert model(tokens, stop_at_layer=1).shape == (2, 7, 16)
    resid = model(tokens, stop_at_layer=1)
    torch.testing.assert_close(model(resid, start_at_layer=1), model(tokens))


@pytest.mark.parametrize("token", [-1, -23, 23, 400])
def test_tokens_outside_the_vocabulary_are_refused(token):
    model = gated_model()
    tokens = random_tokens().clone()
    tokens[1, 2] = token
    message = rf"token {token} is not in the vocabulary: tokens are from 0 to {model.cfg.d_vocab - 1}"
    with pytest.raises(ValueError, match=message):
        model.run_streams(tokens)
    for arguments in ({}, {"position": -1}):
        with model.ablated(**arguments), pytest.raises(ValueError, match=message):
            model(tokens)


def test_tokens_of_any_whole_type():
    model, tokens = gated_model(), random_tokens()
    expected = model.run_streams(tokens, tokens)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        streams = model.run_streams(tokens.to(dtype), tokens.to(dtype))
        assert torch.equal(streams.ablated_logits, expected.ablated_logits)
        assert torch.equal(streams.ablated_loss, expected.ablated_loss)
