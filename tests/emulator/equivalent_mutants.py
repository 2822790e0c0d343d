"""The mutants of mutants.py that no test can kill, because they compute the same."""

from __future__ import annotations

FORWARD, BACKWARD = "csrc/attention/attention_forward.cu", "csrc/attention/attention_backward.cu"
TILE, SOFTMAX = "csrc/attention/attention_tile.cuh", "csrc/attention/attention_softmax.cuh"
TANGENT = "csrc/attention/attention_tangent.cu"
CONV, CONV_WEIGHT = "csrc/conv/conv_forward.cu", "csrc/conv/conv_backward_weight.cu"
ACTIVATION = "csrc/conv/conv_activation.cuh"
TABLE = "csrc/optim/tensor_table.cuh"
WARP = "csrc/common/warp.cuh"

TOO_LARGE = "tells 2^31 - 1 blocks from 2^31, which no machine that tests has the memory for"
EQUAL_MAXIMA = "of two equal maxima either will do"
READ_IN_ANOTHER_ORDER = (
    "of the two instances of the kernel, which read in different orders and give the same sums, it "
    "takes the other for tensors of one channel"
)

# (file, fault, line) to the reason.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        FORWARD,
        "> to >=",
        'if (blocks > INT32_MAX) return "the problem needs 2^31 blocks or more";',
    ): TOO_LARGE,
    (
        FORWARD,
        ">= to >",
        "__global__ void __launch_bounds__("
        "kAttentionThreads, sizeof(T) >= (kPaged ? 4 : 8) ? 1 : 0)",
    ): "how many registers a thread may have, which build_support.kernel_report watches",
    (
        BACKWARD,
        "> to >=",
        'if (blocks > INT32_MAX) return "the problem needs 2^31 blocks or more";',
    ): TOO_LARGE,
    (
        SOFTMAX,
        "> to >=",
        "new_max = old_max > new_max ? old_max : new_max;",
    ): EQUAL_MAXIMA,
    (
        WARP,
        "> to >=",
        "return (other > value || other != other) ? other : value;",
    ): EQUAL_MAXIMA,
    (
        FORWARD,
        "< to <=",
        "row < sequence.seqlen_q && column < sequence.seqlen_k",
    ): "the row behind the last is computed from zeros and never stored",
    (
        TANGENT,
        "< to <=",
        "if (row < sequence.seqlen_q && column < sequence.seqlen_k) {",
    ): "the row behind the last is never stored",
    (
        SOFTMAX,
        "< to <=",
        "if (p.maybe_rng != nullptr && row < sequence.seqlen_q && column < sequence.seqlen_k) {",
    ): "the row behind the last is never stored",
    (
        FORWARD,
        "< to <=",
        "for (int32_t key_row = keys.begin; key_row < keys.end; key_row += kOther) {",
    ): "one tile more, of keys that are all hidden: they weigh 0",
    (
        TILE,
        ">= to >",
        "aligned && inside >= kSize ? load_pack(source) : load_pack_partly(source, inside);",
    ): "a whole pack is read element by element: slower, the same",
    (
        TABLE,
        "< to <=",
        "return {tensor, begin, begin + (rest < kOptimChunk ? rest : kOptimChunk)};",
    ): "equal values, either is chosen",
    (
        "csrc/optim/update.cuh",
        "> to >=",
        "if constexpr (kLast > 1)",
    ): "tells rules of two states from others: SGD has one, Adam three",
    (
        ACTIVATION,
        "< to <=",
        "return x < A(0) ? A(0) : x;  // NaN stays",
    ): "of -0 it makes +0, which compares equal and has the same gradient",
    (
        CONV,
        "> to >=",
        "const bool channels_last = c.dest_stride.channel == 1 && int64_t{c.groups} * c.rows > 1;",
    ): READ_IN_ANOTHER_ORDER,
    (
        CONV_WEIGHT,
        "* to +",
        "grad_last && (c.source_stride.channel == 1 || c.groups * c.depth == 1);",
    ): READ_IN_ANOTHER_ORDER,
    (
        "csrc/attention/attention_mma_forward.cuh",
        "+ to -",
        "if (tile + Tile::kStages - 1 < num_tiles) begin_copies(tile + Tile::kStages - 1);",
    ): "tiles behind the last are copied too, zeros beyond the keys, and nobody reads them",
    (
        "csrc/attention/attention_mma_tile.cuh",
        ">= to >",
        "return nearest >= band.low && furthest <= band.high ? Sight::kAll : Sight::kSome;",
    ): "of a tile that is seen whole every key is asked for: slower, the same",
    (
        "csrc/conv/conv_mma_backward_weight.cuh",
        "index off by one",
        "} stages[kStages];",
    ): "room for a stage more, which nobody uses",
    (
        "csrc/optim/device_table.cu",
        "> to >=",
        "return one_place && "
        "c.num_tensors > make_table(c, c.tensors, c.num_tensors, place).capacity;",
    ): "as many tensors as fit the arguments take one launch either way",
}
