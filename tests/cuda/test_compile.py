"""The CUDA kernels compile for all devices, and take no more of them than they did."""

from __future__ import annotations

import os

import pytest
import resources

from birkhoff.cuda.nvrtc import Nvrtc, NvrtcError, nvrtc
from birkhoff.cuda.source import Variant

#: Compile all variants, which takes minutes, instead of a selection.
EVERY = bool(os.environ.get("BIRKHOFF_TEST_EVERY_VARIANT"))


@pytest.fixture(scope="session")
def compiler() -> Nvrtc:
    try:
        return nvrtc()
    except NvrtcError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("variant", list(resources.variants(every=EVERY)), ids=str)
def test_compiles_without_spills_and_with_no_more_registers(
    compiler: Nvrtc, variant: Variant
) -> None:
    if variant.capability not in compiler.capabilities():
        pytest.skip(f"NVRTC {resources.version_of(compiler)} does not know the device")
    version, table = resources.read_table()
    usages = resources.measure(compiler, variant)
    assert {"decode", "gemv_1", "gemv_8", *(tile.kernel for tile in variant.tiles)} <= set(usages)
    for kernel, usage in usages.items():
        assert usage.spilled == 0, kernel
        # Other compilers allot registers differently.
        if not EVERY and version == resources.version_of(compiler):
            known = table[resources.key(variant, kernel)]
            assert usage.registers <= known.registers, f"{kernel}: run tests/cuda/resources.py"


@pytest.mark.parametrize("capability", [80, 90])
def test_instructions_of_the_inner_loop(compiler: Nvrtc, capability: int) -> None:
    disassembler = resources.nvdisasm()
    if disassembler is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    variant = Variant("shift", 4, "BF16", 1, capability)
    assert resources.instructions_per_thousand(compiler, disassembler, variant) <= 4


def test_devices_newer_and_older_than_the_compiler(compiler: Nvrtc) -> None:
    newest = compiler.capabilities()[-1]
    options = compiler.options(newest + 1)
    assert f"--gpu-architecture=compute_{newest}" in options
    image, _ = compiler.compile('extern "C" __global__ void nothing() {}', options)
    assert b".target sm_" in image
    assert image.endswith(b"\0")
    with pytest.raises(NvrtcError, match=r"capability 3\.5"):
        compiler.options(35)


def test_messages_of_the_compiler_are_shown(compiler: Nvrtc) -> None:
    with pytest.raises(NvrtcError, match="undeclared_name"):
        compiler.compile("int f() { return undeclared_name; }", compiler.options(80))
