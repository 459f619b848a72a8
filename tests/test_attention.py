"""Attention: the torch operator, and image encoders that take it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import birkhoff
from birkhoff.attention import attention
from birkhoff.nn import fuse_attention
from birkhoff.nn.attention import FusedAttention, FusedBlock

pytestmark = pytest.mark.filterwarnings("ignore")


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def decomposed_bias(q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """The bias of q of shape (batch, H, W, heads, d), as (batch, heads, H * W, H * W)."""
    _, height, width, _, _ = q.shape
    rows, cols = torch.arange(height), torch.arange(width)
    table_h = rel_pos_h[rows[:, None] - rows[None, :] + height - 1]
    table_w = rel_pos_w[cols[:, None] - cols[None, :] + width - 1]
    bias_h = torch.einsum("bhwnc,hkc->bnhwk", q, table_h)[..., :, None]
    bias_w = torch.einsum("bhwnc,wkc->bnhwk", q, table_w)[..., None, :]
    return (bias_h + bias_w).flatten(-2).flatten(2, 3)


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, *tables: Tensor) -> Tensor:
    """Attention over the whole grid in float64."""
    q, k, v = q.double(), k.double(), v.double()
    tokens = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
    scores = scale * tokens[0] @ tokens[1].mT
    if tables:
        scores = scores + decomposed_bias(q, *(table.double() for table in tables))
    output = scores.softmax(-1) @ tokens[2]
    return output.transpose(1, 2).reshape(q.shape)


def in_windows(x: Tensor, window: int, padding: Tensor) -> Tensor:
    """The grid, padded and cut into windows: (windows, window, window, heads, d)."""
    batch, height, width, heads, d = x.shape
    rows, cols = -(-height // window), -(-width // window)
    padded = padding.expand(batch, rows * window, cols * window, heads, d).clone()
    padded[:, :height, :width] = x
    cut = padded.view(batch, rows, window, cols, window, heads, d).transpose(2, 3)
    return cut.reshape(-1, window, window, heads, d)


def of_windows(x: Tensor, batch: int, height: int, width: int) -> Tensor:
    """The grid of the windows, without padding."""
    _, window, _, heads, d = x.shape
    rows, cols = -(-height // window), -(-width // window)
    grid = x.view(batch, rows, cols, window, window, heads, d).transpose(2, 3)
    return grid.reshape(batch, rows * window, cols * window, heads, d)[:, :height, :width]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 2),
    height=st.integers(1, 9),
    width=st.integers(1, 20),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 5, 16, 40, 64, 80]),
    window=st.integers(0, 6),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_operator_computes_attention(
    batch: int,
    height: int,
    width: int,
    heads: int,
    head_dim: int,
    window: int,
    biased: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    qkv = torch.randn(batch, height, width, 3, heads, head_dim).to(dtype)
    q, k, v = qkv.unbind(3)
    scale = float(head_dim**-0.5)
    tables: list[Tensor] = []
    if biased:
        tables = [0.3 * torch.randn(2 * (window or n) - 1, head_dim) for n in (height, width)]
    padding = torch.randn(2, heads, head_dim) if window else None
    none = (None, None)
    y = attention(
        q, k, v, scale, *(tables or none), window, *(none if padding is None else padding)
    )
    assert y.shape == q.shape
    assert y.dtype == dtype
    assert y.is_contiguous()
    if not batch:
        return
    if window:
        assert padding is not None
        q_windows = in_windows(q, window, torch.zeros(heads, head_dim, dtype=dtype))
        k_windows = in_windows(k.float(), window, padding[0])
        v_windows = in_windows(v.float(), window, padding[1])
        output = reference(q_windows, k_windows, v_windows, scale, *tables)
        expected = of_windows(output, batch, height, width)
    else:
        expected = reference(q, k, v, scale, *tables)
    rounding = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    assert relative_error(y, expected) < rounding[dtype]


def test_windows_are_padded_with_zeros_where_nothing_is_said() -> None:
    q, k, v = torch.randn(3, 1, 5, 6, 2, 8).unbind()
    zeros = torch.zeros(2, 8)
    y = attention(q, k, v, 0.3, None, None, 4)
    assert torch.equal(y, attention(q, k, v, 0.3, None, None, 4, zeros, zeros))


@pytest.mark.parametrize("window", [0, 4])
def test_opcheck(window: int) -> None:
    q, k, v = torch.randn(2, 6, 8, 3, 2, 16).unbind(3)
    height, width = (window, window) if window else (6, 8)
    tables = (torch.randn(2 * height - 1, 16), torch.randn(2 * width - 1, 16))
    padding = (torch.randn(2, 16), torch.randn(2, 16)) if window else (None, None)
    arguments = (q, k, v, 0.25, *tables, window, *padding)
    torch.library.opcheck(torch.ops.birkhoff.attention.default, arguments)


def operands(**changes: Any) -> dict[str, Any]:
    q, k, v = torch.randn(1, 6, 8, 3, 2, 16).unbind(3)
    return {"q": q, "k": k, "v": v, "scale": 0.25} | changes


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q": torch.zeros(1, 6, 8, 2, 16).double()}, TypeError, "float64"),
        ({"k": torch.zeros(1, 6, 8, 2, 16).half()}, TypeError, "the same dtype"),
        ({"q": torch.zeros(6, 8, 2, 16)}, ValueError, "q of shape"),
        ({"k": torch.zeros(1, 6, 7, 2, 16)}, ValueError, "k of shape"),
        ({"q": torch.zeros(1, 6, 8, 2, 12)}, ValueError, "head_dim"),
        ({"q": torch.zeros(1, 6, 7, 2, 16), "window": 2}, ValueError, "the same shape"),
        ({"rel_pos_h": torch.zeros(11, 16)}, ValueError, "belong together"),
        (
            {"rel_pos_h": torch.zeros(11, 16), "rel_pos_w": torch.zeros(13, 16)},
            ValueError,
            "rel_pos_w",
        ),
        ({"window": -1}, ValueError, "window"),
        ({"padding_k": torch.zeros(2, 16)}, ValueError, "for windows"),
        ({"padding_k": torch.zeros(3, 16), "window": 3}, ValueError, "padding_k"),
        (
            {"k": torch.zeros(1, 0, 8, 2, 16), "v": torch.zeros(1, 0, 8, 2, 16)},
            ValueError,
            "no keys",
        ),
    ],
)
def test_operands_that_do_not_fit(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        attention(**operands(**changes))


def test_there_is_no_gradient() -> None:
    arguments = operands(q=torch.zeros(1, 6, 8, 2, 16, requires_grad=True))
    with pytest.raises(RuntimeError, match="no gradient"):
        attention(**arguments)
    with torch.no_grad():
        attention(**arguments)


def from_transformers(family: str) -> Callable[[], nn.Module]:
    def build(**options: Any) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{family}VisionConfig")(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=160,
            patch_size=16,
            window_size=4,
            global_attn_indexes=[1],
            output_channels=16,
            mlp_dim=96,
            **options,
        )
        model: nn.Module = getattr(transformers, f"{family}VisionModel")(config)
        return model

    return build


def from_package(package: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        image_encoder = pytest.importorskip(f"{package}.modeling.image_encoder")
        model: nn.Module = image_encoder.ImageEncoderViT(
            img_size=160,
            patch_size=16,
            embed_dim=64,
            depth=3,
            num_heads=4,
            out_chans=16,
            use_rel_pos=True,
            window_size=4,
            global_attn_indexes=(1,),
        )
        return model

    return build


ENCODERS = {
    "transformers-sam": from_transformers("Sam"),
    "transformers-sam-hq": from_transformers("SamHQ"),
    "segment-anything": from_package("segment_anything"),
    "segment-anything-hq": from_package("segment_anything_hq"),
}


def drawn(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A model without gradients and with every parameter drawn at random."""
    torch.manual_seed(0)
    model = build(**options).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.5 if "rel_pos" in name else 0.1)
    return model


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> nn.Module:
    return drawn(ENCODERS[request.param])


def encode(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    # Those of segment_anything_hq give the features of layers too, those of transformers more.
    return output if isinstance(output, Tensor) else output[0]


def fused_modules(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if isinstance(m, FusedAttention | FusedBlock)]


X = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def test_encoders_compute_what_they_did(encoder: nn.Module) -> None:
    expected = encode(encoder, X)
    names = list(encoder.state_dict())
    assert fuse_attention(encoder) is encoder
    assert len(fused_modules(encoder)) == 6
    assert list(encoder.state_dict()) == names
    assert relative_error(encode(encoder, X), expected) < 1e-5


def test_fusing_twice_is_fusing_once(encoder: nn.Module) -> None:
    classes = [type(module) for module in fuse_attention(encoder).modules()]
    assert [type(module) for module in fuse_attention(encoder).modules()] == classes


def test_attention_modules_alone_are_fused_too(encoder: nn.Module) -> None:
    fuse_attention(encoder)
    attentions = [m for m in encoder.modules() if isinstance(m, FusedAttention)]
    for module in attentions:
        original: Any = type(module).__bases__[1]
        for shape in ((3, 4, 4, 64), (1, 10, 10, 64)):
            x = torch.randn(shape)
            y, expected = module(x), original.forward(module, x)
            if isinstance(y, tuple):
                assert y[1] is None
                y, expected = y[0], expected[0]
            if module.rel_pos_h.shape[0] == 2 * shape[1] - 1:
                assert relative_error(y, expected) < 1e-5
            else:  # the table is resized
                assert relative_error(y, expected) < 1e-4


def test_compressed_encoders_take_the_operator(encoder: nn.Module) -> None:
    compressed = birkhoff.compress(encoder, bits=8, precision="highest")
    assert len(fused_modules(compressed)) == 6
    y = encode(compressed, X)
    for module in compressed.modules():
        if isinstance(module, FusedAttention | FusedBlock):
            module.__class__ = type(module).__bases__[1]
    assert relative_error(y, encode(compressed, X)) < 1e-5


def test_copies_and_pickles_are_fused(encoder: nn.Module) -> None:
    expected = encode(fuse_attention(encoder), X)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert fused_modules(other) == fused_modules(encoder)
        assert torch.equal(encode(other, X), expected)
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(encode(encoder, X), expected)


def test_blocks_compile_as_a_whole(encoder: nn.Module) -> None:
    fuse_attention(encoder)
    block = next(module for module in encoder.modules() if isinstance(module, FusedBlock))
    x = torch.randn(1, 10, 10, 64)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_encoders(encoder: nn.Module, dtype: torch.dtype) -> None:
    expected = encode(encoder, X)
    y = encode(fuse_attention(encoder).to(dtype), X.to(dtype))
    assert y.dtype == dtype
    assert relative_error(y, expected) < 0.05


def test_autocast(encoder: nn.Module) -> None:
    expected = encode(encoder, X)
    fuse_attention(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        y = encode(encoder, X)
    assert relative_error(y, expected) < 0.05


def test_what_is_not_inference_takes_the_original_forward(
    encoder: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: Any) -> Tensor:
        raise AssertionError("the operator was called")

    fuse_attention(encoder)
    monkeypatch.setattr("birkhoff.nn.attention.attention", refuse)
    with pytest.raises(AssertionError):
        encode(encoder, X)
    x = X.clone().requires_grad_()
    encode(encoder, x).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    encode(encoder.train(), X)
    encode(encoder.eval().double(), X.double())
    assert encode(encoder.to("meta"), X.double().to("meta")).is_meta


def test_hooks_of_attention_modules_are_called(encoder: nn.Module) -> None:
    fuse_attention(encoder)
    shapes = []
    for module in encoder.modules():
        if isinstance(module, FusedAttention):
            module.register_forward_pre_hook(lambda _module, x: shapes.append(x))
            module.register_forward_hook(lambda _module, _x, y: shapes.append(y))
    encode(encoder, X)
    assert len(shapes) == 6


def test_attention_weights_that_are_asked_for_are_returned() -> None:
    model = drawn(ENCODERS["transformers-sam"], attn_implementation="eager")
    expected = model(X, output_attentions=True)
    assert fuse_attention(model) is model
    output = model(X, output_attentions=True)
    assert len(output.attentions) == 3
    for weights, original in zip(output.attentions, expected.attentions, strict=True):
        assert torch.equal(weights, original)


@pytest.mark.parametrize("other", ["use_rel_pos", "use_rope"])
def test_other_attention_is_left_alone(other: str) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
            self.num_heads, self.scale, self.use_rel_pos = 2, 0.5, False

    assert isinstance(fuse_attention(Attention()), FusedAttention)
    module = Attention()
    if other == "use_rope":
        module.use_rope = True  # type: ignore[assignment]
    else:
        del module.use_rel_pos
    assert type(fuse_attention(module)) is Attention
