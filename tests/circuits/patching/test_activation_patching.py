"""Patching agrees with `transformer_lens.patching`, and with loops that patch one thing in one prompt at a time."""

import copy
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import pandas as pd
import pytest
import torch
from micro import gated, plain, token_pairs
from transformer_lens import patching as tl

from sa_lens.circuits import PromptPairs, tasks
from sa_lens.circuits.metrics import kl, logit_difference
from sa_lens.circuits.patching.activation_patching import COLUMNS, KINDS, patch
from sa_lens.circuits.patching.node_attribution import attribute_nodes
from sa_lens.circuits.running.recorded_passes import last_logits
from sa_lens.core.host import in_stream
from sa_lens.core.unit import Unit

STREAMS = ["clean", "ablated"]
RESID_POST = {
    "patch_setter": tl.layer_pos_patch_setter,
    "activation_name": "resid_post",
    "index_axis_names": ("layer", "pos"),
}
"""`transformer_lens.patching` has no function of its own for the residual stream that leaves a layer."""


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=tolerance, atol=tolerance)


THEIRS = [
    ("resid_pre", tl.get_act_patch_resid_pre),
    ("resid_mid", tl.get_act_patch_resid_mid),
    ("resid_post", partial(tl.generic_activation_patch, **RESID_POST)),
    ("attn_out", tl.get_act_patch_attn_out),
    ("mlp_out", tl.get_act_patch_mlp_out),
    ("heads", tl.get_act_patch_attn_head_out_all_pos),
    ("z", tl.get_act_patch_attn_head_out_by_pos),
    ("q", tl.get_act_patch_attn_head_q_all_pos),
    ("k", tl.get_act_patch_attn_head_k_by_pos),
    ("value", tl.get_act_patch_attn_head_v_all_pos),
    ("hook_pattern", tl.get_act_patch_attn_head_pattern_all_pos),
    ("pattern", tl.get_act_patch_attn_head_pattern_by_pos),
]
"""Our name and their function of a kind of patch."""


@pytest.mark.parametrize(
    ("what", "theirs", "stream", "direction"),
    # each kind in both streams and both directions, which alternate
    [
        (*kind, stream, ("denoise", "noise")[(i + j) % 2])
        for i, kind in enumerate(THEIRS)
        for j, stream in enumerate(STREAMS)
    ],
)
def test_agrees_with_transformer_lens(what, theirs, stream, direction, model, even_pairs):
    def metric(logits):
        return logit_difference(logits[:, -1], even_pairs).mean()

    axes = theirs.keywords["index_axis_names"]
    positions = "each" if {"pos", "dest_pos"} & {*axes} else "all"
    clean, corrupt = even_pairs.clean, even_pairs.corrupt
    source, base = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
    with torch.no_grad(), in_stream(model, stream, position=-1):
        _, cache = model.run_with_cache(source)
        expected = theirs(model, base, cache, metric)
    masks = "frozen" if stream == "ablated" else None
    table = patch(model, even_pairs, what, stream=stream, masks=masks, direction=direction, positions=positions)
    if axes == ("layer", "pos", "head"):
        # rows are in the order of layers, heads, positions
        expected = expected.transpose(1, 2)
    close(table["value"].to_numpy(copy=True).reshape(expected.shape), expected.tolist())


def test_grouped_keys_agree_with_transformer_lens():
    model, pairs = plain(n_heads=4, n_key_value_heads=2).eval(), token_pairs(3)
    _, cache = model.run_with_cache(pairs.clean)
    for what, theirs in (
        ("k", tl.get_act_patch_attn_head_k_all_pos),
        ("v", tl.get_act_patch_attn_head_v_all_pos),
        ("q", tl.get_act_patch_attn_head_q_all_pos),
    ):
        expected = theirs(model, pairs.corrupt, cache, lambda logits: logit_difference(logits[:, -1], pairs).mean())
        table = patch(model, pairs, what, progress=False)
        assert table["head"].nunique() == expected.shape[1] == (4 if what == "q" else 2)
        close(table["value"].to_numpy(copy=True).reshape(expected.shape), expected.tolist())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(
            ("z", "heads"),
            ("hook_z", "heads"),
            ("attn.hook_z", "heads"),
            ("post", "neurons"),
            ("mlp.hook_post", "neurons"),
        ),
        *(("hook_resid_mid", "resid_mid"), ("query", "q"), ("attn", "pattern"), ("attn_gate.hook_mask", "mask_attn")),
    ],
)
def test_names_of_transformer_lens_are_understood(name, kind, model, pairs):
    stream = "ablated" if kind.startswith("mask") else "clean"
    expected = patch(model, pairs, kind, stream=stream, layers=[1], progress=False)
    assert expected["what"].unique() == [kind]
    pd.testing.assert_frame_equal(patch(model, pairs, name, stream=stream, layers=[1], progress=False), expected)
    if "hook" in name:
        full = model.hook_dict and next(hook for hook in model.hook_dict if hook.endswith(name) and ".1." in hook)
        pd.testing.assert_frame_equal(patch(model, pairs, full, stream=stream, progress=False), expected)
        with pytest.raises(ValueError, match=r"names layer 1, but layers=\[0\]"):
            patch(model, pairs, full, layers=[0], stream=stream)


GATED = {"attn_gate": "attn.hook_z", "mlp_gate": "mlp.hook_post"}


def plain_pass(model, tokens, hooks):
    """Logits and activations, as the hooks leave them, of an ordinary pass."""
    with model.clean(), model.hooks(fwd_hooks=hooks):
        return model.run_with_cache(tokens)


def chosen_masks(model, cache):
    """What each gate chooses from the activations of a clean pass: ones for the k largest scores."""
    final = model.ln_final(cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"])
    masks = {}
    for layer, block in enumerate(model.blocks):
        for name, point in GATED.items():
            gate, units = getattr(block, name), cache[f"blocks.{layer}.{point}"].shape
            local = cache[f"blocks.{layer}.hook_resid_pre"]
            scores = local @ gate.W_local + gate.b_local + final @ gate.W_global + gate.b_global
            best = scores.argsort(-1, descending=True)[..., : gate.k]
            masks[f"blocks.{layer}.{name}.hook_mask"] = torch.zeros_like(scores).scatter(-1, best, 1.0).reshape(units)
    return masks


def masking(model, masks):
    """Hooks that multiply by the masks at the last position."""

    def at(name):
        def multiply(x, hook):
            x = x.clone()
            x[:, -1] *= masks[name][:, -1]
            return x

        return multiply

    return [
        (f"blocks.{layer}.{point}", at(f"blocks.{layer}.{gate}.hook_mask"))
        for layer in range(model.cfg.n_layers)
        for gate, point in GATED.items()
    ]


class Alone:
    """A prompt without padding: what ordinary passes of it give, with no masks and with its own, each run once."""

    def __init__(self, model, tokens):
        self.model, self.tokens = model, tokens

    @cached_property
    def plain(self):
        """Logits and activations."""
        return plain_pass(self.model, self.tokens, [])

    @cached_property
    def masks(self):
        return chosen_masks(self.model, self.plain[1])

    @cached_property
    def masked(self):
        """Logits and activations under the masks."""
        return plain_pass(self.model, self.tokens, masking(self.model, self.masks))


@pytest.fixture(scope="module")
def five_pairs(pairs):
    few = pairs.subset(range(5))
    assert not few.uniform
    return few


@pytest.fixture(scope="module")
def alone(model, five_pairs):
    """The clean and the corrupt prompt of each pair."""
    lengths = five_pairs.lengths.tolist()
    return [
        (Alone(model, five_pairs.clean[i : i + 1, -n:]), Alone(model, five_pairs.corrupt[i : i + 1, -n:]))
        for i, n in enumerate(lengths)
    ]


def by_loop(model, pair, alone, hook_name, index, stream, direction, choice, metric):
    """One prompt, one patch, by ordinary passes and hooks. `index` selects within `[batch, pos, ...]`.

    The ablated stream is an ordinary pass whose last position is masked; what the gates choose comes from a pass
    before it, which live gates see patched with the source's value in such a pass.
    """
    clean, corrupt = alone
    source, base = (clean, corrupt) if direction == "denoise" else (corrupt, clean)

    def putting(values):
        def put(x, hook):
            x = x.clone()
            x[index] = values[hook_name][index]
            return x

        return [(hook_name, put)]

    with torch.no_grad():
        reference, _ = clean.plain if stream == "clean" else clean.masked
        if stream == "clean":
            logits, _ = plain_pass(model, base.tokens, putting(source.plain[1]))
        elif hook_name in base.masks:
            masks = {name: mask.clone() for name, mask in base.masks.items()}
            masks[hook_name][index] = source.masks[hook_name][index]
            logits, _ = plain_pass(model, base.tokens, masking(model, masks))
        else:
            masks = base.masks
            if choice == "live":
                _, before = plain_pass(model, base.tokens, putting(source.plain[1]))
                masks = chosen_masks(model, before)
            logits, _ = plain_pass(model, base.tokens, masking(model, masks) + putting(source.masked[1]))
    if metric == "kl":
        return kl(logits[:, -1], reference[:, -1]).item()
    return logit_difference(logits[:, -1], pair).item()


CASES = [
    (what, stream, masks)
    for what, kind in KINDS.items()
    for stream, masks in (("clean", None), ("ablated", "frozen"), ("ablated", "live"))
    if stream == "ablated" or not kind.mask
]


IN_ONE_DIRECTION = [(*case, ("denoise", "noise")[i % 2]) for i, case in enumerate(CASES)]
"""Each kind, and each choice of stream and masks, in both directions."""


def test_cases_hold_both_directions():
    for part in ("what", "stream and masks"):
        groups = {(case[0] if part == "what" else case[1:3], case[3]) for case in IN_ONE_DIRECTION}
        assert len(groups) == 2 * len({group for group, _ in groups}), part


@pytest.mark.parametrize(("what", "stream", "masks", "direction"), IN_ONE_DIRECTION)
def test_agrees_with_a_loop_over_prompts_of_several_lengths(what, stream, masks, direction, model, five_pairs, alone):
    metric = "kl" if direction == "noise" else "logit_difference"
    options = {"top_n": 5} if KINDS[what].many else {}
    pairs = five_pairs
    # passes of 4 prompts hold several patches of a small group
    table = patch(
        model, pairs, what, stream=stream, direction=direction, metric=metric, masks=masks, batch_size=4, **options
    )
    assert tuple(table.columns) == COLUMNS
    # the last row is at the end, where the masks act
    picked = table.iloc[sorted({*range(0, len(table), max(1, len(table) // 2)), len(table) - 1})]
    for _, row in picked.iterrows():
        unit = ()
        if KINDS[what].many:
            named_unit = Unit.parse(row["unit"])
            assert named_unit.layer == row["layer"]
            unit = (named_unit.index,)
            if named_unit.site == "attn":
                unit = divmod(named_unit.index, model.cfg.d_head)
                assert unit[0] == row["head"]
        elif KINDS[what].axes:
            unit = (int(row["head"]),)
        values = []
        for i in range(len(pairs)):
            named = row["position"] in pairs.positions and not KINDS[what].mask
            where = int(pairs.positions[row["position"]][i]) if named else slice(None)
            hook_name = f"blocks.{row['layer']}.{KINDS[what].hook}"
            index = (slice(None), *unit, where) if KINDS[what].by_query else (slice(None), where, *unit)
            pair = pairs.subset([i])
            values.append(
                by_loop(model, pair, alone[i], hook_name, index, stream, direction, masks or "frozen", metric)
            )
        close(row["value"], sum(values) / len(values))


@pytest.mark.parametrize(("what", "stream", "masks"), CASES)
def test_a_prompt_patched_with_itself_stays_as_it_is(what, stream, masks, model, five_pairs):
    pairs = replace(five_pairs, corrupt=five_pairs.clean)
    for positions in [None] if KINDS[what].mask else ["named", "all"]:
        table = patch(model, pairs, what, stream=stream, masks=masks, positions=positions)
        close(table["value"], table["clean"])
        assert table["normalised"].isna().all()


@pytest.mark.parametrize("stream", STREAMS)
def test_patching_the_whole_residual_stream_gives_the_other_prompt(stream, model, pairs):
    for direction, reached in (("denoise", "clean"), ("noise", "corrupt")):
        # with live gates the masks come over with the residual stream; frozen ones stay
        masks = None if stream == "clean" else "live"
        table = patch(model, pairs, "resid_pre", stream=stream, direction=direction, positions="all", masks=masks)
        close(table["value"], table[reached])
        close(table["normalised"], [1.0, 1.0])
        for prompt in ("clean", "corrupt"):
            unedited = logit_difference(last_logits(model, pairs, stream, prompt), pairs).mean().item()
            close(table[prompt], [unedited] * 2)


def own_pass(model, tokens, masks, put):
    """Logits, values and masks at the last position of a pass whose gates read it; `masks` are given ones or None."""
    seen, chosen = {}, {}

    def keep(x, hook):
        x = put.get(hook.name, lambda x: x)(x)
        seen[hook.name] = x.clone()
        return x

    def multiply(x, hook, gate, name):
        scores = seen[name.rsplit(".", 2)[0] + ".hook_resid_pre"][:, -1] @ gate.W_local + gate.b_local
        best = scores.argsort(-1, descending=True)[:, : gate.k]
        mask = torch.zeros_like(scores).scatter(-1, best, 1.0) if masks is None else masks[name]
        chosen[name] = put.get(name, lambda x: x)(mask[:, None])[:, 0]
        x = x.clone()
        x[:, -1] *= chosen[name].view_as(x[:, -1])
        return x

    hooks = []
    for layer, block in enumerate(model.blocks):
        hooks.append((f"blocks.{layer}.hook_resid_pre", keep))
        for gate, point in GATED.items():
            mask = partial(multiply, gate=getattr(block, gate), name=f"blocks.{layer}.{gate}.hook_mask")
            hooks += [(f"blocks.{layer}.{point}", mask), (f"blocks.{layer}.{point}", keep)]
    with torch.no_grad(), model.clean():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -1], seen, chosen


@pytest.mark.parametrize("masks", ["frozen", "live"])
@pytest.mark.parametrize(
    ("what", "hook"), [("resid_pre", "hook_resid_pre"), ("heads", "attn.hook_z"), ("mask_mlp", "mlp_gate.hook_mask")]
)
def test_gates_that_read_the_ablated_stream(what, hook, masks):
    model, pairs = gated("ablated", dtype=torch.float64), token_pairs(n=4)
    positions = {} if what == "mask_mlp" else {"positions": [-1, 3]}
    table = patch(model, pairs, what, stream="ablated", direction="noise", masks=masks, progress=False, **positions)
    _, source, source_masks = own_pass(model, pairs.corrupt, None, {})
    _, _, base_masks = own_pass(model, pairs.clean, None, {})
    assert len(table) > 1
    for _, row in table.iterrows():
        name = f"blocks.{row['layer']}.{hook}"
        values = source_masks[name][:, None] if what == "mask_mlp" else source[name]
        where = (slice(None), -1 if what == "mask_mlp" else int(row["position"]))
        where += (int(row["head"]),) if what == "heads" else ()

        def put(x, values=values, where=where):
            x = x.clone()
            x[where] = values[where]
            return x

        logits, _, _ = own_pass(model, pairs.clean, base_masks if masks == "frozen" else None, {name: put})
        close(row["value"], logit_difference(logits, pairs).mean().item(), 1e-8)


def test_patching_what_comes_too_late_changes_nothing(model, pairs):
    table = patch(model, pairs, "mlp_out", stream="ablated", layers=[1], positions=["S2"])
    close(table["value"], table["corrupt"])
    close(table["normalised"], [0.0])


def test_masks_are_patched_alike_under_frozen_and_live_gates(model, pairs):
    for what in ("mask_attn", "mask_mlp_units"):
        frozen, live = (patch(model, pairs, what, stream="ablated", masks=masks) for masks in ("frozen", "live"))
        close(live["value"], frozen["value"])


def test_frozen_and_live_gates_differ(model, pairs):
    frozen, live = (patch(model, pairs, "resid_pre", stream="ablated", masks=masks) for masks in ("frozen", "live"))
    assert (frozen["value"] - live["value"]).abs().max() > 1e-3
    assert frozen["masks"].unique() == ["frozen"]
    assert live["masks"].unique() == ["live"]


def test_a_mask_that_is_the_same_in_both_prompts_has_no_effect(model, pairs):
    masks = {"clean": [], "corrupt": []}
    for _, group in pairs.by_length():
        masks["clean"].append(model.run_streams(group.clean).mask_attn[:, :, -1])
        masks["corrupt"].append(model.run_streams(group.corrupt).mask_attn[:, :, -1])
    same = (torch.cat(masks["clean"], 1) == torch.cat(masks["corrupt"], 1)).all(1)
    for what, unchanged in (("mask_heads", same.all(-1)), ("mask_attn_units", same)):
        table = patch(model, pairs, what, stream="ablated", **({"top_n": "all"} if what == "mask_attn_units" else {}))
        effect = torch.tensor((table["value"] - table["corrupt"]).to_numpy(copy=True)).reshape(unchanged.shape)
        assert (effect[unchanged].abs() < 1e-6).all()
        assert (effect.abs() > 1e-3).any()
    assert unchanged.any()


def test_top_n_are_the_largest_first_order_effects(model, even_pairs):
    exact = patch(model, even_pairs, "neurons", top_n="all")
    assert len(exact) == 2 * 24
    few = patch(model, even_pairs, "neurons", top_n=6)
    assert len(few) == 6
    merged = few.merge(exact, on=["unit", "layer"], suffixes=("", "_exact"))
    close(merged["value"], merged["value_exact"])
    # gradient times difference, by finite differences along the patch
    clean, corrupt = even_pairs.clean, even_pairs.corrupt
    effects = {}
    model64 = model.to(torch.float64)
    try:
        with torch.no_grad():
            _, cache = model64.run_with_cache(clean)
            before = logit_difference(model64(corrupt)[:, -1], even_pairs).sum()
            for layer in range(2):
                for neuron in range(24):

                    def nudge(x, hook, neuron=neuron):
                        x = x.clone()
                        x[..., neuron] += 1e-6 * (cache[hook.name][..., neuron] - x[..., neuron])
                        return x

                    hooks = [(f"blocks.{layer}.mlp.hook_post", nudge)]
                    after = logit_difference(model64.run_with_hooks(corrupt, fwd_hooks=hooks)[:, -1], even_pairs).sum()
                    effects[layer, neuron] = abs(float(after - before))
    finally:
        model.to(torch.float32)
    best = sorted(effects, key=effects.__getitem__, reverse=True)[:6]
    assert [f"L{layer}.mlp.{neuron}" for layer, neuron in sorted(best)] == few["unit"].tolist()


def test_positions_and_their_tokens(model, tokenizer, pairs, even_pairs):
    named = patch(model, pairs, "resid_pre")
    assert named["position"].tolist() == ["IO", "S1", "S2", "end"] * 2
    # a token is named where all prompts have the same one: names differ, and so do these prompts' last words
    assert named["token"].tolist() == [""] * 8
    alike = tasks.ioi(tokenizer, 6, seed=1, words="stories", templates=["go-give-9"])
    assert patch(model, alike, "resid_pre", positions="named")["token"].tolist() == ["", "", "", " to"] * 2
    each = patch(model, even_pairs, "resid_pre", positions="each")
    assert each["position"].tolist() == list(range(17)) * 2
    assert each["token"][0] == "<|endoftext|>"
    picked = patch(model, even_pairs, "resid_pre", positions=[-1, 16, "end"])
    assert picked["position"].tolist() == [-1, 16, "end"] * 2
    assert picked["value"].nunique() == 2
    heads = patch(model, even_pairs, "heads", positions="named")
    assert len(heads) == 2 * 4 * 4
    assert patch(model, even_pairs, "heads")["position"].unique() == ["all"]


def test_every_token_is_a_column_where_all_prompts_are_of_one_form(model, tokenizer, pairs):
    """By default. 8 tokens that agree in 4, and in 3; one pair; several lengths; and heads, which are patched whole."""
    prompt = torch.arange(8)
    for shared, expected in ((4, [*range(8)]), (3, ["start", "end"])):
        clean = torch.stack([prompt, torch.cat([prompt[:shared], prompt[shared:] + 20])])
        made = PromptPairs.from_tokens(clean, clean + 1, [1, 1], [2, 2], positions={"start": [-8, -8]})
        assert patch(model, made, "attn_out", layers=[0])["position"].tolist() == expected
        assert patch(model, made.subset([1]), layers=[0])["position"].tolist() == [*range(8)]
        assert patch(model, made, "heads", layers=[0])["position"].unique() == ["all"]
    assert patch(model, pairs, layers=[0])["position"].tolist() == ["IO", "S1", "S2", "end"]
    without_names = replace(pairs, positions={"end": pairs.positions["end"]})
    assert patch(model, without_names, layers=[0])["position"].tolist() == ["all"]


def test_a_function_as_metric_and_progress(model, even_pairs):
    def answer_logit(logits, pairs):
        return logits.gather(-1, pairs.answers[:, None])[:, 0]

    table = patch(model, even_pairs, "attn_out", metric=answer_logit, progress=False)
    assert table["metric"].unique() == ["answer_logit"]
    expected = answer_logit(last_logits(model, even_pairs), even_pairs).mean().item()
    close(table["clean"], [expected] * len(table))


def test_plain_hooked_transformer(model, pairs):
    # with tied embeddings W_U lies in memory in another order, in which products round differently
    model = copy.deepcopy(model).to(torch.float64)
    plain = model.to_hooked_transformer()
    for what in ("resid_pre", "neurons"):
        pd.testing.assert_frame_equal(patch(plain, pairs, what), patch(model, pairs, what), rtol=0, atol=1e-12)


def test_gradients_and_hooks_are_left_as_found(model, pairs):
    patch(model, pairs, "neurons", stream="ablated", top_n=3)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"what": "residual"}, "what='residual' is none of resid_pre, .*; perhaps you meant resid_pre"),
        ({"what": "blocks.1.hook_mlp_ou"}, "perhaps you meant mlp_out"),
        ({"what": "head"}, "perhaps you meant heads"),
        ({"what": "hook_posts"}, "perhaps you meant neurons"),
        ({"what": "mask_attn"}, "needs stream='ablated'"),
        ({"masks": "live"}, "masks='live' needs stream='ablated'"),
        ({"masks": "melted", "stream": "ablated"}, "masks='melted'"),
        ({"stream": "muddy"}, "stream='muddy'"),
        ({"direction": "up"}, "direction='up'"),
        ({"metric": "loss"}, "metric='loss'"),
        ({"positions": "each"}, "prompts of one length"),
        ({"positions": "some"}, "positions='some'"),
        ({"positions": ["IO2"]}, "'IO2' has no name here; names are IO, S1, S2, end"),
        ({"positions": [99]}, "position 99 lies outside"),
        ({"positions": []}, "at least one"),
        ({"layers": [2]}, "layer 2 is not there"),
        ({"top_n": 3}, "top_n=3 applies"),
        ({"what": "neurons", "top_n": 0}, "top_n=0"),
        ({"what": "mask_mlp", "stream": "ablated", "positions": "all"}, "positions do not apply"),
    ],
)
def test_bad_arguments_are_named(arguments, message, model, pairs):
    with pytest.raises(ValueError, match=message):
        patch(model, pairs, **arguments)


def test_plain_model_has_no_ablated_stream(model, pairs):
    with pytest.raises(ValueError, match="needs gates, but this HookedTransformer has none"):
        patch(model.to_hooked_transformer(), pairs, stream="ablated")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": [0.5]}, "position 0.5 must be a name or a whole number"),
        ({"positions": [True]}, "position True must be"),
        ({"positions": [torch.tensor(1.0)]}, "must be a name or a whole number"),
        ({"layers": [0.5]}, "layer 0.5 is not there"),
        ({"layers": []}, "layers is empty"),
        ({"batch_size": -1}, "batch_size=-1 must be a whole number"),
        ({"what": "neurons", "top_n": True}, "top_n=True must be a whole number of at least ."),
    ],
)
def test_places_and_numbers_that_are_none_are_refused(model, even_pairs, options, message):
    with pytest.raises(ValueError, match=message):
        patch(model, even_pairs, progress=False, **options)


def test_whole_numbers_of_numpy_and_torch_are_positions(model, even_pairs):
    expected = patch(model, even_pairs, positions=[2], layers=[1], progress=False)["value"]
    for number in (np.int64(2), torch.tensor(2)):
        found = patch(model, even_pairs, positions=[number], layers=[np.int32(1)], progress=False)
        assert found["value"].tolist() == expected.tolist()


@pytest.mark.parametrize("what", ["mlp_out", "neurons"])
def test_attention_only_models_have_no_mlps_to_patch(what):
    model = plain(n_layers=1, attn_only=True)
    with pytest.raises(ValueError, match="belongs to an MLP, but this model has attention layers alone"):
        patch(model, token_pairs(2), what, progress=False)
    with pytest.raises(ValueError, match="attention layers alone"):
        attribute_nodes(model, token_pairs(2), "mlps" if what == "mlp_out" else what, progress=False)
