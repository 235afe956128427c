"""Where columns are kept, in what precision, and what happens when the device is full."""

import pytest
import torch

from fisher_lab import KFACNaturalGradient
from fisher_lab.config.errors import SettingError
from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.kfac import policy
from fisher_lab.curvature.kfac.factors import Columns

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("megabytes", "choice", "compute", "expected"),
    [
        (499, "auto", CUDA, CUDA),
        (501, "auto", CUDA, CPU),
        (501, "cpu", CUDA, CPU),
        (1, "cpu", CUDA, CPU),
        (1, "auto", CPU, CPU),
    ],
)
def test_placement(megabytes, choice, compute, expected):
    assert policy.place(megabytes * 10**6, KFACSettings(store_device=choice), compute) == expected


def test_placement_limit_is_a_setting():
    small = KFACSettings(store_limit_mb=10)
    assert policy.place(9_000_000, small, CUDA) == CUDA
    assert policy.place(11_000_000, small, CUDA) == CPU


def test_bytes_of_a_large_head():
    # 50257 x 512 in 16 bits: the columns take 51.5 MB (49.1 MiB), the core 2.1 MB more.
    assert policy.bytes_of(512, 50257, torch.float16, torch.float64) == 50257 * 512 * 2 + 512**2 * 8


def test_own_dtype_is_kept_unless_asked():
    few = (7, 64)
    assert policy.storage_dtype(KFACSettings(), torch.bfloat16, few) == torch.bfloat16
    assert (
        policy.storage_dtype(KFACSettings(woodbury_dtype="fp32"), torch.bfloat16, few)
        == torch.float32
    )


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_sixteen_bits_are_for_fewer_columns_than_outputs(dtype):
    asked = KFACSettings(woodbury_dtype=dtype)
    assert policy.storage_dtype(asked, torch.float32, (63, 64)).itemsize == 2
    assert policy.storage_dtype(asked, torch.float32, (64, 64)) == torch.float32
    assert policy.storage_dtype(asked, torch.float64, (500, 64)) == torch.float64


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_an_error():
    with pytest.raises(SettingError, match=r"woodbury_store_device.*cpu"):
        KFACNaturalGradient(woodbury_store_device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_products_with_stored_columns(dtype):
    g = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)) * 1e-7
    columns = Columns.store(g, dtype, None)
    rounded = columns.data.double() * columns.scale
    bound = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(dtype, 1e-7)
    assert float((rounded - g.double()).norm() / g.double().norm()) < bound
    y = torch.randn(11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(columns.times(y), rounded @ y, rtol=1e-12, atol=1e-20)
    torch.testing.assert_close(columns.transposed_times(z), rounded.T @ z, rtol=1e-12, atol=1e-20)
    torch.testing.assert_close(
        columns.gram(torch.float64), rounded @ rounded.T, rtol=1e-12, atol=1e-25
    )
    assert columns.squared_norm() == pytest.approx(float(rounded.square().sum()), rel=1e-12)
