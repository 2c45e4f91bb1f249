"""The fixture model and a small CPU run, as the memory plan sees them."""

from __future__ import annotations

from empg_lite.policy.memory.machine import Machine
from empg_lite.policy.memory.shape import Shape
from empg_lite.policy.memory.terms import Settings

FIXTURE = Shape(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=16, vocab=259, tied=True)
BASE = Settings(
    itemsize=4,
    four_bit=False,
    lora_r=4,
    adam_8bit=False,
    problems=4,
    samples=4,
    prompt_tokens=40,
    new_tokens=24,
    batch_rows=16,
    merged=False,
    micro_batch_tokens=16 * 64,
    checkpointing=False,
    evaluates=False,
    device="cpu",
)
CPU = Machine("cpu", 10**12)
