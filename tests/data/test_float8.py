import pytest
import torch

from specforge_core.data.float8 import ScaledFloat8, dequantised, quantised


def test_a_vector_is_scaled_so_that_its_largest_element_is_the_largest_of_the_format():
    scaled = quantised(torch.tensor([[1.0, -3.5, 0.0], [0.0, 0.0, 0.0]]))
    # 3.5 / 448 = 1 / 128; 1.0 becomes 128, which the format has.
    assert scaled.scale[0] == 1 / 128
    assert scaled.values.float().tolist() == [[128.0, -448.0, 0.0], [0.0, 0.0, 0.0]]
    assert dequantised(scaled, torch.float32).tolist() == [[1.0, -3.5, 0.0], [0.0, 0.0, 0.0]]


def test_the_format_s_steps_are_what_is_lost():
    # Scale 1. Steps of 32 from 256, of 2 from 16, of 1/8 from 1, of 2^-9 below 2^-6; ties go to the even neighbour.
    vector = torch.tensor([448.0, 300.0, 304.0, 19.0, 1.07, 1.06, 2**-9 * 1.4, 2**-10])
    restored = dequantised(quantised(vector), torch.float32)
    assert restored.tolist() == [448.0, 288.0, 320.0, 20.0, 1.125, 1.0, 2**-9, 0.0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_an_element_is_off_by_a_sixteenth_of_itself_at_most_or_by_a_little_of_the_scale(size: float, device: str):
    generator = torch.Generator().manual_seed(0)
    vectors = size * torch.randn(100, 512, generator=generator)
    # Outliers, as hidden states have them.
    vectors[:, 7] *= 100
    scaled = ScaledFloat8(*(tensor.cpu() for tensor in quantised(vectors.to(device))))
    error = (scaled.values.double() * scaled.scale.double().unsqueeze(-1) - vectors.double()).abs()
    # 1e-6: the division and the scale are rounded too.
    bound = torch.maximum(vectors.double().abs() / 16, scaled.scale.double().unsqueeze(-1) / 2**10) * (1 + 1e-6)
    assert (error <= bound).all()
    assert (error > 0.9 * bound).any()


def test_the_product_is_rounded_once():
    # 1.875 x (1 + 2^-9 + 2^-10) = 1.8805, nearer to 1.8828125 than to 1.875, its bfloat16 neighbours. With the scale
    # rounded first, to 1, it would be 1.875.
    scaled = ScaledFloat8(torch.tensor([1.875]).to(torch.float8_e4m3fn), torch.tensor(1 + 2**-9 + 2**-10))
    assert dequantised(scaled, torch.bfloat16).item() == 1.8828125


def test_bfloat16_vectors_are_scaled_in_float32():
    vectors = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert quantised(vectors).scale.dtype == torch.float32
    assert torch.equal(quantised(vectors).values.float(), quantised(vectors.float()).values.float())


@pytest.mark.gpu
def test_multiplying_out_takes_no_memory_beside_the_result():
    scaled = quantised(torch.randn(1024, 3, 4096, device="cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    restored = dequantised(scaled, torch.bfloat16)
    assert torch.cuda.max_memory_allocated() - before <= restored.nbytes + 2**20
