"""Levelled OrthoGrad: ascend on what is not forgotten yet, across the retain rows of this step and of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass

from mtu_fast.methods.orthograd import OrthoGrad


@dataclass(frozen=True)
class LevelledOrthoGrad(OrthoGrad):
    """w = alpha r - (1 - alpha) (f - x), x = G_AA^+ G_A. f, f_i = 1[l_i < κ τ_t] 1[s_t > s*_t] / n_t, A = R ∪ M.

    r is the mean retain weight, of the step's retain rows R alone. f is that of the n_t forget rows
    of each task t that are not forgotten yet: whose loss l_i is below the level κ τ_t of data never
    seen, in a task whose score s_t is above its own, s*_t. That is what `mtu.Levels` says. M are
    retain rows of earlier steps, kept in a `mtu.Memory`; they get weights from x alone.

    Where this comes from: a step θ - η d changes the loss of row i by -η ⟨g_i, d⟩ + O(η²). Let d =
    a + b, with a = alpha J^T r what repairs, and b what forgets. Forgetting is to leave what is
    retained alone, ⟨g_i, b⟩ = 0, for all retained samples, of which a step sees a few. Gradients
    change slowly, so rows of the steps before stand for others: b is orthogonal to both, and of
    all such vectors the one nearest to -(1 - alpha) J^T f, minus its projection on the span of A,
    which is J^T x. It is to leave alone, too, what is forgotten: gradients of forgotten samples are
    long, those of memorised ones short, so a plain mean pushes those that need it least, and the
    rest of the model with them. A sample is forgotten where its loss is that of one never seen; f
    holds the others.

    Args:
        alpha: weight of the retain gradient, in [0, 1]; 0 is pure orthogonalised ascent.
        granularity: "global", or "layer" or "tensor": each block is orthogonalised on its own.

    Raises:
        TypeError: `alpha` is not a number.
        ValueError: `alpha` is outside [0, 1], or `granularity` is unknown.

    Source: ours. OrthoGrad (arXiv 2503.02312) has the projection on R, ∇τ (arXiv 2403.14339) a held-out
    loss at which the ascent ends.
    """

    needs_memory = True
    needs_levels = True
