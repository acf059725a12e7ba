from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import transformers
from torch import nn

from edt_former.compat import accelerate_qformer
from edt_kernels.testing import assert_within_budget

SIZE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "encoder_hidden_size": 20,
    "vocab_size": 50,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VISION = {
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {
    "model_type": "opt",
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 16,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 16,
}
SLOT = 59  # the token that an image or a video replaces
KINDS = ["Blip2", "InstructBlip", "InstructBlipVideo"]


def qformer(kind: str, *, attention="sdpa", dtype=torch.float64, **options) -> nn.Module:
    config = getattr(transformers, f"{kind}QFormerConfig")(**SIZE | NO_DROPOUT | options)
    if kind == "Blip2":
        config.use_qformer_text_input = True
    config._attn_implementation = attention
    torch.manual_seed(0)
    # Weights of order 1, so that attention is not nearly uniform.
    model = getattr(transformers, f"{kind}QFormerModel")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype).eval()


def mask(lengths, *, left=False):
    index = torch.arange(max(lengths))
    real = (index < torch.tensor(lengths)[:, None]).long()
    return real.flip(1) if left else real


HOLES = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
ALL = torch.ones(3, 7, dtype=torch.long)
# Number of queries, mask of the text, mask of the encoder's tokens; None passes none.
INPUTS = {
    "queries alone": (4, None, None),
    "queries and padded encoder": (4, None, mask([7, 1, 4])),
    "queries and text": (4, mask([5, 2, 1]), ALL),
    "queries, text and padded encoder": (4, mask([5, 2, 1]), mask([3, 7, 1])),
    "nothing is padded": (2, mask([5, 5, 5]), ALL),
    "text of one row is all padding": (2, mask([0, 5, 1]), mask([3, 7, 1])),
    "text alone": (0, mask([6, 1, 3]), None),
    "padding on the left": (3, mask([5, 2, 1], left=True), mask([3, 7, 1], left=True)),
    "holes": (2, HOLES, mask([5, 2, 1])),
    "one token": (1, mask([1, 1, 1]), mask([1, 1, 1])),
}


def inputs(model, case, dtype=torch.float64):
    """Arguments of the model, which tokens are real [B, S], the tensors that can have gradients."""
    queries, text, encoder = INPUTS[case]
    generator = torch.Generator().manual_seed(1)
    width = model.config.hidden_size

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    arguments, leaves = {}, []
    words = 0 if text is None else text.shape[1]
    if type(model).__name__ == "Blip2QFormerModel":
        leaves.append(normal(3, queries + words, width).requires_grad_())
        arguments |= {"query_embeds": leaves[0], "query_length": queries}
    else:
        arguments["input_ids"] = None
        if words:
            arguments["input_ids"] = torch.randint(1, 50, text.shape, generator=generator)
        if queries:
            leaves.append(normal(1, queries, width).requires_grad_())
            arguments["query_embeds"] = leaves[0].expand(3, -1, -1)
    real = torch.ones(3, queries, dtype=torch.long)
    if text is not None:
        real = torch.cat([real, text], 1)
        arguments["attention_mask"] = real
    if queries:
        shape = (3, 7) if encoder is None else encoder.shape
        leaves.append(normal(*shape, model.config.encoder_hidden_size).requires_grad_())
        arguments["encoder_hidden_states"] = leaves[-1]
        if encoder is not None:
            arguments["encoder_attention_mask"] = encoder
    return arguments, real.bool(), leaves


def run(model, case, dtype=torch.float64):
    """Last hidden states and, of a weighted sum of the real ones, every gradient."""
    arguments, real, leaves = inputs(model, case, dtype)
    out = model(**arguments)
    hidden = out.last_hidden_state
    weight = torch.linspace(-1, 2, hidden.numel(), dtype=dtype).view(hidden.shape)
    total = (hidden * weight)[real].sum()
    wanted = [*leaves, *model.parameters()]
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    assert torch.equal(out.pooler_output, hidden[:, 0])
    return hidden.detach(), real, grads


def stock_takes(kind, case):
    """Stock BLIP-2 has a mask of the wrong length for padded encoder tokens beside text."""
    queries, text, encoder = INPUTS[case]
    return kind != "Blip2" or not queries or text is None or encoder is None or encoder.all()


@pytest.fixture
def no_stock_path():
    """A call that is not computed packed fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("no_stock_path")
def test_values_and_every_gradient(kind, attention, case):
    if not stock_takes(kind, case):
        pytest.skip("the stock model refuses this input")
    model = qformer(kind, attention=attention).train()
    expected, real, expected_grads = run(model, case)
    with accelerate_qformer(model):
        found, _, grads = run(model, case)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-10, atol=1e-10)
    assert (found[~real] == 0).all()
    for ours, theirs in zip(grads, expected_grads, strict=True):
        if theirs is None or ours is None:
            assert all(x is None or (x == 0).all() for x in (ours, theirs))
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("no_stock_path")
def test_padded_encoder_tokens_beside_text_of_blip2():
    # What stock BLIP-2 cannot take is what each row gives alone.
    model = qformer("Blip2")
    arguments, real, _ = inputs(model, "queries, text and padded encoder")
    seen = arguments["encoder_attention_mask"].bool()
    with accelerate_qformer(model):
        found = model(**arguments).last_hidden_state
    for row in range(3):
        alone = model(
            query_embeds=arguments["query_embeds"][row : row + 1, real[row]],
            query_length=4,
            encoder_hidden_states=arguments["encoder_hidden_states"][row : row + 1, seen[row]],
        )
        torch.testing.assert_close(found[row, real[row]], alone.last_hidden_state[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("no_stock_path")
def test_float32_and_bfloat16(kind):
    case = "queries and text"
    truth, real, _ = run(qformer(kind), case)
    for dtype in (torch.float32, torch.bfloat16):
        model = qformer(kind, dtype=dtype)
        expected, _, _ = run(model, case, dtype)
        with accelerate_qformer(model):
            found, _, _ = run(model, case, dtype)
        assert_within_budget(found[real], expected[real], truth[real])
        if dtype == torch.float32:
            torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("no_stock_path")
def test_autocast():
    model = qformer("InstructBlip", dtype=torch.float32)
    arguments, real, _ = inputs(model, "queries, text and padded encoder", torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**arguments).last_hidden_state
        with accelerate_qformer(model):
            found = model(**arguments).last_hidden_state
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found[real], expected[real], rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("no_stock_path")
def test_encoder_tokens_that_are_all_hidden_are_no_tokens():
    model = qformer("InstructBlip")
    arguments, _, _ = inputs(model, "queries and padded encoder")
    arguments["encoder_attention_mask"][1] = 0
    silent = copy.deepcopy(model)
    for layer in silent.encoder.layer:
        if layer.has_cross_attention:
            nn.init.zeros_(layer.crossattention.output.dense.weight)
    with accelerate_qformer(model), accelerate_qformer(silent):
        found = model(**arguments).last_hidden_state[1]
        expected = silent(**arguments).last_hidden_state[1]
        del arguments["encoder_attention_mask"]
        arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][:, :0]
        none = model(**arguments).last_hidden_state[1]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(none, expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.usefixtures("no_stock_path")
def test_gradient_checkpointing(reentrant):
    model = qformer("InstructBlip", **dict.fromkeys(NO_DROPOUT, 0.3)).train()
    with accelerate_qformer(model):
        torch.manual_seed(3)
        expected, real, expected_grads = run(model, "queries, text and padded encoder")
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        arguments, _, leaves = inputs(model, "queries, text and padded encoder")
        hidden = model(**arguments).last_hidden_state
        weight = torch.linspace(-1, 2, hidden.numel(), dtype=hidden.dtype).view(hidden.shape)
        (hidden * weight)[real].sum().backward()
    torch.testing.assert_close(hidden.detach(), expected)
    grads = [x.grad for x in (*leaves, *model.parameters())]
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("no_stock_path")
def test_dropout_is_seeded_by_torch_and_off_in_eval():
    model = qformer("Blip2", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.4)
    arguments, real, _ = inputs(model, "queries and text")

    def hidden(seed):
        torch.manual_seed(seed)
        return model(**arguments).last_hidden_state[real].detach()

    with accelerate_qformer(model):
        still = hidden(0)
        assert torch.equal(still, hidden(1))
        model.train()
        assert torch.equal(hidden(0), hidden(0))
        assert not torch.equal(hidden(0), hidden(1))
        assert not torch.equal(hidden(0), still)


@pytest.mark.usefixtures("no_stock_path")
def test_dropout_has_the_mean_of_the_stock_one():
    # With one layer and values read linearly, the mean over masks is the output without them.
    model = qformer("Blip2", num_hidden_layers=1, attention_probs_dropout_prob=0.4).train()
    arguments, _, _ = inputs(model, "text alone")
    read = []
    model.encoder.layer[0].attention.output.dense.register_forward_hook(
        lambda module, args, out: read.append(args[0].detach())
    )
    with accelerate_qformer(model), torch.no_grad():
        for _ in range(400):
            model(**arguments)
        masked = torch.stack(read)
        model.eval()
        model(**arguments)
    error = masked.mean(0) - read[-1]
    deviation = masked.std(0) / 20
    assert (error.abs() < 5 * deviation + 1e-12).all()
    assert masked.std(0).gt(0).any()


def restored(model):
    return all("forward" not in vars(module) for module in model.modules())


def test_restore():
    model = qformer("Blip2")
    arguments, real, _ = inputs(model, "queries and text")
    expected = model(**arguments).last_hidden_state
    state = {name: x.data_ptr() for name, x in model.state_dict().items()}
    handle = accelerate_qformer(model)
    assert list(handle.encoders) == ["encoder"]
    assert not restored(model)
    assert {name: x.data_ptr() for name, x in model.state_dict().items()} == state
    assert (model(**arguments).last_hidden_state[~real] == 0).all()
    handle.restore()
    handle.restore()
    assert restored(model) and handle.encoders == {}
    assert torch.equal(model(**arguments).last_hidden_state, expected)


def test_restored_after_an_error_and_by_the_outermost_handle():
    model = qformer("Blip2")
    with pytest.raises(KeyError), accelerate_qformer(model):
        with accelerate_qformer(model) as inner:
            assert inner.encoders == {}
        assert not restored(model)
        raise KeyError
    assert restored(model)


def test_what_is_no_stock_qformer_is_an_error():
    with pytest.raises(ValueError, match=r"must contain a Q-Former .* got a Linear without one"):
        accelerate_qformer(nn.Linear(1, 1))
    model = qformer("Blip2")
    model.encoder.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="encoder must have its stock forward, got one that was"):
        accelerate_qformer(model)


def test_copies_and_pickles():
    model = qformer("Blip2")
    arguments, real, _ = inputs(model, "queries and text")
    expected = model(**arguments).last_hidden_state
    with accelerate_qformer(model):
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
    assert copied.encoder.forward.__self__ is copied.encoder
    assert (copied(**arguments).last_hidden_state[~real] == 0).all()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(**arguments).last_hidden_state, expected)
    with accelerate_qformer(loaded):
        assert (loaded(**arguments).last_hidden_state[~real] == 0).all()


@pytest.mark.usefixtures("no_stock_path")
def test_save_pretrained_while_accelerated(tmp_path):
    model = qformer("InstructBlip", dtype=torch.float32)
    with accelerate_qformer(model):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.architectures == ["InstructBlipQFormerModel"]
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))


@pytest.mark.usefixtures("no_stock_path")
def test_a_layer_that_was_adapted_is_used():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.low = base, nn.Linear(base.in_features, base.out_features).double()

        def forward(self, x):
            return self.base(x) + self.low(x)

    model = qformer("Blip2")
    for layer in model.encoder.layer:
        layer.attention.attention.query = Adapted(layer.attention.attention.query)
    expected, real, expected_grads = run(model, "queries and text")
    with accelerate_qformer(model):
        found, _, grads = run(model, "queries and text")
    torch.testing.assert_close(found[real], expected[real])
    assert len(grads) == len(expected_grads)


def float_mask(real):
    return torch.zeros(3, 1, 1, 9, dtype=torch.float64).masked_fill(~real[:, None, None], -1.5)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        pytest.param({"output_attentions": True}, "output_attentions is asked for", id="weights"),
        pytest.param({"output_hidden_states": True}, "output_hidden_states is", id="all layers"),
        pytest.param({"is_causal": True}, "the keyword is_causal", id="keyword"),
        pytest.param(
            {"attention_mask": torch.ones(3, 1, 9, 9).tril().bool()},
            "a mask that differs between queries or heads",
            id="causal mask",
        ),
        pytest.param({"attention_mask": float_mask}, "a mask that is a bias", id="bias"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_path_is_taken_and_said(kind, extra, reason):
    model = qformer(kind, attention="eager")
    arguments, real, _ = inputs(model, "queries and text")
    arguments |= {name: x(real) if callable(x) else x for name, x in extra.items()}
    expected = model(**arguments)
    with (
        accelerate_qformer(model),
        pytest.warns(RuntimeWarning, match=f"a Q-Former takes its stock path: {reason}"),
    ):
        found = model(**arguments)
    assert found.keys() == expected.keys()
    for name in expected:
        ours, theirs = found[name], expected[name]
        if isinstance(theirs, tuple):
            assert len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))
        else:
            assert torch.equal(ours, theirs)


def test_outputs_that_the_config_asks_for():
    model = qformer("Blip2", output_hidden_states=True)
    arguments, _, _ = inputs(model, "queries and text")
    with accelerate_qformer(model), pytest.warns(RuntimeWarning, match="output_hidden_states"):
        assert len(model(**arguments).hidden_states) == SIZE["num_hidden_layers"] + 1


@pytest.mark.parametrize("where", ["layer", "attention", "crossattention.attention"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_run(kind, where):
    model = qformer("Blip2").train()
    layer = model.encoder.layer[0]
    module = layer if where == "layer" else layer.get_submodule(where)
    calls = []
    hook = getattr(module, f"register_{kind}_hook")(lambda *args: calls.append(1))
    with accelerate_qformer(model):
        with pytest.warns(RuntimeWarning, match=f"a hook on a {type(module).__name__}"):
            run(model, "queries and text")
        assert calls == [1]
        hook.remove()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            run(model, "queries and text")


def test_recorded_outputs_leave_no_trace():
    # transformers keeps the hooks with which it recorded; they are no reason for the stock path.
    model = qformer("Blip2")
    arguments, real, _ = inputs(model, "queries and text")
    model(**arguments, output_hidden_states=True)
    with accelerate_qformer(model), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert (model(**arguments).last_hidden_state[~real] == 0).all()


def test_errors_of_the_stock_model_stay():
    model = qformer("Blip2")
    arguments, _, _ = inputs(model, "queries and text")
    del arguments["encoder_hidden_states"], arguments["encoder_attention_mask"]
    with (
        accelerate_qformer(model),
        pytest.warns(RuntimeWarning, match="no encoder_hidden_states"),
        pytest.raises(ValueError, match="encoder_hidden_states must be given"),
    ):
        model(**arguments)


def test_queries_that_many_images_share():
    model = qformer("Blip2")
    queries, images = torch.randn(1, 4, 24).double(), torch.randn(3, 7, 20).double()
    expected = model(query_embeds=queries, encoder_hidden_states=images).last_hidden_state
    with accelerate_qformer(model), pytest.warns(RuntimeWarning, match="another batch size"):
        found = model(query_embeds=queries, encoder_hidden_states=images).last_hidden_state
    assert torch.equal(found, expected)


def test_compiles_with_a_break():
    model = qformer("InstructBlip", dtype=torch.float32, num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    with accelerate_qformer(model), torch.no_grad():
        for case in ("queries, text and padded encoder", "holes"):
            arguments, _, _ = inputs(model, case, torch.float32)
            expected = model(**arguments).last_hidden_state
            torch.testing.assert_close(compiled(**arguments).last_hidden_state, expected)


def composite(name: str) -> nn.Module:
    family = "Blip2" if name.startswith("Blip2") else name.split("For")[0]
    slot = {"Blip2": "image_token_index", "InstructBlip": "image_token_index"}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vision_config=VISION,
        qformer_config=SIZE | NO_DROPOUT | {"use_qformer_text_input": True},
        text_config=TEXT,
        num_query_tokens=4,
        image_text_hidden_size=6,
    )
    if "Retrieval" not in name:
        setattr(config, slot.get(family, "video_token_index"), SLOT)
    return getattr(transformers, name)(config).eval()


def prompts(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    frames = (1, 2) if "Video" in name else (1,)
    count = 4 * frames[-1]
    pixels = torch.randn(2, *frames[1:], 3, 8, 8, generator=generator)
    words = torch.randint(5, 50, (2, 6), generator=generator)
    real = mask([6, 3], left=True)
    slots = torch.full((2, count), SLOT)
    if "Retrieval" in name:
        return {"pixel_values": pixels, "input_ids": words, "attention_mask": mask([6, 3])}
    arguments = {
        "pixel_values": pixels,
        "input_ids": torch.cat([slots, words], 1),
        "attention_mask": torch.cat([torch.ones_like(slots), real], 1),
    }
    if "Instruct" in name:
        arguments |= {"qformer_input_ids": words, "qformer_attention_mask": mask([6, 2])}
    return arguments


@pytest.mark.parametrize(
    ("name", "options", "output"),
    [
        ("Blip2Model", {}, "logits"),
        ("Blip2ForConditionalGeneration", {}, "logits"),
        ("Blip2ForImageTextRetrieval", {"use_image_text_matching_head": True}, "logits_per_image"),
        ("Blip2ForImageTextRetrieval", {"use_image_text_matching_head": False}, "text_embeds"),
        ("InstructBlipForConditionalGeneration", {}, "logits"),
        ("InstructBlipVideoForConditionalGeneration", {}, "logits"),
    ],
)
@pytest.mark.usefixtures("no_stock_path")
def test_models_with_a_qformer_inside(name, options, output):
    model, arguments = composite(name), prompts(name) | options
    with torch.no_grad():
        expected = model(**arguments)[output]
        with accelerate_qformer(model) as handle:
            assert list(handle.encoders) == ["qformer.encoder"]
            found = model(**arguments)[output]
            assert model(**arguments, return_dict=False)[0].shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Blip2", "InstructBlip", "InstructBlipVideo"])
@pytest.mark.usefixtures("no_stock_path")
def test_generate(family):
    name = f"{family}ForConditionalGeneration"
    model, arguments = composite(name), prompts(name)
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    expected = model.generate(**arguments, **options)
    with accelerate_qformer(model):
        assert torch.equal(model.generate(**arguments, **options), expected)
