"""Memory terms in bytes: the tensors alive at the peak of each phase.

Nothing here is fitted to a measurement. ``tests/policy/test_plan_terms.py`` checks the terms against what
autograd saves, live tensors and the weights of loaded models, ``benchmarks/plan_check.py`` against the
resident memory of real steps. Sizes assume the longest rows that the recipe allows. Where Unsloth's own
M-step is used (shared prompts, flex attention, offloaded checkpoints), these counts are an upper bound: it
keeps less per token and pads nothing.

In the forward pass of training, one block keeps for every packed token (D hidden, I intermediate, A = H d, K
= G d)::

    residual before attention, normed    2 D    the norm's input, the LoRA input of q, k, v
    attention's output, packed again     A      the LoRA input of o
    queries and keys before their norm   A + K  Qwen3 only; in fp32 the values with them
    residual before the MLP, normed      2 D
    gate, silu(gate), up, product        4 I
    LoRA's inner vectors                 7 r

and in attention, where rows are padded to the longest of their micro-batch::

    queries and output                   2 A    per padded token, with one log-sum per head keys and values
    2 K    per padded token, and a prompt's once more for each of its rows

"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from empg_lite.core.sizes import (
    ALIGN,
    PREFILL_TOKENS,
    cache_len,
    decoder_slots,
    logit_rows,
    round_up,
)

if TYPE_CHECKING:
    from empg_lite.policy.memory.shape import Shape

FP32 = 4
#: Padded tokens in attention per token of a micro-batch. Within a problem the longest of 8 rationales is
#: twice the mean (lognormal lengths, sigma 0.5), and ``packed_batches`` groups problems of similar length.
#: Not a bound: very short rows beside one very long row pad more; if memory runs out, the micro-batch is
#: halved.
PADDED = 2.5
#: cuBLAS workspace of captured graphs: 32 MiB on sm90, 8 before.
GRAPH_WORKSPACE = 32 << 20
#: Tokens by which Unsloth's own decoding grows its KV cache.
UNSLOTH_BUFFER = 512


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a recipe that determine its memory.

    Attributes:
        itemsize: bytes of the compute type.
        four_bit: linears in NF4 with double quantization, else in the compute type.
        lora_r: rank of the adapter.
        adam_8bit: Adam's moments in 8 bits.
        problems, samples: P and K of a step.
        prompt_tokens, new_tokens: longest prompt and completion.
        batch_rows: most rows decoded at once.
        merged: sampling uses a merged copy of the linears in the compute type.
        micro_batch_tokens: tokens of a micro-batch, each prompt once; a longer row gets its own.
        checkpointing: a block's activations are recomputed in the backward pass.
        evaluates: evaluation decodes one row per prompt, up to ``batch_rows`` of them.
        device: ``cpu`` or ``cuda``.
        engine: ``native``; or ``generate``, ``unsloth``: the backend's own ``generate``.
        expands_keys: attention over prompts repeats keys for every query head (below sm80).
    """

    itemsize: int
    four_bit: bool
    lora_r: int
    adam_8bit: bool
    problems: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    batch_rows: int
    merged: bool
    micro_batch_tokens: int
    checkpointing: bool
    evaluates: bool
    device: str
    engine: str = "native"
    expands_keys: bool = False

    @property
    def row_tokens(self) -> int:
        """Tokens of the longest row."""
        return self.prompt_tokens + self.new_tokens

    @property
    def captures(self) -> bool:
        """Whether decoding steps are captured as CUDA graphs."""
        return self.engine == "native" and self.device == "cuda"

    @property
    def decoded_rows(self) -> int:
        """Slots of the E-step's decoder."""
        return decoder_slots(self.problems * self.samples, self.batch_rows)

    @property
    def evaluated_rows(self) -> int:
        """Slots of the evaluation's decoder."""
        return decoder_slots(self.batch_rows, self.batch_rows)

    @property
    def cache_len(self) -> int:
        """Tokens of a row in the KV cache."""
        return cache_len(self.row_tokens, self.captures)

    @property
    def step_tokens(self) -> int:
        """Most tokens computed in a whole step: a completion's last one predicts nothing."""
        return self.problems * (self.prompt_tokens + self.samples * (self.new_tokens - 1))

    @property
    def fitted_tokens(self) -> int:
        """Tokens computed in the largest micro-batch: the budget, or a single longer row."""
        return min(max(self.micro_batch_tokens, self.row_tokens), self.step_tokens)

    @property
    def padded_tokens(self) -> int:
        """The same with attention's padding, which a single row and rows of equal length do not have."""
        return min(max(int(PADDED * self.micro_batch_tokens), self.row_tokens), self.step_tokens)

    @property
    def padded_prompts(self) -> int:
        """Padded tokens of prompts: with completions behind them, at most all tokens without padding."""
        return min(self.fitted_tokens, self.problems * self.prompt_tokens)

    @property
    def padded_completions(self) -> int:
        """Most padded tokens of completions: their prompts may be short."""
        return min(self.padded_tokens, self.problems * self.samples * (self.new_tokens - 1))

    @property
    def scored_tokens(self) -> int:
        """Most tokens that the head scores."""
        budget = max(self.micro_batch_tokens, self.row_tokens)
        return min(budget, self.problems * self.samples * self.new_tokens)

    @property
    def keys_read(self) -> int:
        """Most keys that attention reads: one per padded token, and a prompt's again for each of K rows."""
        whole_step = self.problems * (self.prompt_tokens + self.samples * (self.row_tokens - 1))
        return min(whole_step, self.samples * self.fitted_tokens + self.padded_tokens)


def _narrow(s: Settings) -> bool:
    """Whether the compute type has 16 bits: operations that need more make fp32 copies."""
    return s.itemsize < FP32


# --- held in all phases ---------------------------------------------------------------------------


def linear_weights(shape: Shape, s: Settings) -> int:
    """The linears. NF4: half a byte per weight, an 8-bit scale per 64 weights, a 32-bit one per 256 scales;
    and for each matrix the two code tables (16 and 256 floats) and the mean of the scales."""
    if not s.four_bit:
        return shape.linear_params * s.itemsize
    total = 0
    for out, width in shape.linears:
        weights = out * width
        blocks = -(-weights // 64)
        total += -(-weights // 2) + blocks + FP32 * (-(-blocks // 256) + 16 + 256 + 1)
    return shape.layers * total


def embeddings(shape: Shape, s: Settings) -> int:
    """Embedding, head (once where they are tied), norms and biases, in the compute type; and the weights of
    Qwen3's norms of queries and keys once more, side by side for all heads."""
    spread = shape.layers * (shape.queries + shape.keys) if shape.family.qk_norm else 0
    return (shape.embedding_params + shape.small_params + spread) * s.itemsize


def adapter_params(shape: Shape, s: Settings) -> int:
    """Number of LoRA weights: r (in + out) for each linear."""
    return shape.layers * s.lora_r * sum(out + width for out, width in shape.linears)


def adapter(shape: Shape, s: Settings) -> int:
    """LoRA in fp32, and in a 16-bit model the cast copies that autocast keeps during a phase."""
    return adapter_params(shape, s) * (FP32 + (s.itemsize if _narrow(s) else 0))


def moments(shape: Shape, s: Settings) -> int:
    """Adam's two moments from the first update on: fp32; or 8 bits with an fp32 scale per 256 values, except
    for matrices below 4,096 elements, and two code tables of 256 floats."""
    if not s.adam_8bit:
        return adapter_params(shape, s) * 2 * FP32
    sizes = [s.lora_r * side for linear in shape.linears for side in linear]
    packed = [n + FP32 * -(-n // 256) if n >= 4096 else n * FP32 for n in sizes]
    return 2 * (shape.layers * sum(packed) + 256 * FP32 * any(n >= 4096 for n in sizes))


# --- E-step ---------------------------------------------------------------------------------------


def sampler_copy(shape: Shape, s: Settings) -> int:
    """The merged linears and their biases: allocated once, rewritten for every E-step."""
    return (shape.linear_params + shape.layers * shape.biases) * s.itemsize if s.merged else 0


def merged_linear(shape: Shape, s: Settings) -> int:
    """Writing the merged copy, at the largest linear: the sum of base and adapter in fp32; the base in fp32
    too if it has 16 bits, and dequantized if it is NF4."""
    weights = max(out * width for out, width in shape.linears)
    return weights * (FP32 * (2 if _narrow(s) else 1) + (s.itemsize if s.four_bit else 0))


def cache_bytes_per_token(shape: Shape, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.layers * shape.keys * itemsize


def kv_cache(shape: Shape, s: Settings, rows: int) -> int:
    """Keys and values of all slots at full length, from the first token on; on a GPU those of the prompts'
    common prefix once more; and each row's last hidden state, which the draw reads."""
    tokens = rows * s.cache_len + s.captures * s.prompt_tokens
    return tokens * cache_bytes_per_token(shape, s.itemsize) + rows * shape.hidden * s.itemsize


def prompt_pass(shape: Shape, s: Settings, prompts: int, rows_of_each: int) -> int:
    """One prefill batch, at the largest of three moments: in the MLP; where keys are copied for each row that
    continues the prompt; with the heads' vectors (as much only in Qwen3-0.6B, where A is twice D).
    For all layers: the rotary angles, and (integers) source and target of each key of each row.
    """
    tokens = max(min(PREFILL_TOKENS[s.device], prompts * s.prompt_tokens), s.prompt_tokens)
    copied = 3 * shape.hidden + 2 * shape.queries + (3 + rows_of_each) * shape.keys
    by_heads = 3 * shape.hidden + 5 * shape.queries + 6 * shape.keys
    token = max(_through_mlp(shape), copied, by_heads) + 2 * shape.head_dim
    indices = rows_of_each * (17 + 8 * shape.kv_heads) + 16
    return tokens * (token * s.itemsize + indices)


def _through_mlp(shape: Shape) -> int:
    """Elements per token in the MLP without gradients: the residual, its two addends and both normed;
    attention's output; gate, up, silu(gate) and the product."""
    return 5 * shape.hidden + shape.queries + 4 * shape.intermediate


def attention_on_cpu(shape: Shape, s: Settings, rows: int) -> int:
    """One layer's attention at the last token: the scores, the mask as bool and as float, the token's own
    vectors; in fp32 the scores' softmax, in 16 bit the keys, copied for the product.

    On a GPU the kernel reads the keys in place and keeps no scores.
    """
    if s.device != "cpu":
        return 0
    beside = shape.keys * s.itemsize if _narrow(s) else shape.heads * FP32
    seen = shape.heads * s.itemsize + beside + s.itemsize + 1
    vectors = shape.hidden + 2 * shape.queries + 3 * shape.keys
    return rows * (s.row_tokens * seen + vectors * s.itemsize)


def decoding_step(shape: Shape, s: Settings, rows: int) -> int:
    """One token of each row in the MLP, and the attention mask as bool and as float."""
    token = _through_mlp(shape) + 2 * shape.head_dim
    return rows * (token * s.itemsize + s.cache_len * (s.itemsize + 1))


def drawing(shape: Shape, s: Settings, rows: int) -> int:
    """One draw, a chunk of rows at a time: logits (in 16 bit also an fp32 copy) and fp32 probabilities."""
    chunk = min(logit_rows(s.device, shape.vocab), rows)
    return chunk * shape.vocab * (s.itemsize + FP32 * (2 if _narrow(s) else 1))


def compacting(shape: Shape, s: Settings, rows: int) -> int:
    """A copy of one layer's keys of the rows that move to the first slots: no more than have ended."""
    return rows // 2 * s.cache_len * shape.keys * s.itemsize


def graph_pool(shape: Shape, s: Settings, rows: int) -> int:
    """The memory pool of all captured graphs: a draw, a decoding step of all rows (plus a dequantized linear
    without a merged copy), and the cuBLAS workspace.

    Graphs run one after another, and smaller ones reuse the blocks of the largest. Draw and step are summed:
    their block sizes differ too much for reuse.
    """
    if not s.captures:
        return 0
    linear = 0 if s.merged else unpacked_linear(shape, s)
    return drawing(shape, s, rows) + decoding_step(shape, s, rows) + linear + GRAPH_WORKSPACE


def most_slots(s: Settings) -> int:
    """Slots of the largest decoder: captured graphs keep it, and smaller calls use it too."""
    return max(s.decoded_rows, s.evaluated_rows if s.evaluates else 0)


def held_by_sampler(shape: Shape, s: Settings) -> int:
    """What the sampler keeps between E-steps on a GPU: the merged copy if there is one, the cache, and the
    graphs' pool."""
    if not s.captures:
        return 0
    rows = most_slots(s)
    return sampler_copy(shape, s) + kv_cache(shape, s, rows) + graph_pool(shape, s, rows)


def unpacked_linear(shape: Shape, s: Settings) -> int:
    """The largest linear, dequantized for its product: weights and fp32 scales."""
    weights = max(out * width for out, width in shape.linears)
    return weights * s.itemsize + FP32 * (weights // 64) if s.four_bit else 0


# --- E-step with the backend's own generate ---------------------------------------------------------


def generated_cache(shape: Shape, s: Settings, rows: int) -> int:
    """Keys and values of all rows at full length, left-padded; Unsloth allocates ahead."""
    ahead = UNSLOTH_BUFFER + 1 if s.engine == "unsloth" else 0
    return rows * (s.row_tokens + ahead) * cache_bytes_per_token(shape, s.itemsize)


def generated_prompts(shape: Shape, s: Settings, rows: int) -> int:
    """The prompts, repeated for every row, inside one MLP, with their keys and values: the residual, normed,
    and in 16 bit its fp32 copy for LoRA; silu(gate); for up the base's product, LoRA's and their sum; a mask
    of one byte per pair of tokens."""
    token = (5 if _narrow(s) else 3) * shape.hidden + 4 * shape.intermediate + 2 * shape.head_dim
    kept = cache_bytes_per_token(shape, s.itemsize)
    return rows * s.prompt_tokens * (token * s.itemsize + s.prompt_tokens + kept)


def joined_keys(shape: Shape, s: Settings, rows: int) -> int:
    """One layer at the last token: keys and values repeated for each query head, in Unsloth's masked
    attention in fp32 (more than a copy of the keys while a token is appended); and the fp32 logits of the
    previous step, plain and with all tokens but one masked."""
    wide = FP32 if s.engine == "unsloth" else s.itemsize
    return rows * (s.row_tokens * 2 * shape.queries * wide + shape.vocab * 2 * FP32)


def generated_draw(shape: Shape, s: Settings, rows: int) -> int:
    """A draw for all rows at once: the model's logits, their fp32 copy, two more of that size to mask all but
    the drawn token, and the previous step's masked logits; the probabilities are freed by then."""
    return rows * shape.vocab * (s.itemsize + 4 * FP32)


# --- M-step ---------------------------------------------------------------------------------------


def gradient(shape: Shape, s: Settings) -> int:
    """The adapter's gradient, fp32, from the first micro-batch to the update."""
    return adapter_params(shape, s) * FP32


def block_bytes_per_token(shape: Shape, s: Settings) -> int:
    """What one block keeps per packed token for the backward pass, without attention (see the top of this
    file). In 16 bit the norms' inputs are fp32."""
    norms = 2 * (shape.hidden + 1)  # inputs and scales
    products = 2 * shape.hidden + shape.queries + 4 * shape.intermediate + 7 * s.lora_r
    return FP32 * (norms + _kept_by_qk_norm(shape, s)) + s.itemsize * products


def _kept_by_qk_norm(shape: Shape, s: Settings) -> int:
    """Numbers per token that Qwen3's norms of queries and keys keep: inputs and scales. In fp32 the input is
    the product itself, values included."""
    if not shape.family.qk_norm:
        return 0
    values = 0 if _narrow(s) else shape.keys
    return shape.queries + shape.keys + values + shape.heads + shape.kv_heads


def kept_attention(shape: Shape, s: Settings) -> int:
    """What one block's attention keeps of a micro-batch: queries, output and log-sums as padded rows, keys
    and values as passed to it."""
    queries = s.padded_tokens * (2 * shape.queries * s.itemsize + FP32 * shape.heads)
    keys = s.keys_read * 2 * shape.keys * s.itemsize
    repeated = s.padded_prompts * 2 * (shape.queries - shape.keys) * s.itemsize if s.expands_keys else 0
    return queries + keys + repeated


def kept_block(shape: Shape, s: Settings) -> int:
    """What one block keeps of a micro-batch."""
    return s.fitted_tokens * block_bytes_per_token(shape, s) + kept_attention(shape, s)


def activations(shape: Shape, s: Settings) -> int:
    """What the whole network keeps: everything of each block, with checkpointing only its input."""
    if s.checkpointing:
        return s.fitted_tokens * shape.layers * shape.hidden * s.itemsize
    untrained = shape.hidden * FP32  # the first norm's input is the embedding, which needs no gradient
    return shape.layers * kept_block(shape, s) - s.fitted_tokens * untrained


def attention_mask(shape: Shape, s: Settings) -> int:
    """Once for all blocks: the mask of each completion token, for each query head of a key head, in aligned
    columns; and the rotary cosines and sines."""
    seen = _mask_rows(shape, s) * round_up(s.row_tokens - 1, ALIGN)
    return (seen + s.fitted_tokens * 2 * shape.head_dim) * s.itemsize


def mask_in_the_making(shape: Shape, s: Settings) -> int:
    """Two bool masks beside it while it is made, before there are activations."""
    return 2 * _mask_rows(shape, s) * (s.row_tokens - 1)


def _mask_rows(shape: Shape, s: Settings) -> int:
    return s.padded_completions * (shape.heads // shape.kv_heads)


def recomputed_block(shape: Shape, s: Settings) -> int:
    """With checkpointing, the block being recomputed; its fp32 input is kept already."""
    if not s.checkpointing:
        return 0
    kept = shape.hidden * FP32 if s.itemsize == FP32 else 0
    return kept_block(shape, s) - s.fitted_tokens * kept


def backward_block(shape: Shape, s: Settings) -> int:
    """Beside what is kept, the larger of two moments of the MLP. Going forward: the heads' vectors, before
    and after they are rotated, the residual and its update (more in Qwen3-0.6B, where A is twice and K is D).
    Going back: the gradients of silu(gate) and up, and the residual's."""
    forward = 2 * shape.queries + 3 * shape.keys + 2 * shape.hidden
    if shape.family.qk_norm and not _narrow(s):
        forward -= shape.queries + 2 * shape.keys  # kept: see ``_kept_by_qk_norm``
    return s.fitted_tokens * s.itemsize * max(forward, 2 * shape.intermediate + shape.hidden)


def head_chunk(shape: Shape, s: Settings) -> int:
    """The head: a chunk of logits in fp32 and, in 16 bit, as computed; the last norm's input in fp32, its
    output, and the output's gradient, computed chunk by chunk."""
    chunk = min(logit_rows(s.device, shape.vocab), s.scored_tokens)
    logits = FP32 + (s.itemsize if _narrow(s) else 0)
    hidden = s.scored_tokens * (FP32 + 2 * s.itemsize) + chunk * s.itemsize
    return chunk * shape.vocab * logits + hidden * shape.hidden


# --- phases ---------------------------------------------------------------------------------------


def stays(shape: Shape, s: Settings) -> dict[str, int]:
    """Terms common to all phases."""
    return {
        "linear weights": linear_weights(shape, s),
        "embedding, head, norms": embeddings(shape, s),
        "LoRA": adapter(shape, s),
        "Adam's moments": moments(shape, s),
    }


def phases(shape: Shape, s: Settings) -> Iterator[tuple[str, dict[str, int]]]:
    """(phase, its terms at its peak); phases do not overlap."""
    if s.engine == "native":
        prompts = max(min(s.decoded_rows // s.samples, s.problems), 1)
        yield "E-step", _decoding(shape, s, s.decoded_rows, prompts, s.samples)
        if s.evaluates:
            yield "evaluation", _decoding(shape, s, s.evaluated_rows, s.evaluated_rows, 1)
    else:
        yield "E-step", _generating(shape, s, min(s.batch_rows, s.problems * s.samples))
        if s.evaluates:
            yield "evaluation", _generating(shape, s, s.batch_rows)
    yield "M-step", _fitting(shape, s)


def _fitting(shape: Shape, s: Settings) -> dict[str, int]:
    """The largest of three moments: making the mask, the head's backward pass, and then the first block's."""
    gradients, mask = {"gradient": gradient(shape, s)}, {"mask and angles": attention_mask(shape, s)}
    kept = {"activations": activations(shape, s)}
    making = {"mask in the making": mask_in_the_making(shape, s)}
    head = {"head chunk": head_chunk(shape, s)}
    block = {
        "one block again": recomputed_block(shape, s),
        "one block backward": backward_block(shape, s),
        "one linear dequantized": unpacked_linear(shape, s),
    }
    return gradients | mask | _larger(making, kept | head, kept | block)


def _decoding(shape: Shape, s: Settings, rows: int, prompts: int, rows_of_each: int) -> dict[str, int]:
    """The largest of six moments: writing the merged copy; prefill; with all slots full a step's MLP, a
    layer's attention, a draw, compacting. Captured graphs hold cache and pool throughout, at the size of the
    largest decoder."""
    copy = {"merged copy": sampler_copy(shape, s)} if s.merged else {}
    cache = {"KV cache": kv_cache(shape, s, most_slots(s) if s.captures else rows)}
    writing = {"one linear merged": merged_linear(shape, s)} if s.merged else {}
    if s.captures:
        cache["graph pool"] = graph_pool(shape, s, most_slots(s))
        writing = cache | writing
    linear = {} if s.merged else {"one linear dequantized": unpacked_linear(shape, s)}
    passing = linear | {"prompts' pass": prompt_pass(shape, s, prompts, rows_of_each)}
    stepping = linear | {"decoding step": decoding_step(shape, s, rows)}
    full = {
        "attention": attention_on_cpu(shape, s, rows),
        "draw": drawing(shape, s, rows),
        "closing up": compacting(shape, s, rows),
    }
    moments = [passing, stepping, *({name: size} for name, size in full.items())]
    return copy | _larger(writing, *(cache | moment for moment in moments))


def _generating(shape: Shape, s: Settings, rows: int) -> dict[str, int]:
    """The largest of three moments: prefill; at full length a layer's attention, a draw."""
    linear = {"one linear dequantized": unpacked_linear(shape, s)}
    cache = {"KV cache": generated_cache(shape, s, rows)}
    passing = {"prompts' pass": generated_prompts(shape, s, rows)}
    attention = {"attention and last draw": joined_keys(shape, s, rows)}
    draw = {"draw": generated_draw(shape, s, rows)}
    return _larger(linear | passing, linear | cache | attention, cache | draw)


def _larger(*moments: dict[str, int]) -> dict[str, int]:
    return max(moments, key=lambda terms: sum(terms.values()))
