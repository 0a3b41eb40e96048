"""The domain discrepancy factor: sampling probabilities from the student's lag in each domain.

Equations 1 and 2 of DDK (arXiv 2407.16154), and the alternative ``gap_factor``. Pure functions.

N is the number of domains. A perplexity is the exponential of the mean cross-entropy in nats per token,
measured on a domain's validation split: ``student_ppl[i]`` is the paper's l_S[i], ``teacher_ppl[i]`` its
l_T[i]. A factor is the paper's r: r[i] is the probability of sampling from domain i. All are float64 [N]; a
factor sums to 1. Every function raises ValueError if a perplexity is not finite or a teacher's not positive.
"""

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def initial_factor(student_ppl: Float64, teacher_ppl: Float64) -> Float64:
    """Return the factor at the start of training: the softmax over domains of the perplexity ratios.

    Equation 1: r[i] = exp(l_S[i] / l_T[i]) / sum_j exp(l_S[j] / l_T[j]), computed in log space: an untrained
    student's ratio is in the thousands, and its exponential would overflow.
    """
    return _softmax(_ratio(student_ppl, teacher_ppl))


def update_factor(
    factor: Float64, student_ppl: Float64, teacher_ppl: Float64, smoothing: float | None
) -> Float64:
    """Return the factor of the next interval, from that of the last one and new perplexities.

    Equation 2: psi[i] = r[i] * exp(l_S[i] / l_T[i]); r'[i] = alpha * psi[i] / sum_j psi[j] + (1 - alpha) / N.

    Parameters
    ----------
    factor
        The last interval's factor r.
    student_ppl, teacher_ppl
        Perplexities at the end of that interval.
    smoothing
        alpha, from 0 to 1: every domain keeps at least (1 - alpha) / N. None returns equation 1 of the new
        perplexities instead (the paper's ablation "w/o FS").
    """
    if smoothing is None:
        return initial_factor(student_ppl, teacher_ppl)
    with np.errstate(divide="ignore"):  # log 0 is -inf: a domain with probability 0 keeps psi = 0
        psi = _softmax(np.log(np.asarray(factor, np.float64)) + _ratio(student_ppl, teacher_ppl))
    return smoothing * psi + (1 - smoothing) / len(psi)


def gap_factor(student_ppl: Float64, teacher_ppl: Float64, temperature: float) -> Float64:
    """Return the softmax over domains of the cross-entropy gap, log(l_S / l_T), divided by a temperature.

    At temperature 1 the factor is proportional to the perplexity ratio, where equation 1 takes the ratio's
    exponential: ratios of 3 and 6 give 1/3 and 2/3 here, 0.05 and 0.95 there. Not in the paper. The
    temperature is in nats, above 0; a lower one favours the domain with the largest gap.
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
