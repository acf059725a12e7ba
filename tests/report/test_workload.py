from __future__ import annotations

import pytest
import torch

from edt_former import shipped
from edt_former.report import speed, workload
from edt_former.report.workload import Workload

SMALL = {"width": 16, "layers": 1, "heads": 2, "ffn": 16, "cross_attention_freq": 1}
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 30,
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "huge"}, "size must be one of 'published', 'tiny', got 'huge'"),
        ({"dtype": "fp16"}, "dtype must be one of 'fp32', 'bf16', got 'fp16'"),
        ({"device": "tpu"}, "device must be one of 'cpu', 'cuda', got 'tpu'"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"text_tokens": 0}, "text_tokens must be at least 1, got 0"),
        ({"new_tokens": -1}, "new_tokens must be at least 1, got -1"),
        ({"llm": "70b"}, "llm must be one of '40m', '135m', '1b', '8b' or the folder of"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Workload(**options)


@pytest.mark.parametrize(
    ("cuda", "built"), [(None, "built for the CPU only"), ("13.0", "built for CUDA 13.0")]
)
def test_a_gpu_that_is_not_there(monkeypatch, cuda, built):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ValueError, match=f"one that torch finds, {built}, got 'cuda'"):
        Workload(device="cuda")


def test_the_tiny_models_are_the_shipped_ones(as_shipped):
    parts = Workload(size="tiny", dtype="bf16").build()
    assert parts.connector.config == shipped.load().connector.config
    dtypes = [next(part.parameters()).dtype for part in parts]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    assert not any(p.requires_grad or part.training for part in parts for p in part.parameters())


def test_published_size_has_random_weights_by_seed(as_shipped, monkeypatch):
    monkeypatch.setattr(speed, "PUBLISHED", SMALL)
    monkeypatch.setitem(workload.LLM_SHAPES, "40m", SHAPE)
    first, again, other = (Workload(seed=seed).build() for seed in (0, 0, 1))
    assert first.language_model.config.hidden_size == first.connector.options.llm_width == 16
    assert first.graph_encoder.width == first.connector.options.encoder_width == 512
    for part in ("graph_encoder", "connector", "language_model"):
        weights = [
            torch.cat([p.flatten() for p in getattr(x, part).parameters()])
            for x in (first, again, other)
        ]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_language_model_of_ones_own(as_shipped, monkeypatch):
    monkeypatch.setattr(speed, "PUBLISHED", SMALL)
    parts = Workload(llm=str(as_shipped / "language_model")).build()
    own = shipped.load().language_model
    weights = parts.language_model.get_input_embeddings().weight
    assert torch.equal(weights, own.get_input_embeddings().weight)
    assert parts.connector.options.llm_width == weights.shape[1]


def test_shapes_have_the_size_of_their_name():
    from transformers import AutoModelForCausalLM, LlamaConfig

    for name, shape in workload.LLM_SHAPES.items():
        config = LlamaConfig(**{"tie_word_embeddings": True, **shape})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        count = sum(p.numel() for p in model.parameters())
        named = int(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
        assert named * 0.99 <= count <= named * 1.25, (name, count)


def test_without_models(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="the shipped models are not in"):
        Workload().build()
