"""The bar that every backend is held to: the reference in float64 is the truth."""

import torch

_ERROR_FACTOR = 2.0  # a backend may err at most twice as much as the reference in the same dtype


def assert_as_accurate(
    name: str,
    actual: torch.Tensor,
    truth64: torch.Tensor,
    reference_same_dtype: torch.Tensor,
    computed_in: torch.dtype | None = None,
) -> None:
    """Fail unless `actual` is as close to the truth as the reference is in the same dtype.

    The bar is max|actual - truth| <= 2 * max|reference - truth| + eps(dtype) * max|truth|, where
    dtype is `actual`'s. Elements where the truth is not finite must be the same (nan, inf, -inf).

    Args:
        name: what is compared, for the failure text.
        actual: a backend's output or gradient, any floating dtype.
        truth64: the same from the reference in float64, on inputs of the same values.
        reference_same_dtype: the same from the reference on the backend's own inputs.
        computed_in: the dtype of the bar where both round to a narrower one on the way, as Hugging
            Face's eager attention rounds its softmax to float32 in a model of any dtype. Where two
            sums differ in their last digit, such a rounding may make a whole digit of it.

    Raises:
        AssertionError: with the largest error, its index, and the RMS error of both.
    """
    assert truth64.dtype == torch.float64, f"{name}: the truth must be float64"
    assert actual.shape == truth64.shape == reference_same_dtype.shape, (
        f"{name}: shapes differ: actual {tuple(actual.shape)}, truth {tuple(truth64.shape)}, "
        f"reference {tuple(reference_same_dtype.shape)}"
    )
    assert actual.dtype == reference_same_dtype.dtype, (
        f"{name}: dtypes differ: actual {actual.dtype}, reference {reference_same_dtype.dtype}"
    )
    if truth64.numel() == 0:
        return

    truth = truth64.detach().cpu()
    actual64 = actual.detach().cpu().double()
    reference64 = reference_same_dtype.detach().cpu().double()
    finite = truth.isfinite()
    torch.testing.assert_close(
        actual64[~finite],
        truth[~finite],
        equal_nan=True,
        msg=lambda text: f"{name}: differs where the truth is not finite\n{text}",
    )
    # where() and not a product: nan * 0 is nan
    error = torch.where(finite, (actual64 - truth).abs(), 0.0)
    reference_error = torch.where(finite, (reference64 - truth).abs(), 0.0)
    largest_truth = torch.where(finite, truth.abs(), 0.0).max().item()
    bar = _ERROR_FACTOR * reference_error.max().item()
    bar += torch.finfo(computed_in or actual.dtype).eps * largest_truth
    # a nan in `actual` compares False with everything: ask for what must hold, not for its negation
    if error.max().item() <= bar:
        return

    worst = error.nan_to_num(nan=float("inf")).argmax().item()
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    raise AssertionError(
        f"{name} ({actual.dtype}, shape {tuple(actual.shape)}): max error "
        f"{error.max().item():.3e} exceeds {bar:.3e}\n"
        f"  RMS error {error.square().mean().sqrt().item():.3e}, of the reference "
        f"{reference_error.square().mean().sqrt().item():.3e}, "
        f"max of the reference {reference_error.max().item():.3e}, "
        f"max |truth| {largest_truth:.3e}\n"
        f"  worst at {index}: actual {actual64[index].item():.9e}, "
        f"truth {truth[index].item():.9e}, reference {reference64[index].item():.9e}"
    )
