"""The next-atom predictor: causality, packing, windows, and the published numbers."""

import json
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import edt_kernels
from edt_former.tokens import NextAtomPredictor, unpack_patches
from edt_former.tokens.predictor import BOS, EOS, UNKNOWN, VOCABULARY_SIZE, atom_tokens

LENGTHS = [5, 0, 1, 9]


def predictor(seed: int = 0, **options: int) -> NextAtomPredictor:
    """A predictor whose weights are large enough for the order of atoms to matter."""
    torch.manual_seed(seed)
    model = NextAtomPredictor({"layers": 2, "heads": 2, "width": 16, "positions": 32, **options})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def molecules(lengths=LENGTHS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return (
        torch.randint(1, 119, (sum(lengths),)),
        F.pad(torch.tensor(lengths).cumsum(0), (1, 0)),
    )


def dense(model: NextAtomPredictor, tokens: torch.Tensor) -> torch.Tensor:
    """GPT-2 on one sequence of tokens, written out."""
    weights, width = model.state_dict(), model.config["width"]

    def norm(x, name):
        return F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    n = len(tokens)
    x = weights["wte.weight"][tokens] + weights["wpe.weight"][:n]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    for i in range(model.config["layers"]):
        heads = (model.config["heads"], -1)
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=1)
        q, k, v = (part.unflatten(1, heads).transpose(0, 1) for part in qkv)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -torch.inf)
        read = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + linear(read, f"h.{i}.attn.c_proj")
        inner = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate="tanh")
        x = x + linear(inner, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].T


def sequences(elements, offsets) -> list[torch.Tensor]:
    """`<bos> a_1 .. a_n` of every molecule."""
    parts = atom_tokens(elements).split(offsets.diff().tolist())
    return [F.pad(part, (1, 0), value=BOS) for part in parts]


def test_tokens_are_elements_by_atomic_number():
    tokens = atom_tokens(torch.tensor([1, 118, 0, -1, 119]))
    assert tokens.tolist() == [4, VOCABULARY_SIZE - 1, UNKNOWN, UNKNOWN, UNKNOWN]


def test_logits_equal_gpt2_written_out_molecule_by_molecule():
    model, (elements, offsets) = predictor(), molecules()
    expected = [dense(model, sequence) for sequence in sequences(elements, offsets)]
    atoms = torch.cat([logits[:-1] for logits in expected])
    torch.testing.assert_close(model(elements, offsets), atoms, rtol=1e-4, atol=1e-4)
    rows = model(elements, offsets, end=True)
    torch.testing.assert_close(rows, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_an_atom_sees_only_the_atoms_before_it():
    model, (elements, offsets) = predictor(), molecules([6, 4])
    changed = elements.clone()
    changed[3] = changed[3] % 118 + 1
    moved = (model(changed, offsets) - model(elements, offsets)).abs().amax(1) > 1e-4
    assert moved.tolist() == [False] * 4 + [True] * 2 + [False] * 4


def test_a_molecule_alone_equals_it_in_a_batch():
    model, (elements, offsets) = predictor(), molecules()
    batch = model(elements, offsets)
    for start, stop in pairwise(offsets):
        alone = model(elements[start:stop], torch.tensor([0, stop - start]))
        torch.testing.assert_close(batch[start:stop], alone, rtol=1e-5, atol=1e-5)


def test_no_molecules_and_int32_offsets():
    model, (elements, offsets) = predictor(), molecules()
    assert model(elements[:0], torch.tensor([0])).shape == (0, VOCABULARY_SIZE)
    assert torch.equal(model(elements, offsets.int()), model(elements, offsets))


def test_loss_is_the_mean_over_atoms_and_ends():
    model, (elements, offsets) = predictor(), molecules()
    losses = []
    for sequence in sequences(elements, offsets):
        targets = F.pad(sequence[1:], (0, 1), value=EOS)
        losses.append(F.cross_entropy(dense(model, sequence), targets, reduction="none"))
    expected = torch.cat(losses).mean()
    torch.testing.assert_close(model.loss(elements, offsets), expected, rtol=1e-4, atol=1e-4)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = NextAtomPredictor({"layers": 1, "width": 16, "positions": 32})
    elements, offsets = torch.tensor([6, 6, 8, 6, 7]), torch.tensor([0, 3, 5])
    step = torch.optim.Adam(model.parameters(), lr=1e-2)
    start = model.loss(elements, offsets).item()
    for _ in range(30):
        step.zero_grad()
        loss = model.loss(elements, offsets)
        loss.backward()
        step.step()
    assert loss.item() < 0.5 * start


def test_a_fresh_predictor_is_nearly_uniform():
    elements, offsets = molecules()
    torch.manual_seed(0)
    loss = NextAtomPredictor().loss(elements, offsets)
    assert abs(loss.item() - math.log(VOCABULARY_SIZE)) < 0.2


@pytest.mark.parametrize("length", [7, 8, 9, 12, 13, 40])
@pytest.mark.parametrize("end", [False, True], ids=["atoms", "with-end"])
def test_long_molecules_take_the_window_with_most_context(length, end):
    """Windows of 8 rows, 4 apart, each scored on its own as a molecule."""
    model, (elements, offsets) = predictor(positions=8), molecules([3, length, 2])
    rows = []
    for sequence in sequences(elements, offsets):
        sequence = sequence if end else sequence[:-1]
        for row in range(len(sequence)):
            start = next(s for s in range(0, len(sequence), 4) if s <= row < s + 8)
            window = torch.cat([torch.tensor([BOS]), sequence[start + 1 : row + 1]])
            rows.append(dense(model, window)[row - start])
    out = model(elements, offsets, end=end)
    torch.testing.assert_close(out, torch.stack(rows), rtol=1e-4, atol=1e-4)


def test_windows_equal_the_direct_path_for_short_molecules():
    model, (elements, offsets) = predictor(), molecules()
    direct = model._hidden(atom_tokens(elements), offsets[:-1], offsets, len(elements))
    windowed = model._windowed(atom_tokens(elements), offsets, offsets, len(elements))
    assert torch.equal(windowed, direct)


@pytest.mark.parametrize("end", [False, True])
def test_a_tail_changes_nothing(end):
    model, (elements, offsets) = predictor(positions=8), molecules([5, 30])
    rows = 35 + 2 * end
    beside = model(torch.cat([elements, torch.full((7,), 6)]), offsets, end=end)
    assert len(beside) == rows + 7
    assert torch.equal(beside[:rows], model(elements, offsets, end=end))


def test_a_long_neighbour_changes_nothing():
    model, (elements, offsets) = predictor(positions=8), molecules([5, 30])
    alone = model(elements[:5], torch.tensor([0, 5]))
    torch.testing.assert_close(model(elements, offsets)[:5], alone, rtol=1e-5, atol=1e-5)


def test_entropies_and_patches():
    model, (elements, offsets) = predictor(), molecules()
    log_p = model(elements, offsets).log_softmax(1)
    expected = -(log_p.exp() * log_p).sum(1)
    torch.testing.assert_close(model.entropies(elements, offsets), expected, rtol=1e-4, atol=1e-5)
    bits = model.entropies(elements, offsets, unit="bits")
    torch.testing.assert_close(bits, expected / math.log(2), rtol=1e-4, atol=1e-5)

    entropy, patches = model.patches(elements, offsets, rule="local_max", min_size=2)
    assert not entropy.requires_grad
    torch.testing.assert_close(entropy, expected.detach(), rtol=1e-4, atol=1e-5)
    found = edt_kernels.find_patches(entropy, offsets, min_size=2)
    assert torch.equal(patches.ids, found.ids)


def test_the_published_rule_reads_the_uncertainty_after_each_atom():
    model, (elements, offsets) = predictor(), molecules()
    entropy, patches = model.patches(elements, offsets, rule="published")
    rows = edt_kernels.entropy(model(elements, offsets, end=True))
    after = torch.cat([part[1:] for part in rows.split((offsets.diff() + 1).tolist())])
    torch.testing.assert_close(entropy, after.detach(), rtol=1e-5, atol=1e-6)
    found = edt_kernels.find_patches(after, offsets, rule="published")
    assert unpack_patches(patches, offsets) == unpack_patches(found, offsets)


def test_equals_the_published_numbers():
    safetensors = pytest.importorskip("safetensors.torch")
    if "EDT_SHARED" not in os.environ:
        pytest.skip("EDT_SHARED (folder of the recorded published numbers) is not set")
    folder = Path(os.environ["EDT_SHARED"], "oracles")
    record = safetensors.load_file(folder / "edt_entropy.safetensors")
    vocabulary = json.loads((folder / "edt_entropy.json").read_text())["vocab"]
    rdkit = pytest.importorskip("rdkit.Chem")
    table = rdkit.GetPeriodicTable()
    numbers = {index: table.GetAtomicNumber(name) for name, index in list(vocabulary.items())[3:]}
    row = {**{i: i for i in range(3)}, **{i: z + UNKNOWN for i, z in numbers.items()}}
    rows = torch.tensor([row[i] for i in range(len(vocabulary))])

    model = NextAtomPredictor().eval()
    state = model.state_dict()
    for name, value in record.items():
        if not name.startswith("model.transformer."):
            continue
        name = name.removeprefix("model.transformer.")
        linear = ".c_" in name and name.endswith("weight")
        value = value.T if linear else value
        state[name] = state[name].index_copy(0, rows, value) if name == "wte.weight" else value
    model.load_state_dict(state)

    lengths = record["logits_mask"].sum(1) - 2
    elements = torch.cat(
        [
            torch.tensor([numbers.get(int(i), 0) for i in ids[1 : n + 1]], dtype=torch.int64)
            for ids, n in zip(record["logits_ids"], lengths, strict=True)
        ]
    )
    known = [
        bool((ids[1 : n + 1] > EOS).all())
        for ids, n in zip(record["logits_ids"], lengths, strict=True)
    ]
    assert sum(known) > 40
    logits = model(elements, F.pad(lengths.cumsum(0), (1, 0)), end=True)[:, rows]
    for i, part in enumerate(logits.split((lengths + 1).tolist())):
        if known[i]:
            torch.testing.assert_close(part, record["logits"][i, : len(part)], rtol=0, atol=2e-4)


def test_the_config_builds_the_same_predictor():
    model = NextAtomPredictor({"layers": 1})
    assert NextAtomPredictor(json.loads(json.dumps(model.config))).config == model.config
    sizes = {"layers": 1, "heads": 2, "width": 128, "positions": 512}
    assert model.config == {**sizes, "vocabulary": "elements"}


def test_offsets_beyond_the_atoms():
    with pytest.raises(ValueError, match="at most the number of rows 2, got 3"):
        predictor()(torch.tensor([6, 6]), torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"width": 15}, ValueError, "width must be a multiple of heads 2, got 15"),
        ({"positions": 1}, ValueError, "positions must be at least 2, got 1"),
        ({"depth": 1}, TypeError, "depth"),
    ],
)
def test_config_errors(config, error, match):
    with pytest.raises(error, match=match):
        NextAtomPredictor(config)
