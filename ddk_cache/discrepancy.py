"""How far the student lags behind in each domain, as sampling probabilities (DDK, equations 1 and 2)."""

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def initial_factor(student_ppl: Float64, teacher_ppl: Float64) -> Float64:
    """Equation 1: the softmax over domains of the perplexity ratio student / teacher.

    Parameters
    ----------
    student_ppl, teacher_ppl
        Perplexity on each domain's validation split, [N], positive and finite.

    Returns
    -------
    The domain discrepancy factor, [N], summing to 1. Worked out in log space: an untrained student's
    ratio is in the thousands, and its exponential would overflow.
    """
    return _softmax(_ratio(student_ppl, teacher_ppl))


def update_factor(
    factor: Float64, student_ppl: Float64, teacher_ppl: Float64, smoothing: float | None
) -> Float64:
    """Equation 2: the old factor times exp(ratio), normalised, then mixed with the uniform share.

    Parameters
    ----------
    factor
        The factor of the interval that ended, [N], summing to 1.
    student_ppl, teacher_ppl
        Perplexity on each domain's validation split, [N], positive and finite.
    smoothing
        alpha; every domain keeps at least (1 - alpha) / N. None leaves the smoothing out: the new factor
        comes straight from equation 1 (the paper's ablation "w/o FS").

    Returns
    -------
    The next interval's factor, [N], summing to 1.
    """
    if smoothing is None:
        return initial_factor(student_ppl, teacher_ppl)
    with np.errstate(divide="ignore"):
        psi = _softmax(np.log(np.asarray(factor, np.float64)) + _ratio(student_ppl, teacher_ppl))
    return smoothing * psi + (1 - smoothing) / len(psi)


def gap_factor(student_ppl: Float64, teacher_ppl: Float64, temperature: float) -> Float64:
    """The softmax over domains of the gap in cross-entropy, log(student / teacher perplexity), in nats.

    At temperature 1 a domain's share is in proportion to its ratio, where equation 1 takes the ratio's
    exponential: ratios of 3 and 6 give 1/3 and 2/3, and there 0.05 and 0.95.

    Parameters
    ----------
    student_ppl, teacher_ppl
        Perplexity on each domain's validation split, [N], positive and finite.
    temperature
        In nats; above 0.

    Returns
    -------
    The factor, [N], summing to 1.
    """
    return _softmax(np.log(_ratio(student_ppl, teacher_ppl)) / temperature)


def _ratio(student_ppl: Float64, teacher_ppl: Float64) -> Float64:
    student, teacher = np.asarray(student_ppl, np.float64), np.asarray(teacher_ppl, np.float64)
    if not (np.isfinite(student).all() and np.isfinite(teacher).all() and (teacher > 0).all()):
        raise ValueError(f"perplexities must be positive and finite: student {student}, teacher {teacher}")
    return student / teacher


def _softmax(scores: Float64) -> Float64:
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())
