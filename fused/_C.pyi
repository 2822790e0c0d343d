"""The compiled kernels. Written by `python -m build_support.stub`."""

from collections.abc import Sequence

from torch import Tensor, dtype

class KeptGroups:
    def __init__(self) -> None: ...
    @property
    def num_gatherings(self) -> int: ...

class StepPlan:
    def __init__(self) -> None: ...
    def make(self) -> None: ...

def adam_group(
    kept: KeptGroups,
    params: object,
    state: dict,
    lr: object,
    beta1: object,
    beta2: object,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    decoupled_weight_decay: bool,
    maximize: bool,
    capturable: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Tensor | None,
    max_norm: float | None,
    skip_nonfinite: bool,
    zero_grad: bool,
    ema_decay: float | None,
    rng: Tensor | None,
    master: str | None,
    check_only: bool,
    plan: StepPlan | None,
) -> str | None: ...
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    row_stats: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    rng: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    softcap: float,
    window_left: int,
    window_right: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    rng: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    softcap: float,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor, Tensor]: ...
def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    rng: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    softcap: float,
    window_left: int,
    window_right: int,
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    attn_mask_tangent: Tensor | None,
    alibi_slopes_tangent: Tensor | None,
    sink_tangent: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    block_table: Tensor | None,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor]: ...
def autocast_cast(arg0: Tensor, arg1: dtype) -> Tensor: ...
def clip_by_norm_(tensors: Sequence[Tensor], norm: Tensor, max_norm: float) -> None: ...
def conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    want_input: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]: ...
def conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    save_pre: bool,
) -> tuple[Tensor, Tensor]: ...
def gradient_norm(groups: list, grad_scale: Tensor | None) -> Tensor: ...
def isa() -> str: ...
def kept_gradient_norm(
    kept: KeptGroups,
    groups: list,
    grad_scale: Tensor | None,
) -> Tensor | None: ...
def lstm_cell_backward(
    grad_h_next: Tensor | None,
    grad_c_next: Tensor | None,
    input: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    gates: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def lstm_cell_forward(
    input: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]: ...
def lstm_layer_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    hidden: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def lstm_layer_forward(
    input: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]: ...
def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]: ...
def sgd_group(
    kept: KeptGroups,
    params: object,
    state: dict,
    lr: object,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    first_step: bool,
    maximize: bool,
    capturable: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Tensor | None,
    max_norm: float | None,
    skip_nonfinite: bool,
    zero_grad: bool,
    ema_decay: float | None,
    rng: Tensor | None,
    master: str | None,
    check_only: bool,
    plan: StepPlan | None,
) -> str | None: ...
def total_norm(tensors: Sequence[Tensor], grad_scale: Tensor | None = None) -> Tensor: ...
