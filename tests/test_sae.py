"""SAEs: activations of either stream, training that can be stopped, evaluation as SAELens does it."""

from __future__ import annotations

import copy
import math
import os
import signal
import sys

import forked
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

import sa_lens as sa
from sa_lens.core import HookedTransformer
from sa_lens.data import BlockOrder, TokenFile
from sa_lens.data.cache import key_of
from sa_lens.data.tokens import FORMAT
from sa_lens.sae import PRESETS, SAESettings, evaluate_sae, train_sae
from sa_lens.sae.hook_activations import ActivationBatches, activations, hook_width, text_of
from sa_lens.stopping import Interrupted

sae_lens = pytest.importorskip("sae_lens")
ActivationScaler = pytest.importorskip("sae_lens.training.activation_scaler").ActivationScaler

N_CTX, VOCAB = 16, 40
SMALL = {"d_sae": 24, "batch_tokens": 64, "steps": 12, "buffer_tokens": 256, "progress": False}


def make_model(scope: str = "local", **changes) -> sa.SelfAblatingTransformer:
    shape = {"n_layers": 2, "d_model": 16, "n_heads": 2, "n_ctx": N_CTX, "d_vocab": VOCAB, "d_mlp": 24, **changes}
    cfg = sa.ModelConfig(**shape, init="gpt2", attn_scale=True)
    torch.manual_seed(0)
    model = sa.SelfAblatingTransformer(cfg, sa.GateConfig(scope=scope, k_attn=4, k_mlp=4))
    with torch.no_grad():
        # wide enough for the streams to differ and for zeroing a hook to matter
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(1 if "gate" in name else 6)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> sa.SelfAblatingTransformer:
    return make_model()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (24, N_CTX), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def token_file(tmp_path, tokens) -> TokenFile:
    return write_file(tmp_path / "text.bin", tokens.flatten().numpy())


def write_file(path, row: np.ndarray, d_vocab: int = VOCAB) -> TokenFile:
    import hashlib
    import json

    path.write_bytes(raw := row.astype(np.uint8).tobytes())
    header = {"n_tokens": len(row), "d_vocab": d_vocab, "dtype": "uint8", "n_documents": 1, "n_bytes": len(row)}
    header |= {"begin_token_id": 0, "end_token_id": 0, "fingerprint": hashlib.sha256(raw).hexdigest(), "form": None}
    path.with_suffix(".json").write_text(json.dumps({"format": FORMAT, **header, "checksum": key_of(header)}))
    return TokenFile.open(path)


def identity(width: int, hook: str, stream: str = "clean", reshape: str = "none"):
    """x = relu(x) - relu(-x), exactly."""
    cfg = sae_lens.StandardSAEConfig(d_in=width, d_sae=2 * width, apply_b_dec_to_input=False)
    cfg.reshape_activations = reshape
    cfg.metadata.hook_name = hook
    cfg.metadata.stream = stream
    sae = sae_lens.StandardSAE(cfg)
    eye = torch.eye(width)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def random_sae(width: int, hook: str, stream: str = "clean"):
    cfg = sae_lens.StandardSAEConfig(d_in=width, d_sae=3 * width, apply_b_dec_to_input=False)
    cfg.metadata.hook_name = hook
    cfg.metadata.stream = stream
    sae = sae_lens.StandardSAE(cfg)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae


def same_weights(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("stream", ["clean", "ablated"])
@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_post", "blocks.1.mlp.hook_post", "blocks.1.attn.hook_z"])
def test_activations_are_what_the_hook_holds(model, tokens, hook, stream):
    with torch.no_grad():
        if stream == "ablated":
            with model.ablated():
                _, cache = model.run_with_cache(tokens)
        else:
            _, cache = model.run_with_cache(tokens)
    expected = cache[hook].reshape(tokens.numel(), -1)
    assert hook_width(model, hook, stream) == expected.shape[1]
    torch.testing.assert_close(activations(model, tokens, hook, stream), expected, rtol=0, atol=1e-6)


def test_the_streams_differ(model, tokens):
    found = [activations(model, tokens, "blocks.1.mlp.hook_post", stream) for stream in ("clean", "ablated")]
    assert not torch.allclose(*found)
    assert (found[1] != 0).sum(-1).max() <= 4 < (found[0] != 0).sum(-1).min()


@pytest.mark.parametrize("hook", ["blocks.0.mlp_gate.hook_in", "blocks.1.mlp_gate.hook_scores"])
def test_gate_hooks_belong_to_the_ablated_stream(model, hook):
    assert hook_width(model, hook, "ablated") == 24
    with pytest.raises(ValueError, match="only in the ablated stream"):
        hook_width(model, hook, "clean")


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.9.hook_resid_pre", "no hook point"),
        ("blocks.0.mlp_gate.hook_mask", "zeros and ones"),
        ("blocks.0.attn_gate.hook_mask", "zeros and ones"),
        ("blocks.0.attn.hook_pattern", "one vector per token"),
        ("blocks.0.attn_gate.hook_in", "one vector per token"),
        ("blocks.0.ln1.hook_scale", "one vector per token"),
        ("blocks.0.hook_attn_in", "does not fire"),
    ],
)
def test_hooks_without_a_vector_a_token_are_refused(model, hook, message):
    with pytest.raises(ValueError, match=message):
        hook_width(model, hook, "ablated")


def test_blocks_of_a_file_follow_each_other(model, token_file, tokens):
    blocks = text_of(token_file, model)
    assert len(blocks) == 24
    assert torch.equal(blocks.pick([3, 0]), tokens[[3, 0]])
    assert torch.equal(text_of(token_file.path, model).pick([23]), tokens[23:])


def batches(model, tokens, start=0, seed=0, batch_tokens=48, buffer_tokens=100):
    blocks = text_of(tokens, model)
    sizes = SAESettings(batch_tokens=batch_tokens, buffer_tokens=buffer_tokens)
    return ActivationBatches(model, blocks, "hook_embed", "clean", sizes, seed=seed, start=start)


def test_a_buffer_serves_each_activation_once(model, tokens):
    """6 blocks of 16 tokens make two batches of 48: together the activations of the first six blocks in order."""
    data = batches(model, tokens)
    found = torch.cat([next(data), next(data)])
    chosen = tokens[torch.from_numpy(BlockOrder(24, 0).indices(0, 6))]
    expected = activations(model, chosen, "hook_embed", "clean")
    assert not torch.equal(found, expected)
    by_row = [sorted(map(tuple, rows.tolist())) for rows in (found, expected)]
    assert by_row[0] == by_row[1]


def test_a_buffer_holds_no_more_than_all_steps_read(model, tokens):
    """Two steps of 20 tokens need three blocks of 16, whatever the buffer may hold."""
    sizes = SAESettings(batch_tokens=20, steps=2, buffer_tokens=10_000)
    data = ActivationBatches(model, text_of(tokens, model), "hook_embed", "clean", sizes, seed=0)
    assert data.blocks_per_buffer == 3
    read = {tuple(row) for _ in range(2) for row in next(data).tolist()}
    chosen = tokens[torch.from_numpy(BlockOrder(24, 0).indices(0, 3))]
    assert read <= {tuple(row) for row in activations(model, chosen, "hook_embed", "clean").tolist()}


@settings(deadline=None, max_examples=15)
@given(start=st.integers(0, 30), size=st.integers(1, 80))
def test_a_stream_begun_later_goes_on_as_the_whole_one(start, size):
    model = make_model(n_layers=1)
    tokens = torch.arange(6 * N_CTX).reshape(6, N_CTX) % VOCAB
    whole = batches(model, tokens, batch_tokens=size, buffer_tokens=100)
    for _ in range(start):
        next(whole)
    later = batches(model, tokens, batch_tokens=size, buffer_tokens=100, start=start)
    for _ in range(3):
        assert torch.equal(next(whole), next(later))


# ---------------------------------------------------------------------------------------------------------- training


def test_training_equals_the_trainers_own_loop(model, tokens, monkeypatch):
    """SAELens's `fit` on the same batches and the same scale gives the same weights."""
    settings = SAESettings(**{name: value for name, value in SMALL.items() if name != "progress"}, lr=1e-2)
    trainers = []
    fresh = sae_lens.SAETrainer

    def kept(*args, **kwargs):
        trainers.append(fresh(*args, **kwargs))
        return trainers[-1]

    monkeypatch.setattr(sae_lens, "SAETrainer", kept)
    ours = train_sae(model, "hook_embed", tokens, preset=settings, seed=2, progress=False)
    cfg = trainers[0].sae.cfg
    with torch.random.fork_rng():
        torch.manual_seed(2)
        sae = sae_lens.TrainingSAE.from_dict(cfg.to_dict())
    data = batches(model, tokens, seed=2, batch_tokens=64, buffer_tokens=256)
    trainer = fresh(trainers[0].cfg, sae, data)
    trainer.activation_scaler.estimate_scaling_factor(16, batches(model, tokens, 0, 2, 64, 256), 12)
    theirs = trainer.fit()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_same_seed_same_sae_bit_for_bit(model, tokens):
    first, again = (train_sae(model, "hook_embed", tokens, seed=1, **SMALL) for _ in range(2))
    other = train_sae(model, "hook_embed", tokens, seed=2, **SMALL)
    assert same_weights(first, again)
    assert not same_weights(first, other)


def test_training_draws_nothing_from_the_global_generator_and_leaves_the_model_alone(model, tokens):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    train_sae(model, "hook_embed", tokens, **SMALL)
    found = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_learns(model, tokens):
    """With as many latents as words, embeddings are learnt nearly by heart."""
    few, many = (
        train_sae(model, "hook_embed", tokens, **{**SMALL, "d_sae": 80, "steps": steps}, lr=1e-2, l1_coefficient=0.1)
        for steps in (2, 300)
    )
    variance = [evaluate_sae(model, sae, tokens, progress=False).explained_variance for sae in (few, many)]
    assert variance[1] > 0.95 > variance[0]


@pytest.mark.parametrize("stream", ["clean", "ablated"])
def test_the_folder_loads_with_plain_saelens(model, token_file, tmp_path, stream):
    out = tmp_path / "sae"
    sae = train_sae(model, "blocks.1.attn.hook_z", token_file, stream=stream, output=out, **SMALL)
    assert sorted(path.name for path in out.iterdir()) == ["cfg.json", "sae_weights.safetensors", "training.json"]
    loaded = sae_lens.SAE.load_from_disk(str(out))
    assert same_weights(sae, loaded)
    metadata = loaded.cfg.metadata
    assert (metadata.hook_name, metadata.stream, metadata.seed) == ("blocks.1.attn.hook_z", stream, 0)
    _, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]))
    assert loaded(cache["blocks.1.attn.hook_z"]).shape == (1, 3, 2, 8)
    found, again = (evaluate_sae(model, which, token_file, progress=False) for which in (sae, out))
    assert (found.stream, found.ce_score, found.l0) == (stream, again.ce_score, again.l0)


class Interrupting:
    """Sends SIGINT to this process when the trainer takes a given step."""

    def __init__(self, monkeypatch, step: int) -> None:
        original = sae_lens.SAETrainer.step
        self.step = step

        def counted(trainer, batch):
            if trainer.n_training_steps + 1 == self.step:
                os.kill(os.getpid(), signal.SIGINT)
            return original(trainer, batch)

        monkeypatch.setattr(sae_lens.SAETrainer, "step", counted)


@pytest.mark.parametrize("step", [1, 7])
def test_a_stopped_training_goes_on_bit_for_bit(model, tokens, tmp_path, monkeypatch, step):
    whole = train_sae(model, "hook_embed", tokens, lr=1e-2, **SMALL)
    interrupting = Interrupting(monkeypatch, step)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        Interrupted, match=f"after step {step} of 12.*resume=True, on the command line --resume"
    ) as stop:
        train_sae(model, "hook_embed", tokens, lr=1e-2, output=tmp_path / "sae", **SMALL)
    assert (stop.value.folder, stop.value.step) == (tmp_path / "sae", step)
    assert signal.getsignal(signal.SIGINT) is handler
    interrupting.step = 0
    resumed = train_sae(model, "hook_embed", tokens, lr=1e-2, output=tmp_path / "sae", resume=True, **SMALL)
    assert same_weights(whole, resumed)
    assert whole.cfg.metadata.l0 == resumed.cfg.metadata.l0
    assert not (tmp_path / "sae" / "checkpoint").exists()
    found = train_sae(model, "hook_embed", tokens, lr=1e-2, output=tmp_path / "sae", resume=True, **SMALL)
    assert same_weights(whole, found)


def test_a_training_that_died_goes_on_from_its_last_checkpoint(model, tokens, tmp_path, monkeypatch):
    whole = train_sae(model, "hook_embed", tokens, **SMALL)
    original = sae_lens.SAETrainer.step

    def failing(trainer, batch):
        if trainer.n_training_steps == 9:
            raise RuntimeError("power cut")
        return original(trainer, batch)

    with monkeypatch.context() as patched:
        patched.setattr("sa_lens.sae.train.CHECKPOINT_STEPS", 4)
        patched.setattr(sae_lens.SAETrainer, "step", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            train_sae(model, "hook_embed", tokens, output=tmp_path / "sae", **SMALL)
    assert [path.name for path in (tmp_path / "sae" / "checkpoint").iterdir()] == ["step-8"]
    resumed = train_sae(model, "hook_embed", tokens, output=tmp_path / "sae", resume=True, **SMALL)
    assert same_weights(whole, resumed)


def test_other_architectures_of_saelens_train_too(model, tokens):
    cfg = sae_lens.TopKTrainingSAEConfig(d_in=16, d_sae=24, k=3)
    small = {name: value for name, value in SMALL.items() if name != "d_sae"}
    sae = train_sae(model, "hook_embed", tokens, architecture=cfg, **small)
    assert evaluate_sae(model, sae, tokens, progress=False).l0 <= 3


def test_plain_models_train_too(tokens):
    plain = make_model().to_hooked_transformer()
    assert type(plain) is HookedTransformer
    sae = train_sae(plain, "blocks.0.hook_mlp_out", tokens, **SMALL)
    assert math.isfinite(evaluate_sae(plain, sae, tokens, progress=False).ce_score)


# -------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("stream", ["clean", "ablated"])
@pytest.mark.parametrize(
    ("hook", "width", "reshape"),
    [
        ("blocks.0.hook_resid_post", 16, "none"),
        ("blocks.1.hook_mlp_out", 16, "none"),
        ("blocks.1.attn.hook_z", 16, "hook_z"),
    ],
)
def test_an_identity_has_ce_score_one(model, tokens, hook, width, reshape, stream):
    sae = identity(width, hook, stream, reshape)
    found = evaluate_sae(model, sae, tokens, progress=False)
    assert found.ce_score == 1
    assert found.ce == found.ce_sae != found.ce_zero
    assert found.explained_variance == pytest.approx(1)
    assert found.mse == 0
    assert sae.cfg.metadata.hook_name == hook
    assert sae.hook_z_reshaping_mode == (reshape == "hook_z")


@pytest.mark.parametrize("stream", ["clean", "ablated"])
@pytest.mark.parametrize("batch", [7, 24])
def test_figures_agree_with_a_slow_twin(model, tokens, stream, batch, monkeypatch):
    """Everything by hand: plain hooks, one block at a time, special tokens neither replaced nor counted."""
    hook, ignore = "blocks.0.hook_mlp_out", [3, 7]
    sae = random_sae(16, hook, stream)
    monkeypatch.setattr("sa_lens.sae.evaluate.BLOCKS_AT_ONCE", batch)
    found = evaluate_sae(model, sae, tokens, ignore=ignore, progress=False)

    losses = {"ce": [], "ce_sae": [], "ce_zero": []}
    inputs, outputs, latents = [], [], []

    def run(block, keep, edit=None):
        def hooked(x, hook):
            if edit is None:
                inputs.append(x[0][keep])
                return x
            return edit(x)

        logits = model.run_with_hooks(block, fwd_hooks=[(hook, hooked)])
        loss = -logits[0, :-1].log_softmax(-1)[torch.arange(N_CTX - 1), block[0, 1:]]
        return loss[keep[:-1]]

    with torch.no_grad():
        for row in tokens:
            block, keep = row[None], ~torch.isin(row, torch.tensor(ignore))

            def replaced(x, keep=keep):
                latent = torch.relu(x @ sae.W_enc + sae.b_enc)
                rebuilt = latent @ sae.W_dec + sae.b_dec
                latents.append(latent[0][keep])
                outputs.append(rebuilt[0][keep])
                return torch.where(keep[None, :, None], rebuilt, x)

            if stream == "ablated":
                with model.ablated():
                    runs = [run(block, keep), run(block, keep, replaced), run(block, keep, torch.zeros_like)]
            else:
                runs = [run(block, keep), run(block, keep, replaced), run(block, keep, torch.zeros_like)]
            for name, loss in zip(losses, runs, strict=True):
                losses[name].append(loss)
    ce, ce_sae, ce_zero = (torch.cat(values).mean().item() for values in losses.values())
    x, rebuilt, latent = torch.cat(inputs), torch.cat(outputs), torch.cat(latents)
    variance = 1 - (x - rebuilt).pow(2).sum().item() / (x - x.mean(0)).pow(2).sum().item()
    approx = lambda value: pytest.approx(value, rel=1e-4)  # noqa: E731
    assert (found.ce, found.ce_sae, found.ce_zero) == (approx(ce), approx(ce_sae), approx(ce_zero))
    assert found.ce_score == pytest.approx((ce_zero - ce_sae) / (ce_zero - ce), rel=1e-3)
    assert found.l0 == approx((latent > 0).float().sum(-1).mean().item())
    assert found.explained_variance == approx(variance)
    assert found.dead_latents == int((~(latent > 0).any(0)).sum())
    np.testing.assert_allclose(found.density, (latent > 0).float().mean(0), rtol=1e-5)
    assert found.n_tokens == tokens.numel()
    assert found.n_latents == 48


HOOK = "blocks.0.hook_mlp_out"


def figures_of_saelens(model, sae, tokens, scaler):
    """What SAELens's `run_evals` gives on its own store, which has the same blocks as a tokenized dataset."""
    import datasets
    from sae_lens.evals import get_eval_everything_config

    store = sae_lens.ActivationsStore(
        model=model,
        dataset=datasets.Dataset.from_dict({"input_ids": tokens.tolist()}),
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=N_CTX,
        d_in=16,
        n_batches_in_buffer=2,
        total_training_tokens=10_000,
        store_batch_size_prompts=8,
        train_batch_size_tokens=64,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )
    config = get_eval_everything_config(8, 3, 3)
    theirs, latents = sae_lens.run_evals(sae, store, model, scaler, config, exclude_special_tokens=False)
    performance, quality = theirs["model_performance_preservation"], theirs["reconstruction_quality"]
    return {
        **{"ce": performance["ce_loss_without_sae"], "ce_sae": performance["ce_loss_with_sae"]},
        **{"ce_zero": performance["ce_loss_with_ablation"], "ce_score": performance["ce_loss_score"]},
        **{"l0": theirs["sparsity"]["l0"], "l1": theirs["sparsity"]["l1"]},
        **{name: quality[name] for name in ("explained_variance", "mse")},
        **{"cosine": quality["cossim"], "density": latents["feature_density"]},
    }


def assert_figures(found, expected) -> None:
    for name, value in expected.items():
        np.testing.assert_equal(getattr(found, name), np.asarray(value), err_msg=name)


def scaler_for(how: str, model, tokens):
    """SAELens's own estimate of what a way of normalising needs."""
    scaler = ActivationScaler()
    if how == "expected_average_only_in":
        scaler.estimate_scaling_factor(16, iter([activations(model, tokens, HOOK, "clean")]), 1)
    if how == "covariance_whitening":
        scaler.estimate_whitening(16, iter([activations(model, tokens, HOOK, "clean")]), 1)
    return scaler


NORMALISATIONS = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale", "covariance_whitening")


@pytest.mark.filterwarnings("ignore::UserWarning:sae_lens")
@pytest.mark.parametrize("how", NORMALISATIONS)
def test_figures_equal_saelens_however_activations_are_normalised(model, tokens, tmp_path, how):
    """In memory, in SAELens's checkpoint of an interrupted training, and folded, as when training has ended."""
    scaler = scaler_for(how, model, tokens)
    cfg = sae_lens.StandardTrainingSAEConfig(d_in=16, d_sae=48, normalize_activations=how)
    cfg.metadata.hook_name = HOOK
    sae = sae_lens.TrainingSAE.from_dict(cfg.to_dict())
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    sae.eval()
    expected = figures_of_saelens(model, sae, tokens, scaler)
    assert_figures(evaluate_sae(model, sae, tokens, scaler=scaler, progress=False), expected)
    sae.save_model(tmp_path)
    scaler.save(str(tmp_path / "activation_scaler.json"))
    assert_figures(evaluate_sae(model, tmp_path, tokens, progress=False), expected)
    needed = scaler != ActivationScaler()
    assert needed == (how in ("expected_average_only_in", "covariance_whitening"))
    if needed:
        with pytest.raises(
            ValueError, match=f"trained with normalize_activations='{how}', and the scale is not folded"
        ):
            evaluate_sae(model, sae, tokens, progress=False)
        (tmp_path / "activation_scaler.json").unlink()
        with pytest.raises(ValueError, match="give scaler=, an ActivationScaler"):
            evaluate_sae(model, tmp_path, tokens, progress=False)
        plain = figures_of_saelens(model, sae, tokens, ActivationScaler())
        assert_figures(evaluate_sae(model, sae, tokens, scaler=ActivationScaler(), progress=False), plain)
        assert plain["mse"] != expected["mse"], "or nothing would show that the scale was left out"
    if how == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    elif how == "covariance_whitening":
        whitening = scaler.whitening
        sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    folded = evaluate_sae(model, sae, tokens, progress=False)
    for name in ("ce_sae", "l0", "l1", "mse", "explained_variance"):
        assert getattr(folded, name) == pytest.approx(expected[name], rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"normalize": False}], ids=["scaled", "unscaled"])
def test_an_interrupted_training_is_evaluated_with_its_scale(model, tokens, tmp_path, monkeypatch, settings):
    Interrupting(monkeypatch, 7)
    with pytest.raises(Interrupted):
        train_sae(model, HOOK, tokens, lr=1e-2, output=tmp_path / "sae", **SMALL, **settings)
    checkpoint = tmp_path / "sae" / "checkpoint" / "step-7"
    with pytest.raises(FileNotFoundError, match=f"no cfg.json.; continue its training .*{checkpoint}"):
        evaluate_sae(model, tmp_path / "sae", tokens, progress=False)
    found = evaluate_sae(model, checkpoint, tokens, progress=False)
    sae, scaler = sae_lens.SAE.load_from_disk(str(checkpoint)), ActivationScaler()
    scaler.load(checkpoint / "activation_scaler.json")
    assert (scaler.scaling_factor is None) == (settings == {"normalize": False})
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    sae.requires_grad_(False)
    x = activations(model, tokens, HOOK, "clean")
    latents = torch.relu(x @ sae.W_enc + sae.b_enc)
    assert found.mse == pytest.approx(float((latents @ sae.W_dec + sae.b_dec - x).square().sum(-1).mean()), rel=1e-4)
    assert found.l0 == pytest.approx(float((latents > 0).float().sum(-1).mean()))


@pytest.mark.parametrize("sae_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_figures_of_narrow_models_and_saes(tokens, dtype, sae_dtype):
    """Those of float64 on the same activations, logits and weights."""
    model, sae = make_model().to(dtype), random_sae(16, HOOK).to(sae_dtype)
    found = evaluate_sae(model, sae, tokens, progress=False)
    assert (sae.dtype, next(model.parameters()).dtype) == (sae_dtype, dtype)

    def loss(hooks):
        with torch.no_grad():
            log_p = model.run_with_hooks(tokens, fwd_hooks=hooks).double().log_softmax(-1)
        return -float(log_p[:, :-1].gather(-1, tokens[:, 1:, None]).mean())

    _, cache = model.run_with_cache(tokens)
    x = cache[HOOK].detach().flatten(0, 1).double()
    W_enc, b_enc, W_dec, b_dec = (p.detach().double() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))

    def rebuilt(x):
        return torch.relu(x.double() @ W_enc + b_enc) @ W_dec + b_dec

    latents, error = torch.relu(x @ W_enc + b_enc), (rebuilt(x) - x).square().sum(-1)
    assert found.ce == pytest.approx(loss([]), rel=1e-5)
    assert found.ce_sae == pytest.approx(loss([(HOOK, lambda x, hook: rebuilt(x).to(x.dtype))]), rel=1e-3)
    assert found.l1 == pytest.approx(float(latents.sum(-1).mean()), rel=1e-4)
    assert found.l0 == pytest.approx(float((latents > 0).double().sum(-1).mean()), rel=1e-3)
    assert found.mse == pytest.approx(float(error.mean()), rel=1e-4)


def test_an_sae_of_other_weights_is_not_resumed(model, tokens, tmp_path, monkeypatch):
    interrupting = Interrupting(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train_sae(model, HOOK, tokens, output=tmp_path / "sae", **SMALL)
    interrupting.step = 0
    nudged, wider = copy.deepcopy(model), make_model()
    with torch.no_grad():
        nudged.blocks[1].mlp.W_out[2, 1] += 1e-3
    wider.cfg.eps = 1e-3
    for stage in ("interrupted", "finished"):
        for other in (nudged, wider):
            with pytest.raises(ValueError, match="another SAE: model differ; use the same model"):
                train_sae(other, HOOK, tokens, output=tmp_path / "sae", resume=True, **SMALL)
        if stage == "interrupted":
            train_sae(model, HOOK, tokens, output=tmp_path / "sae", resume=True, **SMALL)


@pytest.mark.parametrize("failing", ["save_model", "save_inference_model", "save_trainer_state"])
def test_a_full_disk_is_told_in_one_line_and_keeps_checkpoints(model, tokens, tmp_path, monkeypatch, failing):
    def full(*_, **__):
        raise {"save_model": SafetensorError, "save_trainer_state": RuntimeError}.get(failing, OSError)(
            "no room\nat 0x1"
        )

    with monkeypatch.context() as patched:
        owner = sae_lens.SAETrainer if failing == "save_trainer_state" else sae_lens.StandardTrainingSAE
        patched.setattr(owner, failing, full)
        patched.setattr("sa_lens.sae.train.CHECKPOINT_STEPS", 5)
        with pytest.raises(OSError, match=f"cannot write the SAE in {tmp_path / 'sae'}: no room\\.") as told:
            train_sae(model, HOOK, tokens, output=tmp_path / "sae", **SMALL)
    kept = tmp_path / "sae" / "checkpoint" / "step-10"
    assert (f"{kept} is kept" in str(told.value)) == (failing == "save_inference_model")
    assert {path.name for path in (tmp_path / "sae").iterdir()} == {"training.json", "checkpoint"}
    whole = train_sae(model, HOOK, tokens, **SMALL)
    assert same_weights(whole, train_sae(model, HOOK, tokens, output=tmp_path / "sae", resume=True, **SMALL))


def test_a_latent_that_never_fires_is_dead(model, tokens):
    sae = identity(16, "hook_embed")
    with torch.no_grad():
        sae.b_enc[5] = -1e6
    found = evaluate_sae(model, sae, tokens, progress=False)
    assert found.density[5] == 0
    assert found.dead_latents == 1


def test_n_tokens_are_whole_blocks_from_the_beginning(model, token_file, tokens):
    sae = random_sae(16, "hook_embed")
    found = evaluate_sae(model, sae, token_file, n_tokens=5 * N_CTX + 3, progress=False)
    assert found.n_tokens == 5 * N_CTX
    assert found.ce == evaluate_sae(model, sae, tokens[:5], progress=False).ce


# --------------------------------------------------------------------------------------------------------- bad input


def test_a_hook_without_effect_has_no_ce_score(tokens):
    model = make_model(n_layers=1)
    with torch.no_grad():
        model.unembed.W_U.zero_()
    with pytest.raises(ValueError, match="0 / 0"):
        evaluate_sae(model, random_sae(16, "hook_embed"), tokens, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hook": "blocks.0.nothing"}, "no hook point"),
        ({"stream": "dirty"}, "must be 'clean' or 'ablated'"),
        ({"preset": "huge"}, "paper, laptop"),
        ({"d_sae": 0}, "d_sae=0 must be at least 1"),
        ({"expansion": 0.0}, "expansion"),
        ({"d_sae": None, "expansion": 0.01}, "no latent"),
        ({"steps": 0}, "steps=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"l1_coefficient": -1.0}, "l1_coefficient"),
        ({"lr_decay": 1.5}, "lr_decay=1.5"),
        ({"buffer_tokens": 3}, "at least one batch"),
        ({"width": 3}, "'width' is not a setting"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_tokens": 10_000, "buffer_tokens": 10_000}, "fewer than one batch"),
        ({"architecture": "topk"}, "training configuration of SAELens"),
    ],
)
def test_bad_training_arguments_are_named(model, tokens, tmp_path, arguments, message):
    given = {"hook": "hook_embed", **SMALL, **arguments}
    hook = given.pop("hook")
    with pytest.raises(ValueError, match=message):
        train_sae(model, hook, tokens, output=tmp_path / "sae", **given)
    assert not (tmp_path / "sae").exists()


def test_the_ablated_stream_needs_gates(tokens):
    with pytest.raises(ValueError, match="needs gates"):
        train_sae(make_model("none"), "hook_embed", tokens, stream="ablated", **SMALL)


def test_bad_texts_are_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.bin"):
        train_sae(model, "hook_embed", tmp_path / "nowhere.bin", **SMALL)
    for length in (0, 5):
        file = write_file(tmp_path / f"{length}.bin", np.zeros(length))
        with pytest.raises(ValueError, match=f"has {length} tokens, fewer than one block"):
            train_sae(model, "hook_embed", file, **SMALL)
    with pytest.raises(ValueError, match="vocabulary"):
        train_sae(model, "hook_embed", write_file(tmp_path / "wide.bin", np.zeros(500), d_vocab=99), **SMALL)
    for wrong, message in (
        (torch.zeros(0, 8).long(), "text is empty"),
        (torch.zeros(4, 8), "integers"),
        (torch.zeros(4, 99).long(), "n_ctx=16"),
        (torch.full((4, 8), 40), "vocabulary of 40"),
    ):
        with pytest.raises(ValueError, match=message):
            train_sae(model, "hook_embed", wrong, **SMALL)


def test_folders_in_the_way_are_left_alone(model, tokens, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="choose another output"):
            train_sae(model, "hook_embed", tokens, output=other, resume=resume, **SMALL)
    out = tmp_path / "sae"
    train_sae(model, "hook_embed", tokens, output=out, **SMALL)
    before = (out / "cfg.json").read_bytes()
    with pytest.raises(FileExistsError, match="resume=True"):
        train_sae(model, "hook_embed", tokens, output=out, **SMALL)
    with pytest.raises(ValueError, match="stream, seed differ"):
        train_sae(model, "hook_embed", tokens, output=out, resume=True, seed=1, stream="ablated", **SMALL)
    assert (out / "cfg.json").read_bytes() == before


def test_bad_evaluation_arguments_are_named(model, tokens, tmp_path):
    sae = random_sae(16, "hook_embed")
    for arguments, message in (
        ({"hook": "blocks.0.mlp.hook_post"}, "16 dimensions, but .* holds 24"),
        ({"n_tokens": 0}, "n_tokens=0"),
        ({"ignore": range(VOCAB)}, "every token"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_sae(model, sae, tokens, progress=False, **arguments)
    with pytest.raises(FileNotFoundError, match="holds no SAE"):
        evaluate_sae(model, tmp_path, tokens, progress=False)
    sae.cfg.metadata.hook_name = None
    with pytest.raises(ValueError, match="give hook="):
        evaluate_sae(model, sae, tokens, progress=False)


def test_without_saelens_the_call_says_how_to_install_it(model, tokens, monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    for call in (lambda: train_sae(model, "hook_embed", tokens), lambda: evaluate_sae(model, None, tokens)):
        with pytest.raises(ImportError, match=r'pip install "sa-lens\[sae\]"'):
            call()


def test_importing_the_package_does_not_import_saelens():
    modules = forked.modules_after_import("sa_lens", "sa_lens.sae")
    assert "sa_lens.sae" in modules
    assert not {"sae_lens", "wandb"} & modules


def test_the_papers_preset_is_the_papers():
    paper = PRESETS["paper"]
    assert paper.latents(128) == 2048
    assert (paper.steps, paper.batch_tokens, paper.lr, paper.l1_coefficient) == (100_000, 4096, 1e-5, 5)
    assert (paper.l1_warm_up, paper.lr_decay) == (0.05, 0.2)
