"""Adapters in stock language models: where they go, what they compute, and that they come off."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from edt_former.connectors import MoleculeAdapters
from edt_former.language import InstanceAdapters, connector_options, find_sites
from edt_former.language.frozen import content_hash, module_weights

VOCAB, WIDTH, INNER = 24, 16, 20
BLOCK = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
GROUPED = {**BLOCK, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**BLOCK),
    "llama3": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
    "opt": OPTConfig(
        **{k: v for k, v in BLOCK.items() if k != "intermediate_size"},
        ffn_dim=INNER,
        word_embed_proj_dim=WIDTH,
    ),
    "gpt2": GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCAB),
}
TYPES = {"gpt2": "omd", "opt": "qkvod"}
LAYERS = [1]


def language_model(name: str = "llama3"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def widths_of(model, types: str) -> dict[str, tuple[int, int]]:
    return {kind: sites[0][1:] for kind, sites in find_sites(model, types).items()}


def adapters(widths, count: int, *, layers: int = 1, std: float = 0.2) -> MoleculeAdapters:
    a = {k: std * torch.randn(layers, count, d_in, 3) for k, (d_in, _) in widths.items()}
    b = {k: std * torch.randn(layers, d_out, 3) for k, (_, d_out) in widths.items()}
    return MoleculeAdapters(a, b, scale=1.5)


def injected(model, types: str = "qkvomd", count: int = 3):
    widths = widths_of(model, types)
    return InstanceAdapters(model, widths, LAYERS), adapters(widths, count)


def ids(rows: int = 3, length: int = 6) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def merged(model, used: MoleculeAdapters, row: int):
    """The model with the adapters of one row added to its weights."""
    model = copy.deepcopy(model)
    for kind, sites in find_sites(model, used.a).items():
        delta = used.scale * used.b[kind][0] @ used.a[kind][0, row].T
        module = model.get_submodule(sites[LAYERS[0]].name)
        with torch.no_grad():
            module.weight += delta.T if type(module).__name__ == "Conv1D" else delta
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_every_row_computes_with_weights_of_its_own(name):
    model = language_model(name)
    types = TYPES.get(name, "qkvomd").replace("m", "")
    plain = copy.deepcopy(model)
    hooks, used = injected(model, types)
    with hooks.using(used), torch.no_grad():
        logits = model(ids()).logits
    for row in range(3):
        expected = merged(plain, used, row)(ids()[row : row + 1]).logits
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)
    assert (logits - plain(ids()).logits).abs().max() > 0.01


@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_the_path_around_the_mlp_reads_what_the_mlp_reads(name):
    model = language_model(name)
    hooks, used = injected(model, "m")
    mlp = model.get_submodule(find_sites(model, "m")["m"][1].name)
    x = torch.randn(3, 5, WIDTH)
    plain = mlp(x)
    with hooks.using(used):
        added = mlp(x) - plain
    expected = 1.5 * x @ used.a["m"][0] @ used.b["m"][0].T
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-4)


def test_a_llama_with_generated_weights_as_recorded_in_mora(recorded):
    tensors = recorded("mora")
    state = {
        name.removeprefix("llama.state."): x
        for name, x in tensors.items()
        if name.startswith("llama.state.") and not name.endswith("inv_freq")
    }
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(state)
    kinds = dict.fromkeys("qkvom", (24, 24))
    found = {
        name: {
            kind: torch.stack([tensors[f"llama.mora.layer{n}.{kind}.{name}"] for n in (1, 3)])
            for kind in kinds
        }
        for name in "AB"
    }
    hooks = InstanceAdapters(model, kinds, [1, 3])
    used = MoleculeAdapters(found["A"], {kind: b[:, 0] for kind, b in found["B"].items()})
    inputs = {
        "input_ids": tensors["llama.in.ids"],
        "attention_mask": tensors["llama.in.attention_mask"],
    }
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), hooks.using(used):
        out = model(**inputs, labels=tensors["llama.in.labels"], output_hidden_states=True)
    with torch.no_grad():
        plain = model(**inputs).logits
    for layer, hidden in enumerate(out.hidden_states):
        expected = tensors[f"llama.hidden{layer}"]
        torch.testing.assert_close(hidden[real], expected[real], rtol=0, atol=1e-4)
    torch.testing.assert_close(out.logits[real], tensors["llama.logits"][real], rtol=0, atol=2e-4)
    torch.testing.assert_close(
        plain[real], tensors["llama.logits_no_mora"][real], rtol=0, atol=2e-4
    )
    torch.testing.assert_close(out.loss, tensors["llama.loss"], rtol=0, atol=1e-4)


def test_without_adapters_in_use_and_after_removal_every_bit_is_the_same():
    model = language_model()
    plain, weights = model(ids()).logits, content_hash(module_weights(model))
    names = list(model.state_dict())
    hooks, used = injected(model)
    assert torch.equal(model(ids()).logits, plain)
    with hooks.using(used), hooks.using(None):
        assert torch.equal(model(ids()).logits, plain)
    with pytest.raises(RuntimeError, match="on purpose"), hooks.using(used):
        raise RuntimeError("on purpose")
    assert torch.equal(model(ids()).logits, plain)
    assert list(model.state_dict()) == names and content_hash(module_weights(model)) == weights
    hooks.remove()
    with hooks.using(used):
        assert torch.equal(model(ids()).logits, plain)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_row_with_zeros_has_the_bits_of_the_plain_language_model():
    model = language_model()
    plain = model(ids()).logits
    hooks, used = injected(model)
    for a in used.a.values():
        a[:, 1] = 0
    with hooks.using(used):
        logits = model(ids()).logits
    assert torch.equal(logits[1], plain[1]) and not torch.equal(logits[0], plain[0])


def test_a_step_with_the_cache_gives_what_the_whole_text_gives():
    model = language_model()
    hooks, used = injected(model)
    with hooks.using(used), torch.no_grad():
        whole = model(ids()).logits
        start = model(ids()[:, :4], use_cache=True)
        for step in (4, 5):
            start = model(
                ids()[:, step : step + 1], past_key_values=start.past_key_values, use_cache=True
            )
            torch.testing.assert_close(start.logits[:, 0], whole[:, step], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "num_return_sequences": 2}, {"do_sample": False}]
)
def test_an_adapter_follows_its_beams(options):
    model = language_model()
    hooks, used = injected(model)
    said = {"max_new_tokens": 6, "min_new_tokens": 6, **options}
    with hooks.using(used):
        together = model.generate(ids(), attention_mask=torch.ones_like(ids()), **said)
    each = len(together) // 3
    answers = []
    for row in range(3):
        own = used._replace(a={kind: a[:, row : row + 1] for kind, a in used.a.items()})
        with hooks.using(own):
            mask = torch.ones(1, 6, dtype=torch.int64)
            alone = model.generate(ids()[row : row + 1], attention_mask=mask, **said)
        answers.append(alone)
        assert torch.equal(together[each * row : each * (row + 1)], alone)
    assert not torch.equal(answers[0][:, 6:], answers[1][:, 6:])


def gradients(model, hooks, batches, *, checkpointed: bool) -> list[torch.Tensor]:
    """Gradients of A after one backward through several forward passes with different adapters."""
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    leaves = [a.detach().requires_grad_() for used in batches for a in used.a.values()]
    parts = iter(leaves)
    loss = 0
    for used in batches:
        own = used._replace(a={kind: next(parts) for kind in used.a})
        with hooks.using(own):
            logits = model(ids()).logits
        loss = loss + F.cross_entropy(logits.flatten(0, 1), ids().flatten())
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_a_checkpointed_layer_is_computed_again_with_its_own_adapters():
    model = language_model().requires_grad_(False)
    hooks, first = injected(model)
    batches = [first, adapters(widths_of(model, "qkvomd"), 3)]
    expected = gradients(model, hooks, batches, checkpointed=False)
    found = gradients(model, hooks, batches, checkpointed=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    functions = {type(layer._gradient_checkpointing_func).__name__ for layer in model.model.layers}
    assert functions == {"_Checkpointed"}
    hooks.remove()
    functions = {type(layer._gradient_checkpointing_func).__name__ for layer in model.model.layers}
    assert functions == {"partial"}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_reentrant_checkpointing_is_refused():
    model = language_model()
    hooks, used = injected(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"), hooks.using(used):
        pass
    with torch.no_grad(), hooks.using(used):
        model(ids())


def test_half_precision_takes_adapters_of_single():
    model = language_model().bfloat16()
    hooks, used = injected(model)
    with hooks.using(used), torch.no_grad():
        logits = model(ids()).logits
    assert logits.dtype == torch.bfloat16
    with hooks.using(used.to(torch.zeros(0, dtype=torch.bfloat16))), torch.no_grad():
        assert torch.equal(model(ids()).logits, logits)


def test_a_copy_of_the_model_has_hooks_of_its_own():
    model = language_model()
    model.hooks, used = injected(model)
    plain = model(ids()).logits
    twin = copy.deepcopy(model)
    with model.hooks.using(used):
        assert torch.equal(twin(ids()).logits, plain)
    with twin.hooks.using(used):
        assert not torch.equal(twin(ids()).logits, plain)


def test_layers_below_peft_adapters_are_found():
    peft = pytest.importorskip("peft", reason="peft wraps the layers")
    model = language_model()
    plain = copy.deepcopy(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    hooks, used = injected(model, "qv")
    with hooks.using(used), torch.no_grad():
        logits = model(ids()).logits
    expected = merged(plain, used, 2)(ids()[2:]).logits
    torch.testing.assert_close(logits[2:], expected, rtol=1e-4, atol=1e-4)


def test_four_bit_layers_have_adapters():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = language_model()
    for sites in find_sites(model, "qd").values():
        for name, d_in, d_out in sites:
            layer = bitsandbytes.nn.Linear4bit(d_in, d_out, bias=False, quant_type="nf4")
            layer.load_state_dict(model.get_submodule(name).state_dict())
            model.set_submodule(name, layer.to("cpu"))
    hooks, used = injected(model, "qd")
    site = find_sites(model, "d")["d"][1]
    x = torch.randn(3, 4, site.d_in)
    layer = model.get_submodule(site.name)
    plain = layer(x)
    with hooks.using(used):
        added = layer(x) - plain
    expected = 1.5 * x @ used.a["d"][0] @ used.b["d"][0].T
    torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-3)


def test_what_the_language_model_decides():
    options = connector_options({"name": "mora", "types": "kd"}, language_model("qwen3"))
    assert options["widths"] == {"k": (WIDTH, 16), "d": (INNER, WIDTH)}
    assert (options["llm_width"], options["llm_layers"]) == (WIDTH, 2)
    assert connector_options({"name": "qformer"}, language_model()) == {
        "name": "qformer",
        "llm_width": WIDTH,
    }


def test_refusals_name_the_module():
    model = language_model("gpt2")
    with pytest.raises(ValueError, match=r"'q' needs a module called q_proj .*c_attn"):
        find_sites(model, "q")
    with pytest.raises(
        ValueError, match=r"'d' must name one module of a layer, layer 0 has .*attn"
    ):
        find_sites(model, "d", {"d": "c_proj"})
    with pytest.raises(ValueError, match=r"widths of 'o' must be those of .*o_proj, \(16, 16\)"):
        InstanceAdapters(language_model(), {"o": (16, 8)}, [0])
    with pytest.raises(ValueError, match="layers must be of the language model's 2, got 2"):
        InstanceAdapters(language_model(), {"o": (16, 16)}, [2])
    hooks, used = injected(language_model(), count=2)
    with (
        pytest.raises(ValueError, match="multiple of the 2 adapters in use, got 3"),
        hooks.using(used),
    ):
        hooks._language_model(ids(3, 1))


def test_threads_use_adapters_of_their_own():
    model = language_model()
    plain = model(ids()).logits
    hooks, used = injected(model)
    other = MoleculeAdapters({k: -a for k, a in used.a.items()}, used.b, scale=used.scale)

    def adapted(adapters):
        with torch.no_grad(), hooks.using(adapters):
            return model(ids()).logits

    alone = adapted(other)
    with ThreadPoolExecutor(1) as thread, torch.no_grad(), hooks.using(used):
        mine = model(ids()).logits
        assert torch.equal(thread.submit(adapted, None).result(), plain)
        assert torch.equal(thread.submit(adapted, other).result(), alone)
        assert torch.equal(model(ids()).logits, mine)
    assert not torch.equal(mine, alone)
