"""The prepared decoder makes the tokenizer's images: layouts and chunks up to rounding, bfloat16 up to a few grey levels."""

from __future__ import annotations

import pytest
import torch

from arsp.errors import ConfigError, ResourceError
from arsp.testing.tolerance import assert_close
from arsp.tokenizers.fast_decode import PIXELS_AT_ONCE, prepare_decoder
from arsp.tokenizers.llamagen_vq import VQConfig, VQModel
from arsp.tokenizers.pixels import to_uint8
from arsp.tokenizers.var_vqvae import VQVAE, VQVAEConfig

pytestmark = pytest.mark.usefixtures("one_thread")
LLAMAGEN = VQConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=32, codebook_size=16, codebook_embed_dim=4, image_size=16)
VAR = VQVAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=8, vocab_size=16, patch_nums=(1, 3, 8))


@pytest.fixture(params=["llamagen", "var"])
def tokenizer(request) -> torch.nn.Module:
    torch.manual_seed(0)
    return (VQModel(LLAMAGEN) if request.param == "llamagen" else VQVAE(VAR)).eval().requires_grad_(False)


def codes_of(tokenizer: torch.nn.Module, num: int = 5) -> torch.Tensor:
    length = 64 if isinstance(tokenizer, VQModel) else 1 + 9 + 64
    return torch.randint(16, (num, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_codes_and_vectors_are_decoded_alike(tokenizer):
    codes = codes_of(tokenizer)
    whole = tokenizer.decode_codes(codes)
    decoder = prepare_decoder(tokenizer, channels_last=False)
    assert_close(decoder.decode_codes(codes), whole, abs_tol=2e-5, what="pixels")
    assert torch.equal(decoder.decode_embeddings(tokenizer.codebook_VE[codes]), decoder.decode_codes(codes))


@torch.inference_mode()
def test_channels_last_differs_by_rounding(tokenizer):
    codes = codes_of(tokenizer)
    expected = tokenizer.decode_codes(codes)
    found = prepare_decoder(tokenizer, channels_last=True).decode_codes(codes)
    assert found.is_contiguous() and found.dtype == torch.float32
    assert_close(found, expected, abs_tol=2e-5, what="pixels")


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 2e-5), ("bfloat16", 2e-2)])
@torch.inference_mode()
def test_chunks_are_the_whole_up_to_rounding(tokenizer, dtype, rounding, chunk):
    codes = codes_of(tokenizer)
    whole, parts = (prepare_decoder(tokenizer, dtype=dtype, chunk=size).decode_codes(codes) for size in (5, chunk))
    assert_close(parts, whole, abs_tol=rounding, what=f"pixels in chunks of {chunk}")


@torch.inference_mode()
def test_bfloat16_images_are_within_a_few_levels_and_leave_the_tokenizer_alone(tokenizer):
    codes = codes_of(tokenizer)
    expected = to_uint8(tokenizer.decode_codes(codes)).int()
    found = to_uint8(prepare_decoder(tokenizer, dtype="bfloat16").decode_codes(codes)).int()
    gap = (found - expected).abs()
    assert 0 < gap.max() <= 6, f"largest gap {gap.max()} levels: 0 would mean that nothing ran in bfloat16"
    assert (gap <= 3).float().mean() > 0.99, f"{(gap > 3).float().mean():.2%} of the values differ by more than 3 levels"
    assert all(parameter.dtype == torch.float32 for parameter in tokenizer.parameters())


def test_sum_over_scales_stays_float32(monkeypatch):
    torch.manual_seed(0)
    tokenizer, seen = VQVAE(VAR).eval(), []
    monkeypatch.setattr(tokenizer, "to_map", lambda vectors: seen.append(VQVAE.to_map(tokenizer, vectors)) or seen[-1])
    with torch.inference_mode():
        prepare_decoder(tokenizer, dtype="bfloat16").decode_codes(codes_of(tokenizer))
        assert seen[0].dtype == torch.float32 and torch.equal(
            seen[0], tokenizer.quantize.sum_scales(tokenizer.codebook_VE[codes_of(tokenizer)])
        )


def test_leading_scales_alone_can_be_decoded():
    torch.manual_seed(0)
    tokenizer = VQVAE(VAR).eval()
    with torch.inference_mode():
        codes = codes_of(tokenizer)[:, :10]
        found = prepare_decoder(tokenizer, channels_last=False).decode_codes(codes)
        assert_close(found, tokenizer.decode_codes(codes), abs_tol=2e-5, what="pixels of two scales")


@torch.inference_mode()
def test_never_more_images_at_a_time_than_the_chunk(tokenizer):
    seen = []
    tokenizer.decoder.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    prepare_decoder(tokenizer, chunk=2).decode_codes(codes_of(tokenizer))
    assert seen == [2, 2, 1]
    assert prepare_decoder(tokenizer).chunk == PIXELS_AT_ONCE // tokenizer.config.image_size**2


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_decoder_makes_the_same_images(tokenizer):
    codes = codes_of(tokenizer, 2)
    expected = tokenizer.decode_codes(codes)
    assert_close(prepare_decoder(tokenizer, compile=True).decode_codes(codes), expected, abs_tol=2e-5, what="pixels")


@torch.inference_mode()
def test_default_images_are_those_of_the_plain_decoder_within_one_level(tokenizer):
    codes = codes_of(tokenizer, 16)
    plain = to_uint8(tokenizer.decode_codes(codes)).int()
    gap = (to_uint8(prepare_decoder(tokenizer).decode_codes(codes)).int() - plain).abs()
    assert gap.max() <= 1 and (gap > 0).float().mean() < 1e-3, f"{gap.max()} levels, {(gap > 0).float().mean():.2%} of the values"


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def fails(*_):
        raise TorchDynamoException("no compiler\nlong trace")

    monkeypatch.setattr(torch, "compile", lambda network, **options: fails)
    torch.manual_seed(0)
    with pytest.raises(ResourceError, match="^decoder_compile: torch.compile does not work here: no compiler$"):
        prepare_decoder(VQVAE(VAR).eval(), compile=True)


@pytest.mark.parametrize("wrong", [{"dtype": "int8"}, {"chunk": 0}])
def test_impossible_settings_are_refused(tokenizer, wrong):
    with pytest.raises(ConfigError, match="decoder"):
        prepare_decoder(tokenizer, **wrong)
