"""Bytes, term by term: what each tensor that is alive at the peak takes.

Nothing here is fitted to a measurement. Each count says which tensors it counts.
``tests/policy/test_plan_terms.py`` checks them against what autograd saves, what the allocator hands out and the weights of loaded models,
``benchmarks/plan_check.py`` against the resident memory of real steps. Sizes are for the longest rows that
the recipe lets through. Unsloth's own M-step (prompts shared, flex attention, checkpoints offloaded to the
host) keeps less of a token and pads nothing: where it is used, these counts are an upper bound.

One block of the network, going forward in training, keeps for every token of the packed row (D hidden,
I intermediate, A = H d, K = G d)::

    residual before attention, normed    2 D    the norm's input, the LoRA input of q, k, v
    attention's output, packed again     A      the LoRA input of o
    residual before the MLP, normed      2 D
    gate, silu(gate), up, product        4 I
    LoRA's inner vectors                 7 r

and of attention, where rows are padded to the longest of their micro-batch::

    queries and output                   2 A    for each place, with one log-sum a head
    keys and values                      2 K    for each place, and a prompt's once more for each of its rows

"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from empg_lite.core.sizes import (
    CACHE_ALIGN,
    IDLE,
    LOGIT_CHUNK,
    MIN_ROWS,
    PREFILL_TOKENS,
    round_up,
)
from empg_lite.policy.memory.shape import Shape

FP32 = 4
#: Places of attention for each token of a micro-batch. Within a problem the longest of 8 rationales is twice
#: the mean (lognormal lengths, sigma 0.5), and ``packed_batches`` puts problems of like length together. No
#: bound: a micro-batch of very short rows and one very long one pads more, and where memory runs out it is
#: halved.
PADDED = 2.5
#: cuBLAS's workspace beside captured graphs: 32 MiB on sm90, 8 before.
GRAPH_WORKSPACE = 32 << 20
#: Tokens by which Unsloth's own decoding grows its key/value buffers.
UNSLOTH_BUFFER = 512


@dataclass(frozen=True, slots=True)
class Settings:
    """What of a recipe costs memory.

    Attributes:
        itemsize: bytes of the compute type.
        four_bit: linears in NF4 with double quantization, else in the compute type.
        lora_r: rank of the adapter.
        adam_8bit: Adam's moments in 8 bits.
        problems, samples: P and K of a step.
        prompt_tokens, new_tokens: longest prompt and completion.
        batch_rows: most rows decoded at once.
        merged: sampling uses a merged copy of the linears in the compute type.
        micro_batch_tokens: tokens of a micro-batch, each prompt once; a single longer row is one too.
        checkpointing: a block's activations are computed again in the backward pass.
        evaluates: evaluation decodes one row per prompt, up to ``batch_rows`` of them.
        device: ``cpu`` or ``cuda``.
        engine: ``native``; or ``generate``, ``unsloth``: the backend's own ``generate``.
        expands_keys: attention over prompts writes keys out for all query heads that share one (below sm80).
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
        """Places of the E-step's decoder."""
        return max(min(self.batch_rows, self.problems * self.samples), MIN_ROWS)

    @property
    def evaluated_rows(self) -> int:
        """Places of the evaluation's decoder."""
        return max(self.batch_rows, MIN_ROWS)

    @property
    def room(self) -> int:
        """Tokens of a row in the key/value cache."""
        return round_up(self.row_tokens, CACHE_ALIGN) if self.captures else self.row_tokens

    @property
    def step_tokens(self) -> int:
        """Tokens computed for a whole step at its longest: a completion's last one predicts nothing."""
        return self.problems * (self.prompt_tokens + self.samples * (self.new_tokens - 1))

    @property
    def fitted_tokens(self) -> int:
        """Tokens computed in the largest micro-batch: a budget's worth, or a single row that is longer."""
        return min(max(self.micro_batch_tokens, self.row_tokens), self.step_tokens)

    @property
    def padded_tokens(self) -> int:
        """The same with attention's padding, which a single row and rows of equal length do without."""
        return min(max(int(PADDED * self.micro_batch_tokens), self.row_tokens), self.step_tokens)

    @property
    def padded_prompts(self) -> int:
        """Those of prompts: with completions behind them, at most all tokens without padding."""
        return min(self.fitted_tokens, self.problems * self.prompt_tokens)

    @property
    def padded_completions(self) -> int:
        """Those of completions, at most: their prompts may be short."""
        return min(self.padded_tokens, self.problems * self.samples * (self.new_tokens - 1))

    @property
    def scored_tokens(self) -> int:
        """Tokens that the head scores, at most."""
        budget = max(self.micro_batch_tokens, self.row_tokens)
        return min(budget, self.problems * self.samples * self.new_tokens)

    @property
    def keys_read(self) -> int:
        """Keys that attention reads, at most: one for each place, and a prompt's again for each of K rows."""
        whole_step = self.problems * (self.prompt_tokens + self.samples * (self.row_tokens - 1))
        return min(whole_step, self.samples * self.fitted_tokens + self.padded_tokens)


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
    where it has 16 bits, and dequantized where it is NF4."""
    weights = max(out * width for out, width in shape.linears)
    return weights * (FP32 * (2 if _narrow(s) else 1) + (s.itemsize if s.four_bit else 0))


def cache_bytes_per_token(shape: Shape, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.layers * shape.keys * itemsize


def kv_cache(shape: Shape, s: Settings, rows: int) -> int:
    """Keys and values of all places at full length, there from the first token on; and each row's last hidden
    state, which the draw reads."""
    return rows * (s.room * cache_bytes_per_token(shape, s.itemsize) + shape.hidden * s.itemsize)


def prompt_pass(shape: Shape, s: Settings, prompts: int, rows_of_each: int) -> int:
    """One piece of the prompts on its way through the network, in the larger of two moments.

    In the MLP, with queries, keys, values and attention's output by rows beside it. Where keys are copied for
    each row that continues the prompt, or written out for each query head (below sm80): seldom more, and
    never of Qwen2.5. For all layers the rotary angles, and (integers) where each key of each row comes from
    and goes.
    """
    tokens = max(min(PREFILL_TOKENS[s.device], prompts * s.prompt_tokens), s.prompt_tokens)
    copied = 3 * shape.hidden + 2 * shape.queries + (3 + rows_of_each) * shape.keys
    by_rows = 2 * shape.queries + 2 * shape.keys
    token = max(_through_mlp(shape) + by_rows, copied) + 2 * shape.head_dim
    places = rows_of_each * (17 + 8 * shape.kv_heads) + 16
    return tokens * (token * s.itemsize + places)


def _through_mlp(shape: Shape) -> int:
    """Elements of a token in the MLP of a pass without gradients: the residual, its two addends and both
    normed; attention's output; gate, up, silu(gate) and the product."""
    return 5 * shape.hidden + shape.queries + 4 * shape.intermediate


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


def decoding_step(shape: Shape, s: Settings, rows: int) -> int:
    """One token of each row in the MLP, and what its attention may see, as it was and as it is added."""
    token = _through_mlp(shape) + 2 * shape.head_dim
    return rows * (token * s.itemsize + s.room * (s.itemsize + 1))


def drawing(shape: Shape, s: Settings, rows: int) -> int:
    """One draw, a chunk of rows at a time: logits, in 16 bit once more in fp32, and probabilities in fp32."""
    chunk = min(max(LOGIT_CHUNK[s.device] // shape.vocab, 1), rows)
    return chunk * shape.vocab * (s.itemsize + FP32 * (2 if _narrow(s) else 1))


def closing_up(shape: Shape, s: Settings, rows: int) -> int:
    """One layer's keys of the rows that stay, once more while they move to the first places."""
    return int(rows * (1 - IDLE)) * s.room * shape.keys * s.itemsize


def graph_pool(shape: Shape, s: Settings, rows: int) -> int:
    """The private pool that all captured graphs share: a draw, a decoding step of all rows (without a merged
    copy a linear dequantized for it), and cuBLAS's workspace.

    Graphs run one after another, and smaller ones fit into the blocks of the largest. Draw and step are added
    up: their blocks differ too much in size to serve both.
    """
    if not s.captures:
        return 0
    linear = 0 if s.merged else unpacked_linear(shape, s)
    return drawing(shape, s, rows) + decoding_step(shape, s, rows) + linear + GRAPH_WORKSPACE


def most_places(s: Settings) -> int:
    """Rows of the largest decoder: captured graphs hold it, and the smaller steps use it too."""
    return max(s.decoded_rows, s.evaluated_rows if s.evaluates else 0)


def held_by_sampler(shape: Shape, s: Settings) -> int:
    """What the sampler keeps between E-steps, on a GPU: the merged copy if there is one, the cache, and the
    graphs' pool."""
    if not s.captures:
        return 0
    rows = most_places(s)
    return sampler_copy(shape, s) + kv_cache(shape, s, rows) + graph_pool(shape, s, rows)


def unpacked_linear(shape: Shape, s: Settings) -> int:
    """The largest linear, dequantized for its product: the weights, and their scales in fp32."""
    weights = max(out * width for out, width in shape.linears)
    return weights * s.itemsize + FP32 * (weights // 64) if s.four_bit else 0


# --- E-step by the backend's own generate -----------------------------------------------------------


def generated_cache(shape: Shape, s: Settings, rows: int) -> int:
    """Keys and values of all rows at full length, left-padded; Unsloth's buffers grow ahead of them."""
    ahead = UNSLOTH_BUFFER + 1 if s.engine == "unsloth" else 0
    return rows * (s.row_tokens + ahead) * cache_bytes_per_token(shape, s.itemsize)


def generated_prompts(shape: Shape, s: Settings, rows: int) -> int:
    """The prompts, repeated for every row, inside one MLP, with their own keys and values: the residual,
    normed, and in 16 bit that in fp32, which LoRA reads; silu(gate), and of up the base's product, LoRA's and
    their sum; a mask of one byte for each pair of tokens."""
    token = (5 if _narrow(s) else 3) * shape.hidden + 4 * shape.intermediate + 2 * shape.head_dim
    kept = cache_bytes_per_token(shape, s.itemsize)
    return rows * s.prompt_tokens * (token * s.itemsize + s.prompt_tokens + kept)


def joined_keys(shape: Shape, s: Settings, rows: int) -> int:
    """One layer at the last token: keys and values written out for each query head, by Unsloth's masked
    attention in fp32 (more than the keys once more, while a token is appended); and the logits of the step
    before, in fp32 as they came and with all tokens but one masked."""
    wide = FP32 if s.engine == "unsloth" else s.itemsize
    return rows * (s.row_tokens * 2 * shape.queries * wide + shape.vocab * 2 * FP32)


def generated_draw(shape: Shape, s: Settings, rows: int) -> int:
    """A draw for all rows at once: the model's logits, their copy in fp32, two more of that size to let only
    the drawn token through, and what the step before let through; the probabilities are gone by then."""
    return rows * shape.vocab * (s.itemsize + 4 * FP32)


# --- M-step ---------------------------------------------------------------------------------------


def gradient(shape: Shape, s: Settings) -> int:
    """Of the adapter, fp32, from the first micro-batch to the update."""
    return adapter_params(shape, s) * FP32


def block_bytes_per_token(shape: Shape, s: Settings) -> int:
    """What one block keeps of a packed token for the backward pass, attention apart (see the head of this
    file). In 16 bit the norms' inputs are fp32."""
    norms = 2 * (shape.hidden + 1)  # inputs and scales
    products = 2 * shape.hidden + shape.queries + 4 * shape.intermediate + 7 * s.lora_r
    return FP32 * norms + s.itemsize * products


def kept_attention(shape: Shape, s: Settings) -> int:
    """What one block's attention keeps of a micro-batch: queries, output and log-sums by padded rows, keys
    and values as they were given to it."""
    queries = s.padded_tokens * (2 * shape.queries * s.itemsize + FP32 * shape.heads)
    keys = s.keys_read * 2 * shape.keys * s.itemsize
    written_out = s.padded_prompts * 2 * (shape.queries - shape.keys) * s.itemsize if s.expands_keys else 0
    return queries + keys + written_out


def kept_block(shape: Shape, s: Settings) -> int:
    """What one block keeps of a micro-batch."""
    return s.fitted_tokens * block_bytes_per_token(shape, s) + kept_attention(shape, s)


def activations(shape: Shape, s: Settings) -> int:
    """What the whole network keeps: of every block all, with checkpointing its input."""
    if s.checkpointing:
        return s.fitted_tokens * shape.layers * shape.hidden * s.itemsize
    untrained = shape.hidden * FP32  # the first norm's input is the embedding: nothing goes back to it
    return shape.layers * kept_block(shape, s) - s.fitted_tokens * untrained


def attention_mask(shape: Shape, s: Settings) -> int:
    """Once for all blocks: what each completion token sees, for each query head of a key head, in a multiple
    of 8 columns; and the rotary angles' cosines and sines."""
    seen = _mask_rows(shape, s) * round_up(s.row_tokens - 1, 8)
    return (seen + s.fitted_tokens * 2 * shape.head_dim) * s.itemsize


def mask_in_the_making(shape: Shape, s: Settings) -> int:
    """Two masks of one byte beside it, what is seen and what is not, before there are activations."""
    return 2 * _mask_rows(shape, s) * (s.row_tokens - 1)


def _mask_rows(shape: Shape, s: Settings) -> int:
    return s.padded_completions * (shape.heads // shape.kv_heads)


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
    chunk = min(max(LOGIT_CHUNK[s.device] // shape.vocab, 1), s.scored_tokens)
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
    """The largest of three moments: making the mask, the head's backward pass, and the first block's after
    it."""
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
    """The largest of six moments: the merged copy written; the prompts' pass; with all places full a step's
    MLP, a layer's attention, a draw, places closed up. Captured graphs hold cache and pool through all of
    them, at the size of the largest decoder."""
    copy = {"merged copy": sampler_copy(shape, s)} if s.merged else {}
    cache = {"KV cache": kv_cache(shape, s, most_places(s) if s.captures else rows)}
    writing = {"one linear merged": merged_linear(shape, s)} if s.merged else {}
    if s.captures:
        cache["graph pool"] = graph_pool(shape, s, most_places(s))
        writing = cache | writing
    linear = {} if s.merged else {"one linear dequantized": unpacked_linear(shape, s)}
    passing = linear | {"prompts' pass": prompt_pass(shape, s, prompts, rows_of_each)}
    stepping = linear | {"decoding step": decoding_step(shape, s, rows)}
    full = {
        "attention": attention_on_cpu(shape, s, rows),
        "draw": drawing(shape, s, rows),
        "closing up": closing_up(shape, s, rows),
    }
    moments = [passing, stepping, *({name: size} for name, size in full.items())]
    return copy | _larger(writing, *(cache | moment for moment in moments))


def _generating(shape: Shape, s: Settings, rows: int) -> dict[str, int]:
    """The largest of three moments: the prompts' pass; at full length a layer's attention, a draw."""
    linear = {"one linear dequantized": unpacked_linear(shape, s)}
    cache = {"KV cache": generated_cache(shape, s, rows)}
    passing = {"prompts' pass": generated_prompts(shape, s, rows)}
    attention = {"attention and last draw": joined_keys(shape, s, rows)}
    draw = {"draw": generated_draw(shape, s, rows)}
    return _larger(linear | passing, linear | cache | attention, cache | draw)


def _larger(*moments: dict[str, int]) -> dict[str, int]:
    return max(moments, key=lambda terms: sum(terms.values()))
