"""What runs on CPU tensors leaves Triton alone."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import sys
import torch
import edt_kernels as ek

x, offsets = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 2, 6])
h, patches = ek.entropy_patches(x, offsets)
pooled = ek.segment_pool(x, patches.atom_offsets)
largest = ek.pool_by_id(x, torch.tensor([0, 1, 1, 0, 2, 2]), 3, reduce="max")
heads = x.unsqueeze(1)
attended = ek.ragged_attention(heads, heads, heads, offsets, offsets)
joined, _ = ek.ragged_cat([x[:1], ek.segment_softmax(x, offsets)], [None, offsets])
slots = torch.tensor([[True, True, False], [True, True, True]])
spliced = ek.splice(torch.zeros(2, 3, 4), x, torch.tensor([0, 2, 5]), slots)
longer = ek.insert(x, offsets, x, offsets, torch.tensor([1, 6]))
a, b = torch.zeros(2, 4, 2), torch.zeros(4, 2)
adapted = ek.instance_lora(x, a, b, offsets)
many = ek.instance_lora_many([x.detach()], [a], [b], offsets)
outputs = [h, pooled, largest, attended, joined, spliced, longer.embeds, adapted, *many]
outputs += [ek.entropy(x), ek.linear_entropy(x, x), ek.find_patches(h, offsets).threshold]
sum(x.nansum() for x in outputs).backward()
ek.build_info()
print(*(name for name in sys.modules if name.startswith(("triton", "edt_kernels.triton"))))
"""


def test_cpu_tensors_never_import_triton():
    path = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
