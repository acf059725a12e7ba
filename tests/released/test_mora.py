"""MoRA's published weight generator as a connector and back, every bit the same."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from edt_former.cli.main import main
from edt_former.connectors import MoRA, make_connector
from edt_former.language import load_part
from edt_former.released import GeneratorSizes, Options, to_ours, to_released
from edt_former.released.mora import prefix_of, to_published

SIZE = {"width": 8, "layers": 2, "heads": 2, "ffn": 12, "encoder_width": 6}
LLM = {"llm_width": 10, "llm_layers": 4, "every": 2, "rank": 3, "types": "qvm"}


def published(prefix: str = "model.mm_projector.", **options: object) -> dict[str, torch.Tensor]:
    """Weights under the published names, with a table of positions that nobody reads."""
    model = make_connector({"name": "mora", **SIZE, **LLM, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    weights = to_published(model.state_dict(), model.config)
    weights["pos_embed"] = torch.randn(1, 5, 8)
    return {prefix + name: x.to(torch.bfloat16) for name, x in weights.items()}


def told(**changes: object) -> GeneratorSizes:
    return GeneratorSizes(**{"rank": 3, "types": "qvm", "every": 2, "heads": 2, **changes})


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("prefix", ["", "model.mm_projector."])
def test_there_and_back_every_bit_is_the_same(tmp_path, separate, prefix):
    weights = published(prefix, separate=separate)
    save_file(weights, tmp_path / "mora.safetensors")
    plan = to_ours(tmp_path / "mora.safetensors", Options(generator=told(alpha=6)))
    plan.write(tmp_path / "ours")
    connector = load_part(make_connector, tmp_path / "ours" / "connector")
    assert isinstance(connector, MoRA) and connector.options.separate is separate
    assert connector.options.alpha == 6 and connector.options.adapted == [1, 3]
    shared = weights[f"{prefix}Bs"].float().reshape(3, 2, 10, 3)
    for kind, b in zip("qvm", shared, strict=True):
        assert torch.equal(connector.b[kind], b)

    to_released(tmp_path / "ours").write(tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[n], x) and back[n].dtype == x.dtype for n, x in weights.items())


def test_the_recorded_generator_comes_back(recorded, tmp_path):
    case = "qkvom_nosep_skip2.state."
    weights = {n.removeprefix(case): x for n, x in recorded("mora").items() if n.startswith(case)}
    save_file({n: x.contiguous() for n, x in weights.items()}, tmp_path / "mora.safetensors")
    sizes = GeneratorSizes(rank=4, types="qkvom", every=2, heads=4)
    to_ours(tmp_path / "mora.safetensors", Options(generator=sizes)).write(tmp_path / "ours")
    to_released(tmp_path / "ours").write(tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], x) for name, x in weights.items())


def test_the_command(tmp_path, capsys):
    save_file(published(), tmp_path / "mora.safetensors")
    sizes = ["--mora-rank", "3", "--mora-types", "qvm", "--mora-every", "2", "--heads", "2"]
    command = ["convert", str(tmp_path / "mora.safetensors"), str(tmp_path / "ours"), *sizes]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "found weight generator of MoRA: 3 of 2 layers, width 8, for qvm of 2 layers of width 10, "
        "rank 3"
    )
    assert "named model.mm_projector.*" in lines[1]
    names = load_file(tmp_path / "ours" / "connector" / "model.safetensors").keys()
    assert "b.m" in names and "gen.2.weights_head.10.weight" in names


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"types": "qkvo"}, "types must divide the 6 adapted maps, got 'qkvo'"),
        ({"rank": 4}, "rank must divide the 30 numbers of an adapter, got 4"),
        ({"heads": 3}, "width must be a multiple of heads 3"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, sizes, message):
    save_file(published(), tmp_path / "mora.safetensors")
    with pytest.raises(ValueError, match=message):
        to_ours(tmp_path / "mora.safetensors", Options(generator=told(**sizes)))


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    weights = published("")
    del weights["gen.1.norm.bias"]
    weights["gen.7.norm.bias"] = torch.zeros(8)
    save_file(weights, tmp_path / "mora.safetensors")
    with pytest.raises(ValueError, match=r"missing: gen\.1\.norm\.bias; unexpected: gen\.7\.norm"):
        to_ours(tmp_path / "mora.safetensors", Options(generator=told()))


def test_what_the_published_program_cannot_have_stays(tmp_path):
    from edt_former.language import save_part

    for options, message in (
        ({"head": "factorised"}, "head of the connector in .* must be 'full'"),
        ({"sum_tokens": 1}, "sum_tokens of the connector"),
        ({"widths": {"v": [10, 5]}}, "widths of the connector"),
    ):
        model = make_connector({"name": "mora", **SIZE, **LLM, **options})
        save_part(model, tmp_path / "connector")
        with pytest.raises(ValueError, match=message):
            to_released(tmp_path)


def test_names_of_other_models():
    assert prefix_of(["Bs"]) is None
    assert prefix_of(["a.Bs", "a.visual_proj.weight", "llm.norm"]) is None
