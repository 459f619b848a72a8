"""Whole models: compress, save, load."""

import copy
import multiprocessing
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import birkhoff
from birkhoff.nn import CodedParameter, HyperConv2d, HyperLinear

SIZE = 64


class Block(nn.Module):
    """Attention, with what a transformer of the SAM family has beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.attention = nn.MultiheadAttention(SIZE, 4, batch_first=True)
        self.lin1 = nn.Linear(SIZE, 2 * SIZE)
        self.lin2 = nn.Linear(2 * SIZE, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = self.lin2(nn.functional.gelu(self.lin1(self.norm(x))))
        return x + cast(Tensor, y)


class Model(nn.Module):
    """A small model that holds a tensor of every kind."""

    offsets: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, SIZE, 8, 8)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 4, 4, SIZE))
        self.register_buffer("offsets", torch.arange(SIZE) / SIZE, persistent=False)
        self.register_buffer("count", torch.tensor(7))
        block = Block()
        self.blocks = nn.ModuleList([block, Block(), block])
        self.neck = nn.Sequential(
            nn.Conv2d(SIZE, SIZE, 1, bias=False),
            nn.BatchNorm2d(SIZE),
            nn.Conv2d(SIZE, SIZE, 3, padding=1),
        )
        self.upscale = nn.ConvTranspose2d(SIZE, SIZE, 2, 2)
        self.tokens = nn.Embedding(128, SIZE)
        self.to_tokens = nn.Linear(SIZE, 128, bias=False)
        self.to_tokens.weight = self.tokens.weight
        self.head = nn.Linear(SIZE, 1)
        #: Made from a parameter in eval mode, as in TinyViT.
        self.register_buffer("cache", self.pos_embed.detach().mean(0), persistent=False)

    def train(self, mode: bool = True) -> "Model":
        super().train(mode)
        if not mode:
            self.cache = self.pos_embed.detach().mean(0)
        return self

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image).permute(0, 2, 3, 1) + self.pos_embed + self.cache
        x = (x + self.offsets).flatten(1, 2) + self.tokens.weight[:1]
        for block in self.blocks:
            x = block(x)
        grid = self.neck(x.transpose(1, 2).unflatten(-1, (4, 4)))
        tokens = self.to_tokens(self.upscale(grid).flatten(2).mT)
        return cast(Tensor, self.head(tokens[..., :SIZE]))


@pytest.fixture
def original() -> Model:
    torch.manual_seed(3)
    return Model().eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def run(model: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    with torch.inference_mode():
        output: Tensor = model(image)
    return output.clone()


def compressed(model: Model, **options: Any) -> Model:
    return birkhoff.compress(copy.deepcopy(model), **options)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return set(first) == set(second) and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_layers_are_swapped_and_other_tensors_decoded(original: Model) -> None:
    model = birkhoff.compress(original, bits=4)
    assert model is original
    assert isinstance(model.patch_embed, HyperConv2d)
    assert isinstance(model.neck[0], HyperConv2d)
    assert isinstance(model.blocks[0].lin1, HyperLinear)
    assert isinstance(model.to_tokens, HyperLinear)
    assert model.blocks[0] is model.blocks[2]
    # In coded form in the state dict, decoded where code reads them.
    assert type(model.neck[2]) is nn.Conv2d
    assert type(model.tokens) is nn.Embedding
    names = set(model.state_dict())
    for name in ("pos_embed", "neck.2.weight", "tokens.weight", "upscale.weight"):
        assert f"{name}.codes" in names
        assert name not in names
    assert {"blocks.0.attention.in_proj_weight.codes", "blocks.0.attention.out_proj.bias"} <= names
    assert isinstance(model.pos_embed, Tensor)
    # Tied to one another as before.
    tokens = model.state_dict()["tokens.weight.codes"]
    assert tokens.data_ptr() == model.to_tokens.coded_weight.codes.data_ptr()
    # Too small to gain.
    assert type(model.head) is nn.Linear
    assert isinstance(model.blocks[0].norm.weight, nn.Parameter)


def test_models_run_outside_of_no_grad(original: Model, image: Tensor, tmp_path: Path) -> None:
    model = birkhoff.compress(original)
    birkhoff.save(model, tmp_path / "model.safetensors")
    for each in (model, birkhoff.load(tmp_path / "model.safetensors", Model)):
        assert not each(image).requires_grad


def test_loading_onto_a_device(original: Model, image: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    expected = run(birkhoff.compress(original), image)
    birkhoff.save(original, path)
    for model in (Model, Model()):
        assert torch.equal(run(birkhoff.load(path, model, device="cpu"), image), expected)


def test_saving_over_the_file_that_a_model_is_mapped_from(
    original: Model, image: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    birkhoff.save(birkhoff.compress(original), path)
    model = birkhoff.load(path, Model)
    expected = run(model, image)
    birkhoff.save(model, path, overwrite=True)
    assert torch.equal(run(model, image), expected)
    assert torch.equal(run(birkhoff.load(path, Model), image), expected)


def test_output_is_that_of_the_decoded_weights(original: Model, image: Tensor) -> None:
    model = compressed(original, precision="highest")
    with torch.no_grad():
        for name, tensor in original.state_dict(keep_vars=True).items():
            path, _, attribute = name.rpartition(".")
            tensor.copy_(getattr(model.get_submodule(path), attribute))
    torch.testing.assert_close(run(model, image), run(original.eval(), image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("codec", ["shift", "winding"])
def test_file_of_the_checkpoint_and_of_the_model_are_the_same(
    original: Model, image: Tensor, tmp_path: Path, bits: int, codec: str
) -> None:
    if (codec, bits) == ("winding", 3):
        pytest.skip("no such rate")
    checkpoint = tmp_path / "model.pth"
    torch.save(original.state_dict(), checkpoint)
    birkhoff.compress_file(checkpoint, tmp_path / "a.safetensors", bits=bits, codec=codec)
    model = compressed(original, bits=bits, codec=codec)
    birkhoff.save(model, tmp_path / "b.safetensors")
    a, b = (birkhoff.open(tmp_path / f"{name}.safetensors") for name in "ab")
    assert a.shapes == b.shapes
    for name in a:
        assert a.entry(name).coding == b.entry(name).coding
        assert a.entry(name).nbytes == b.entry(name).nbytes
        assert (a[name] == b[name]).all()
    assert a.settings == b.settings
    from_a = birkhoff.load(tmp_path / "a.safetensors", Model)
    from_b = birkhoff.load(tmp_path / "b.safetensors", Model())
    assert same_state(from_a, model)
    assert same_state(from_b, model)
    expected = run(model, image)
    assert torch.equal(run(from_a, image), expected)
    assert torch.equal(run(from_b, image), expected)
    assert birkhoff.verify_file(tmp_path / "b.safetensors", checkpoint).ok


def test_file_passes_verification_and_holds_the_names_of_the_state_dict(
    original: Model, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    model = birkhoff.compress(original)
    nbytes = birkhoff.save(model, path)
    assert nbytes == path.stat().st_size
    with pytest.raises(FileExistsError, match="overwrite"):
        birkhoff.save(model, path)
    birkhoff.save(model, path, overwrite=True)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = set(file.keys())
    # Tied tensors have one entry.
    assert names < set(model.state_dict())


def test_loading_builds_no_parameters_and_maps_the_codes(original: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    birkhoff.save(birkhoff.compress(original), path)
    seen: list[Model] = []

    def build() -> Model:
        model = Model().to("cpu")
        assert all(parameter.is_meta for parameter in model.parameters())
        assert not model.offsets.is_meta
        seen.append(model)
        return model

    model = birkhoff.load(path, build)
    assert model is seen[0]
    assert not model.training
    assert torch.equal(model.offsets, original.offsets)
    assert torch.equal(model.cache, model.pos_embed.mean(0))
    maps = [
        [int(address, 16) for address in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    for module in model.modules():
        if isinstance(module, CodedParameter):
            address = module.codes.data_ptr()
            assert any(start <= address < stop for start, stop in maps)


def test_loading_state_into_a_mapped_model_leaves_the_file(
    original: Model, image: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    birkhoff.save(compressed(original), path)
    before = path.read_bytes()
    model = birkhoff.load(path, Model)
    other = compressed(Model().eval())
    model.load_state_dict(other.state_dict(), strict=True)
    model.eval()
    assert torch.equal(run(model, image), run(other, image))
    assert path.read_bytes() == before


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_load_strictly_both_ways(
    original: Model, image: Tensor, tmp_path: Path, assign: bool
) -> None:
    model, other = compressed(original), compressed(Model().eval())
    torch.save(model.state_dict(), tmp_path / "state.pth")
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    run(other, image)
    other.load_state_dict(state, strict=True, assign=assign)
    assert torch.equal(run(other.eval(), image), run(model, image))
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.lin1\.weight\.codes"):
        model.load_state_dict(Model().state_dict())


def test_copies(original: Model, image: Tensor) -> None:
    model = birkhoff.compress(original)
    expected = run(model, image)
    duplicate = copy.deepcopy(model)
    assert torch.equal(run(duplicate, image), expected)
    pickled: Model = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(pickled, image), expected)
    # A copy is its own, and decodes again on its own.
    pickled.load_state_dict(compressed(Model().eval()).state_dict())
    assert not torch.equal(run(pickled, image), expected)
    assert torch.equal(run(model, image), expected)
    model.share_memory()
    assert torch.equal(run(model, image), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cast_changes_what_is_computed_in_and_no_codes(
    original: Model, image: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = birkhoff.compress(original)
    expected, state = run(model, image), copy.deepcopy(model.state_dict())
    model.to(dtype).eval()
    y = run(model, image.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - expected).norm() < 0.05 * expected.norm()
    for module in model.modules():
        if isinstance(module, HyperLinear | HyperConv2d):
            assert module.weight.dtype == dtype
    birkhoff.save(model, tmp_path / "model.safetensors")
    file = birkhoff.open(tmp_path / "model.safetensors")
    name = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert {file.entry(key).dtype for key in file} == {name, "I64"}
    for name, tensor in model.state_dict().items():
        if name.endswith(("codes", "row_scales", "group_exponents")):
            assert torch.equal(tensor, state[name])


def test_autocast(original: Model, image: Tensor) -> None:
    model = birkhoff.compress(original)
    expected = run(model, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(model, image)
    assert (y.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.filterwarnings("ignore")
def test_compiles(original: Model, image: Tensor) -> None:
    model = birkhoff.compress(original)
    expected = run(model, image)
    y = run(torch.compile(model, fullgraph=True), image)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)


def test_state_is_found_by_the_names_of_attributes(original: Model, image: Tensor) -> None:
    model, other = birkhoff.compress(original), compressed(Model().eval())
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert torch.equal(
        run(lambda x: torch.func.functional_call(other, tensors, (x,)), image), run(model, image)
    )
    for name, buffer in model.named_buffers():
        assert model.get_buffer(name) is buffer


@pytest.mark.filterwarnings("ignore")
def test_exports_and_traces(original: Model, image: Tensor) -> None:
    model = birkhoff.compress(original)
    expected = run(model, image)
    with torch.no_grad():
        for strict in (False, True):
            exported = torch.export.export(model, (image,), strict=strict)
            y = exported.module()(image)
            torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
        traced: Any = torch.jit.trace(model, (image,), check_trace=False)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(traced(image), expected, rtol=1e-3, atol=1e-4)


class Features(torch.utils.data.Dataset[Tensor]):
    """Runs a model in the workers of a DataLoader."""

    def __init__(self, model: Model, image: Tensor) -> None:
        self.model, self.image = model, image

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return run(self.model, self.image)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore")
def test_runs_in_workers_after_fork(original: Model, image: Tensor) -> None:
    model = birkhoff.compress(original)
    expected = run(model, image)
    loader = torch.utils.data.DataLoader(
        Features(model, image), num_workers=2, multiprocessing_context="fork", timeout=60
    )
    outputs = list(loader)
    assert len(outputs) == 4
    assert all(torch.equal(output[0], expected) for output in outputs)


def test_skip_and_rules(original: Model) -> None:
    state = copy.deepcopy(original.state_dict())
    model: Any = birkhoff.compress(
        original, skip=["blocks.1.*"], rules={"blocks.0.lin1.weight": 8}, precision="medium"
    )
    assert type(model.blocks[1].lin1) is nn.Linear
    assert torch.equal(model.blocks[1].lin1.weight, state["blocks.1.lin1.weight"])
    assert torch.equal(model.blocks[0].norm.weight, state["blocks.0.norm.weight"])
    layer = model.blocks[0].lin1
    assert isinstance(layer, HyperLinear)
    assert (layer.bits, layer.precision) == (8, "medium")


def test_layers_that_are_more_than_a_product_keep_their_class(image: Tensor) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    hooked = nn.Linear(64, 64)
    calls: list[int] = []
    hooked.register_forward_hook(lambda *_: calls.append(1))
    doubled = Doubled(64, 64)
    model = birkhoff.compress(nn.Sequential(doubled, hooked).eval())
    assert list(model) == [doubled, hooked]
    run(model, torch.randn(2, 64))
    assert calls
    assert "0.weight.codes" in model.state_dict()


def on_meta() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64, device="meta")).eval()


def with_nan() -> nn.Module:
    linear = nn.Linear(64, 64)
    linear.weight.data[3, 5] = float("nan")
    return nn.Sequential(linear).eval()


def sparse() -> nn.Module:
    linear = nn.Linear(64, 64)
    linear.weight = nn.Parameter(torch.eye(64).to_sparse())
    return nn.Sequential(linear).eval()


def quantized() -> nn.Module:
    linear = nn.Sequential(nn.Linear(64, 64)).eval()
    model: nn.Module = torch.ao.quantization.quantize_dynamic(linear)  # type: ignore[no-untyped-call]
    return model


def with_quantized_buffer() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    weight = torch.quantize_per_tensor(torch.eye(64), 0.1, 0, torch.qint8)
    model.register_buffer("table", weight)
    return model


def on_cuda() -> nn.Module:
    """A model of fake tensors, which takes no GPU."""
    with FakeTensorMode():
        return nn.Sequential(nn.Linear(64, 64, device="cuda")).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(64, 64)), ["training mode", "eval()"]),
        (on_cuda, ["'0.weight' is on cuda", "model.cpu()"]),
        (quantized, ["quantized", "original model"]),
        (with_quantized_buffer, ["'table'", "quantized"]),
        (on_meta, ["'0.weight'", "meta"]),
        (with_nan, ["'0.weight'", "NaN"]),
        (sparse, ["'0.weight'", "sparse"]),
        (lambda: birkhoff.compress(nn.Sequential(nn.Linear(64, 64)).eval()), ["already"]),
        (lambda: nn.Linear(64, 64).eval(), ["itself a layer", "HyperLinear"]),
    ],
)
def test_models_that_cannot_be_compressed(make: Callable[[], nn.Module], words: list[str]) -> None:
    model = make()
    kinds = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        birkhoff.compress(model)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_arguments_that_are_wrong(original: Model) -> None:
    with pytest.raises(ValueError, match="7"):
        birkhoff.compress(original, bits=7)
    with pytest.raises(ValueError, match="best"):
        birkhoff.compress(original, precision="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing"):
        birkhoff.compress(original, skip=["nothing"])
    with pytest.raises(ValueError, match=r"birkhoff\.compress\(model\)"):
        birkhoff.save(original, "never.safetensors")
    assert type(original.blocks[0].lin1) is nn.Linear


def test_files_that_do_not_fit(original: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    plain = tmp_path / "plain.safetensors"
    save_file({"weight": torch.zeros(4, 4)}, plain)
    with pytest.raises(birkhoff.FormatError, match="not written by birkhoff"):
        birkhoff.load(plain, Model)
    birkhoff.save(compressed(original), path)

    other: Any = Model()
    other.head = nn.Linear(SIZE, 2)
    other.extra = nn.Linear(SIZE, SIZE)
    del other.upscale
    with pytest.raises(birkhoff.FormatError) as error:
        birkhoff.load(path, other)
    for words in (
        "'head.weight' has shape (1, 64) in the file and (2, 64) in the model",
        "missing in the file: 'extra.weight', 'extra.bias'",
        "not in the model: 'upscale.bias', 'upscale.weight'",
        str(path),
    ):
        assert words in str(error.value)
    assert type(other.blocks[0].lin1) is nn.Linear
    with pytest.raises(ValueError, match="already"):
        birkhoff.load(path, birkhoff.load(path, Model))
    with pytest.raises(ValueError, match=r"'0\.weight' is on cuda"):
        birkhoff.load(path, on_cuda())

    extended: Any = Model()
    extended.extra = nn.Linear(SIZE, SIZE)
    weight = extended.extra.weight.detach().clone()
    birkhoff.load(path, extended, strict=False)
    assert torch.equal(extended.extra.weight, weight)


def test_damaged_codes_are_found(original: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    birkhoff.save(birkhoff.compress(original), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(birkhoff.FormatError, match="checksum"):
        birkhoff.load(path, Model)


def test_function_that_leaves_values_out(original: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    birkhoff.save(birkhoff.compress(original), path)

    def build() -> Model:
        model = Model()
        model.register_buffer("unknown", torch.empty(3), persistent=False)
        return model

    with pytest.raises(ValueError, match=r"'unknown'.*instead of a function"):
        birkhoff.load(path, build)


def test_double_precision_is_decoded(tmp_path: Path) -> None:
    model = birkhoff.compress(nn.Sequential(nn.Linear(64, 64)).double().eval())
    assert type(model[0]) is nn.Linear
    assert run(model, torch.randn(2, 64).double()).dtype == torch.float64
    birkhoff.save(model, tmp_path / "model.safetensors")
    loaded = birkhoff.load(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(64, 64)))
    assert isinstance(loaded[0], HyperLinear)
