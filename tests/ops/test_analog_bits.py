"""What is peculiar to analog bits: every code exactly, in every width, dtype and order; the published programs' codes."""

from pathlib import Path

import pytest
import torch

from fastdiff.demo import define_torchvision_operators
from fastdiff.ops import from_bits, to_bits

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "bits.safetensors"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module")
def golden():
    return pytest.importorskip("safetensors.torch").load_file(GOLDEN)


def first(x):
    return x.movedim(-1, 1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_published_codes(golden, dtype):
    """pix2seq: least significant bit first, bit 1 only for values above 0."""
    image = first(golden["in/image_uint8"])
    bits = to_bits(image, dtype=dtype)
    assert bits.dtype == dtype and torch.equal(bits.float(), first(golden["out/encode/uint8"]))
    assert torch.equal(from_bits(first(golden["in/analog_samples"])), first(golden["out/decode/uint8"]))
    wide = to_bits(golden["in/wide_ints"].view(1, 1, -1), 16)
    assert torch.equal(wide[0] > 0, golden["out/wide_bits"].T > 0)


def test_bit_diffusion():
    """Most significant bit first, channel by channel."""
    pytest.importorskip("einops")
    define_torchvision_operators()
    theirs = pytest.importorskip("bit_diffusion.bit_diffusion", reason="bit-diffusion is not installed")
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    # Half a code up: the program truncates, and codes / 255 * 255 may fall short of the code.
    bits = theirs.decimal_to_bits((codes.float() + 0.5) / 255)
    assert torch.equal(to_bits(codes, order="msb"), bits)
    noisy = bits + 0.5 * torch.randn(bits.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(from_bits(noisy, order="msb").float(), (theirs.bits_to_decimal(noisy) * 255).round())


@pytest.mark.parametrize("order", ["lsb", "msb"])
@pytest.mark.parametrize("bits", [1, 3, 8, 9, 16, 31, 32, 33, 47, 63])
def test_every_width(bits, order):
    """Edges and random codes, through every dtype; the integer that comes back is the narrowest that holds them."""
    codes = torch.randint(0, 2**63 - 1, (2, 3, 700), generator=torch.Generator().manual_seed(bits)) >> (63 - bits)
    codes[0, 0, :2] = torch.tensor([0, 2**bits - 1])
    shifts = torch.arange(bits) if order == "lsb" else torch.arange(bits).flip(0)
    expected = ((codes.unsqueeze(2) >> shifts.view(-1, 1)) & 1).flatten(1, 2)
    for dtype in FLOATS:
        analog = to_bits(codes, bits, scale=0.5, order=order, dtype=dtype)
        assert torch.equal(analog, (expected - 0.5).to(dtype))
        back = from_bits(analog, bits, order=order)
        assert back.dtype == (torch.uint8 if bits <= 8 else torch.int32 if bits <= 31 else torch.int64) and torch.equal(back.long(), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (1, 2, 45, 47), (2, 1, 3, 5, 7)])
def test_memory_orders(shape, dtype):
    codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = to_bits(codes)
    for strided in (codes.movedim(1, -1).contiguous().movedim(-1, 1), codes.transpose(-1, -2).contiguous().transpose(-1, -2)):
        assert torch.equal(to_bits(strided), bits)
    assert torch.equal(from_bits(bits.movedim(1, -1).contiguous().movedim(-1, 1), dtype=dtype), codes)


def test_what_is_not_above_zero_is_bit_0():
    analog = torch.tensor([0.0, -0.0, 1e-30, -1e-30, torch.nan, torch.inf, -torch.inf, 1e-45]).view(1, 8, 1)
    assert from_bits(analog).item() == 4 + 32 + 128


def test_refusals():
    for codes in (torch.full((1, 1, 5), 256), torch.full((1, 1, 5), -1, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"to_bits: x wants values in \[0, 2\^8\)"):
            to_bits(codes)
    with pytest.raises(ValueError, match="to_bits: x wants uint8, int32 or int64"):
        to_bits(torch.zeros(1, 1, 5))
    with pytest.raises(ValueError, match="from_bits: bits wants a divisor of the 7 channels"):
        from_bits(torch.zeros(1, 7, 5))
    with pytest.raises(ValueError, match="from_bits: dtype wants uint8, int32 or int64, and 9 bits in it"):
        from_bits(torch.zeros(1, 9, 5), 9, dtype=torch.uint8)
