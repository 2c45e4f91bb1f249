"""Bytes, term by term: what each tensor that is alive at the peak takes.

Nothing here is fitted to a measurement. Each count says which tensors it counts; ``tests/test_plan.py`` holds
them against what autograd saves, what the allocator gives out and the weights of loaded models,
``benchmarks/plan_check.py`` against the resident memory of real steps. Sizes are for the longest rows that
the recipe lets through. Unsloth's own passes are not counted: they fit padded rows within the same budget of
tokens, and keep less of a token.

One block of the network, going forward in training, keeps for every token of the packed row (D hidden,
I intermediate, A = H d, K = G d)::

    residual before attention, normed    2 D    the norm's input, the LoRA input of q, k, v
    queries and output, by rows          2 A    attention's own, with one log-sum a head
    output, packed again                 A      the LoRA input of o
    residual before the MLP, normed      2 D
    gate, silu(gate), up, product        4 I
    LoRA's inner vectors                 7 r

and for every token that attention reads, a prompt's once for itself and once for each of its rows, the key
and the value, 2 K. Rows of one micro-batch count as equally long: what attention pads is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from empg_lite.plan.shape import Shape

#: Elements of one fp32 chunk of logits, drawn from or scored; ``policy/logprobs.py`` has the same numbers.
HEAD_CHUNK = {"cpu": 3 << 19, "cuda": 1 << 26}
#: The decoder never computes fewer rows, and closes up where this share of them has ended;
#: ``sampler/native.py`` has the same numbers.
MIN_ROWS = 8
IDLE = 1 / 8
FP32 = 4


@dataclass(frozen=True, slots=True)
class Settings:
    """What of a recipe costs memory.

    Attributes:
        itemsize: bytes of the computing type.
        four_bit: linears in NF4 with double quantisation, else in the computing type.
        lora_r: rank of the adapter.
        adam_8bit: Adam's moments in 8 bits.
        problems, samples: P and K of a step.
        prompt_tokens, new_tokens: longest prompt and completion.
        batch_rows: most rows decoded at once.
        merged: sampling uses a merged copy of the linears in the computing type.
        micro_batch_tokens: tokens of a micro-batch, each prompt once; a single longer row is one too.
        checkpointing: a block's activations are computed again going backward.
        evaluates: evaluation decodes one row a prompt, up to ``batch_rows`` of them.
        device: ``cpu`` or ``cuda``.
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

    @property
    def row_tokens(self) -> int:
        """Tokens of the longest row."""
        return self.prompt_tokens + self.new_tokens

    @property
    def decoded_rows(self) -> int:
        """Places of the E-step's decoder."""
        return max(min(self.batch_rows, self.problems * self.samples), MIN_ROWS)

    @property
    def evaluated_rows(self) -> int:
        """Places of the evaluation's decoder."""
        return max(self.batch_rows, MIN_ROWS)

    @property
    def budget(self) -> int:
        """Most tokens of a micro-batch, the last of each completion counted: it is scored, not computed."""
        return max(self.micro_batch_tokens, self.row_tokens)

    @property
    def fitted_tokens(self) -> int:
        """Tokens computed in the largest micro-batch."""
        return min(self.budget, self.problems * (self.prompt_tokens + self.samples * (self.new_tokens - 1)))

    @property
    def completed_tokens(self) -> int:
        """Those of completions, at most: their prompts may be short."""
        return min(self.fitted_tokens, self.problems * self.samples * (self.new_tokens - 1))

    @property
    def scored_tokens(self) -> int:
        """Tokens that the head scores, at most."""
        return min(self.budget, self.problems * self.samples * self.new_tokens)

    @property
    def keys_read(self) -> int:
        """Keys that attention is given, at most: a prompt's for itself, and once more for each of K rows."""
        whole_step = self.problems * (self.prompt_tokens + self.samples * (self.row_tokens - 1))
        return min(whole_step, (self.samples + 1) * self.fitted_tokens)


def _narrow(s: Settings) -> bool:
    """Whether the computing type has 16 bits: what needs more is written out in fp32."""
    return s.itemsize < FP32


# --- what stays -----------------------------------------------------------------------------------


def linear_weights(shape: Shape, s: Settings) -> int:
    """The linears. NF4: half a byte a weight; an 8-bit scale for 64 weights, a 32-bit one for 256 of those;
    and the two code tables (16 and 256 floats) and the mean of the scales, one a matrix."""
    if not s.four_bit:
        return shape.linear_params * s.itemsize
    total = 0
    for out, width in shape.linears:
        weights = out * width
        blocks = -(-weights // 64)
        total += -(-weights // 2) + blocks + FP32 * (-(-blocks // 256) + 16 + 256 + 1)
    return shape.layers * total


def embeddings(shape: Shape, s: Settings) -> int:
    """Embedding, head (once where they are tied), norms and biases, in the computing type."""
    return (shape.embedding_params + shape.small_params) * s.itemsize


def adapter_params(shape: Shape, s: Settings) -> int:
    """Number of LoRA weights: r (in + out) for each linear."""
    return shape.layers * s.lora_r * sum(out + width for out, width in shape.linears)


def adapter(shape: Shape, s: Settings) -> int:
    """LoRA in fp32, and in a 16-bit model the cast copies that autocast keeps during a phase."""
    return adapter_params(shape, s) * (FP32 + (s.itemsize if _narrow(s) else 0))


def moments(shape: Shape, s: Settings) -> int:
    """Adam's two moments from the first update on: fp32; or 8 bits with a fp32 scale for every 256, but for
    matrices below 4,096 elements, and two codes of 256 floats."""
    if not s.adam_8bit:
        return adapter_params(shape, s) * 2 * FP32
    sizes = [s.lora_r * side for linear in shape.linears for side in linear]
    packed = [n + FP32 * -(-n // 256) if n >= 4096 else n * FP32 for n in sizes]
    return 2 * (shape.layers * sum(packed) + 256 * FP32 * any(n >= 4096 for n in sizes))


# --- E-step ---------------------------------------------------------------------------------------


def sampler_copy(shape: Shape, s: Settings) -> int:
    """The merged linears and their biases: made once, written anew for every E-step."""
    biases = shape.layers * (shape.queries + 2 * shape.keys)
    return (shape.linear_params + biases) * s.itemsize if s.merged else 0


def merged_linear(shape: Shape, s: Settings) -> int:
    """Writing the merged copy, at the largest linear: base and adapter added up in fp32; the base in fp32 too
    where it has 16 bits, and dequantised where it is NF4."""
    weights = max(out * width for out, width in shape.linears)
    return weights * (FP32 * (2 if _narrow(s) else 1) + (s.itemsize if s.four_bit else 0))


def cache_bytes_per_token(shape: Shape, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.layers * shape.keys * itemsize


def kv_cache(shape: Shape, s: Settings, rows: int) -> int:
    """Keys and values of all places at full length, there from the first token on."""
    return rows * s.row_tokens * cache_bytes_per_token(shape, s.itemsize)


def prompt_pass(shape: Shape, s: Settings, rows: int, prompts: int) -> int:
    """The prompts' own forward pass, each prompt once, inside one MLP.

    The residual before attention, after it, and normed; queries, keys and values by rows; attention's output
    by rows and packed; silu(gate), and of up the base's product and that with LoRA's, or, over the merged
    copy, gate, up, silu(gate) and the product. For all layers the rotary angles, and (integers) where each
    key of each row comes from and goes.
    """
    lora = 3 * shape.intermediate + s.lora_r
    mlp = 4 * shape.intermediate if s.merged else lora
    token = 3 * shape.hidden + 3 * shape.queries + 2 * shape.keys + mlp + 2 * shape.head_dim
    places = rows * (17 + 8 * shape.kv_heads) + prompts * 16
    return s.prompt_tokens * (prompts * token * s.itemsize + places)


def attention_on_cpu(shape: Shape, s: Settings, rows: int) -> int:
    """One layer's attention at the last token: the scores, the mask as it came and as it is added, the
    token's own vectors; in fp32 the scores' softmax, in 16 bit the keys, copied for the product.

    On a GPU the kernel reads the keys where they lie and keeps no scores.
    """
    if s.device != "cpu":
        return 0
    beside = shape.keys * s.itemsize if _narrow(s) else shape.heads * FP32
    seen = shape.heads * s.itemsize + beside + s.itemsize + 1
    vectors = shape.hidden + 2 * shape.queries + 3 * shape.keys
    return rows * (s.row_tokens * seen + vectors * s.itemsize)


def drawing(shape: Shape, s: Settings, rows: int) -> int:
    """One draw, a chunk of rows at a time: logits, in 16 bit once more in fp32, and probabilities in fp32."""
    chunk = min(max(HEAD_CHUNK[s.device] // shape.vocab, 1), rows)
    return chunk * shape.vocab * (s.itemsize + FP32 * (2 if _narrow(s) else 1))


def closing_up(shape: Shape, s: Settings, rows: int) -> int:
    """One layer's keys of the rows that stay, once more while they move to the first places."""
    return int(rows * (1 - IDLE)) * s.row_tokens * shape.keys * s.itemsize


def held_by_sampler(shape: Shape, s: Settings) -> int:
    """What captured graphs address: the merged copy, and the cache of the most rows there are."""
    rows = max(s.decoded_rows, s.evaluated_rows if s.evaluates else 0)
    return sampler_copy(shape, s) + kv_cache(shape, s, rows)


def unpacked_linear(shape: Shape, s: Settings) -> int:
    """The largest linear, dequantised for its product: the weights, and their scales in fp32."""
    weights = max(out * width for out, width in shape.linears)
    return weights * s.itemsize + FP32 * (weights // 64) if s.four_bit else 0


# --- M-step ---------------------------------------------------------------------------------------


def gradient(shape: Shape, s: Settings) -> int:
    """Of the adapter, fp32, from the first micro-batch to the update."""
    return adapter_params(shape, s) * FP32


def block_bytes_per_token(shape: Shape, s: Settings) -> int:
    """What one block keeps of a packed token for going backward, keys and values apart (see the head of this
    file). In 16 bit the norms' inputs are fp32."""
    norms, log_sums = 2 * (shape.hidden + 1), shape.heads  # inputs and scales; attention's, one a head
    products = 2 * shape.hidden + 3 * shape.queries + 4 * shape.intermediate + 7 * s.lora_r
    return FP32 * (norms + log_sums) + s.itemsize * products


def kept_block(shape: Shape, s: Settings) -> int:
    """What one block keeps of a micro-batch."""
    keys_and_values = 2 * shape.keys * s.itemsize
    return s.fitted_tokens * block_bytes_per_token(shape, s) + s.keys_read * keys_and_values


def activations(shape: Shape, s: Settings) -> int:
    """What the whole network keeps: of every block all, with checkpointing its input."""
    if s.checkpointing:
        return s.fitted_tokens * shape.layers * shape.hidden * s.itemsize
    untrained = shape.hidden * FP32  # the first norm's input is the embedding: nothing goes back to it
    return shape.layers * kept_block(shape, s) - s.fitted_tokens * untrained


def attention_mask(shape: Shape, s: Settings) -> int:
    """Once for all blocks: what each completion token sees, for each query head of a key head; and the rotary
    angles' cosines and sines."""
    seen = s.completed_tokens * (shape.heads // shape.kv_heads) * (s.row_tokens - 1)
    return (seen + s.fitted_tokens * 2 * shape.head_dim) * s.itemsize


def recomputed_block(shape: Shape, s: Settings) -> int:
    """With checkpointing, the block that is being computed again; its fp32 input is kept already."""
    if not s.checkpointing:
        return 0
    kept = shape.hidden * FP32 if s.itemsize == FP32 else 0
    return kept_block(shape, s) - s.fitted_tokens * kept


def backward_block(shape: Shape, s: Settings) -> int:
    """Going back through the MLP: the gradients of silu(gate) and up, and the residual's. Where I is five
    times D, as in Qwen2.5, no moment has more."""
    return s.fitted_tokens * s.itemsize * (2 * shape.intermediate + shape.hidden)


def head_chunk(shape: Shape, s: Settings) -> int:
    """The head: a chunk of logits in fp32 and, in 16 bit, as they came; the last norm's input in fp32, its
    output, and that one's gradient, which comes chunk by chunk."""
    chunk = min(max(HEAD_CHUNK[s.device] // shape.vocab, 1), s.scored_tokens)
    logits = FP32 + (s.itemsize if _narrow(s) else 0)
    hidden = s.scored_tokens * (FP32 + 2 * s.itemsize) + chunk * s.itemsize
    return chunk * shape.vocab * logits + hidden * shape.hidden


# --- all of it ------------------------------------------------------------------------------------


def stays(shape: Shape, s: Settings) -> dict[str, int]:
    """Terms that all phases have."""
    return {
        "linear weights": linear_weights(shape, s),
        "embedding, head, norms": embeddings(shape, s),
        "LoRA": adapter(shape, s),
        "Adam's moments": moments(shape, s),
    }


def phases(shape: Shape, s: Settings) -> Iterator[tuple[str, dict[str, int]]]:
    """(phase, its terms at its peak); the phases follow each other, none overlaps."""
    prompts = min(s.decoded_rows // s.samples, s.problems)
    yield "E-step", _decoding(shape, s, s.decoded_rows, prompts)
    if s.evaluates:
        yield "evaluation", _decoding(shape, s, s.evaluated_rows, s.evaluated_rows)
    yield "M-step", _fitting(shape, s)


def _fitting(shape: Shape, s: Settings) -> dict[str, int]:
    """The larger of two moments: the head going backward, or the first block after it."""
    kept = {
        "gradient": gradient(shape, s),
        "activations": activations(shape, s),
        "mask and angles": attention_mask(shape, s),
    }
    head = {"head chunk": head_chunk(shape, s)}
    block = {
        "one block again": recomputed_block(shape, s),
        "one block backward": backward_block(shape, s),
        "one linear dequantised": unpacked_linear(shape, s),
    }
    return kept | _larger(head, block)


def _decoding(shape: Shape, s: Settings, rows: int, prompts: int) -> dict[str, int]:
    """The largest of five moments: the merged copy written; the prompts' pass; with all places full a layer's
    attention, a draw, places closed up."""
    copy = {"merged copy": sampler_copy(shape, s)} if s.merged else {}
    writing = {"one linear merged": merged_linear(shape, s)} if s.merged else {}
    cache = {"KV cache": kv_cache(shape, s, rows)}
    passing = {"prompts' pass": prompt_pass(shape, s, rows, prompts)}
    if not s.merged:
        passing["one linear dequantised"] = unpacked_linear(shape, s)
    full = {
        "attention": attention_on_cpu(shape, s, rows),
        "draw": drawing(shape, s, rows),
        "closing up": closing_up(shape, s, rows),
    }
    return copy | _larger(writing, cache | passing, *(cache | {name: size} for name, size in full.items()))


def _larger(*moments: dict[str, int]) -> dict[str, int]:
    return max(moments, key=lambda terms: sum(terms.values()))
