"""Labels of units: planted ones are found, random ones are not, and each measure agrees with scipy or a count."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from sa_lens.core.unit import Sublayer, unit_counts
from sa_lens.data.stories import LABELS, generate
from sa_lens.units.firing import calibrate, unit_scores
from sa_lens.units.labels import LabelledText, firing_scores, label_stories, selectivity


def labelled(tokens, of_token, names):
    return LabelledText(tokens, of_token[tokens][None], names)


@pytest.fixture(scope="module")
def planted_labels(even_text):
    of_token = torch.full((24,), -1)
    of_token[3:7], of_token[7], of_token[8:12] = 0, 1, 2
    return labelled(even_text, of_token, ("class=planted", "class=seven", "class=other"))


def test_planted_units_get_their_labels(planted, planted_labels, even_text):
    found = selectivity(planted, planted_labels, even_text, progress=False)
    neurons = found.table.query("site == 'mlp'").set_index("unit")
    for unit, label in ((0, "class=planted"), (1, "class=seven"), (2, "class=seven")):
        row = neurons.loc[unit]
        assert (row.f1_label, row.auroc_label, row.mutual_information_label) == (label, label, label)
        assert (row.f1, row.precision, row.recall, row.auroc) == (1, 1, 1, 1)
    dead = neurons.loc[3]
    assert not dead.live
    assert dead.f1_label is None or dead.f1_label is np.nan
    assert np.isnan([dead.f1, dead.auroc, dead.mutual_information]).all()
    always = neurons.loc[4]
    assert always.f1 == pytest.approx(always.f1_if_always_firing)
    assert always.mutual_information == pytest.approx(0, abs=1e-9)
    covered = found.coverage.set_index("label")
    assert covered.covered.to_dict() == {"class=planted": True, "class=seven": True, "class=other": False}
    assert (covered.loc["class=planted"].site, covered.loc["class=planted"].unit) == ("mlp", 0)


def test_the_label_is_chosen_on_one_half_and_scored_on_the_other(gated, calibration):
    """With labels at random, the chosen one looks good where it was chosen and is worth nothing elsewhere."""
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(0, 24, (40, 16), generator=generator)
    labels = torch.randint(0, 30, (1, 40, 16), generator=generator)
    text = LabelledText(tokens, labels, tuple(f"random={i}" for i in range(30)))
    table = selectivity(gated, text, calibration, "clean", min_tokens=3, progress=False).table
    live = table[table.live]
    assert live.auroc_when_chosen.mean() > 0.65
    assert abs(live.auroc.mean() - 0.5) < 0.03
    assert live.mutual_information_when_chosen.mean() > 1.5 * live.mutual_information.mean()
    assert live.f1_when_chosen.mean() > 1.3 * live.f1.mean()


def test_another_share_of_the_percentile(gated, text, calibration):
    """0.3 of the percentile is half of 0.6 of it."""
    labels = torch.randint(0, 4, (1, *text.shape), generator=torch.Generator().manual_seed(2))
    labelled = LabelledText(text, labels, tuple(f"random={i}" for i in range(4)))
    rules = calibrate(gated, calibration, ("clean", "ablated"), progress=False)
    lower = {
        stream: dataclasses.replace(rule, peaks={sublayer: 0.6 * peaks for sublayer, peaks in rule.peaks.items()})
        for stream, rule in rules.items()
    }
    options = {"min_tokens": 3, "progress": False}
    found = selectivity(gated, labelled, {s: dataclasses.replace(r, share=0.3) for s, r in rules.items()}, **options)
    twin = selectivity(gated, labelled, lower, **options)
    assert found.coverage.equals(twin.coverage)
    assert found.table.f1.equals(twin.table.f1)
    assert not found.table.f1.equals(selectivity(gated, labelled, rules, **options).table.f1)


def test_swapping_what_the_second_half_says_leaves_the_choice_alone(planted, planted_labels, even_text):
    turned = planted_labels.labels.clone()
    half = len(even_text) // 2
    turned[:, half:] = torch.tensor([1, 0, 2, -1])[turned[:, half:]]
    found = selectivity(planted, planted_labels._replace(labels=turned), even_text, progress=False)
    row = found.table.query("site == 'mlp' and unit == 0").iloc[0]
    assert row.f1_label == "class=planted"
    assert row.f1_when_chosen == 1
    assert row.f1 == 0
    assert not found.coverage.covered.any()


def test_measures_agree_with_scipy_and_counts_on_the_held_out_half(gated, text, calibration):
    of_token = torch.arange(24) % 3
    labelled_text = labelled(text, of_token, ("third=0", "third=1", "third=2"))
    rules = calibrate(gated, calibration, "ablated", progress=False)
    table = selectivity(gated, labelled_text, rules, "ablated", min_tokens=1, progress=False).table
    held = text[6:]
    with torch.no_grad(), gated.ablated():
        cache = gated.run_with_cache(held)[1]
    labels = of_token[held].flatten().numpy()
    checked = 0
    for sublayer in unit_counts(gated):
        x = cache[sublayer.value_hook].flatten(2).flatten(0, 1)
        fired = rules["ablated"].fires(sublayer, x).numpy()
        scores = unit_scores(sublayer, x).numpy()
        for _, row in table[(table.layer == sublayer.layer) & (table.site == sublayer.site) & table.live].iterrows():
            checked += 1
            on, member = fired[:, row.unit], labels == int(row.f1_label[-1])
            assert row.f1 == pytest.approx(2 * (on & member).sum() / (on.sum() + member.sum()))
            member = labels == int(row.auroc_label[-1])
            u = stats.mannwhitneyu(scores[member, row.unit], scores[~member, row.unit]).statistic
            assert row.auroc == pytest.approx(u / (member.sum() * (~member).sum()))
            member = labels == int(row.mutual_information_label[-1])
            joint = np.bincount(2 * on + member, minlength=4).reshape(2, 2)
            bits = stats.entropy(joint.sum(1), base=2) + stats.entropy(joint.sum(0), base=2)
            bits -= stats.entropy(joint.ravel(), base=2)
            assert row.mutual_information == pytest.approx(bits, abs=1e-9)
    assert checked > 20


def test_a_unit_that_never_fires_scores_zero():
    never = firing_scores(torch.zeros(1, 1), torch.zeros(1), torch.tensor([3.0]), 10)
    assert [float(x) for x in never] == [0, 0, 0, 0]


def test_tokens_carry_the_labels_of_their_words(story_tokenizer):
    text = label_stories(story_tokenizer, 12, 32, seed=4)
    assert text.labels.shape == (len(LABELS), *text.tokens.shape)
    flat, labels = text.tokens.flatten(), text.labels.flatten(1)
    at = 0
    for story in generate(12, 4):
        encoded = story_tokenizer(story.text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if at == len(flat):
                return
            inside = [w for w in story.words if w.start < end and w.end > start]
            assert flat[at] == token
            for kind, values in enumerate(LABELS):
                value = getattr(inside[-1], values) if inside else "none"
                label = int(labels[kind, at])
                assert (text.names[label] if label >= 0 else f"{values}=none") == f"{values}={value}"
            at += 1
        if at == len(flat):
            return
        assert (labels[:, at] == -1).all()
        at += 1


def test_a_real_text_with_a_gated_model(gated, story_tokenizer):
    import sa_lens as sa

    cfg = sa.ModelConfig(n_layers=1, d_model=16, n_heads=2, d_mlp=16, n_ctx=32, d_vocab=len(story_tokenizer))
    model = sa.SelfAblatingTransformer(cfg, sa.GateConfig(k_attn=4, k_mlp=4), device="cpu")
    text = label_stories(story_tokenizer, 60, 32)
    found = selectivity(model, text, text.tokens[:40], progress=False)
    assert set(found.table.stream) == {"clean", "ablated"}
    assert found.table.f1.dropna().between(0, 1).all()
    assert found.coverage.label.str.startswith(("role=", "referent=", "pattern=", "pos=")).all()
    parts = found.table.effective_parts_of_speech.dropna()
    assert parts.between(1 - 1e-6, 15).all()


def test_bad_input_gets_a_clear_error(gated, text, calibration, story_tokenizer):
    one = labelled(text, torch.zeros(24, dtype=torch.int64), ("a=b",))
    with pytest.raises(ValueError, match="one block"):
        selectivity(gated, LabelledText(one.tokens[:1], one.labels[:, :1], one.names), calibration, progress=False)
    with pytest.raises(ValueError, match="min_tokens=1000"):
        selectivity(gated, one, calibration, min_tokens=1000, progress=False)
    with pytest.raises(ValueError, match="must be 'clean' or 'ablated'"):
        selectivity(gated, one, calibration, "no", progress=False)
    with pytest.raises(ValueError, match="sample_tokens=1"):
        selectivity(gated, one, calibration, sample_tokens=1, progress=False)
    with pytest.raises(ValueError, match="fewer than two blocks"):
        label_stories(story_tokenizer, 1, 512)
    with pytest.raises(ValueError, match="fast Hugging Face tokenizer"):
        label_stories(None, 10, 16)
    assert Sublayer(0, "mlp") in unit_counts(gated)
