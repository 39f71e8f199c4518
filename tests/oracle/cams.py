"""The methods of the CAM family once more, slowly and from their papers, cell by cell in numpy.

Nothing here uses the package. Activation and gradient come from the plain network (papers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import nn

from tests.oracle.papers import Numbers, Score, activation_of, full_gradient, score_at


def relu(numbers: Numbers) -> Numbers:
    return np.maximum(numbers, 0.0)


def noisy_scans(x: torch.Tensor, share: float, count: int, seed: int) -> list[torch.Tensor]:
    """The scan with `count` textures of noise, SD = share of each channel's SD; as documented."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        noise = torch.randn(x.shape, generator=generator).double().numpy()
        for c in range(x.shape[1]):
            noise[0, c] *= share * np.std(x[0, c].double().numpy())
        out.append(x + torch.from_numpy(noise).to(x.dtype))
    return out


def gradcam_pp_weights(activation: Numbers, d1: Numbers, d2: Numbers, d3: Numbers) -> Numbers:
    """Chattopadhyay et al. 2018, equations 19 and 12: one weight per channel, as printed."""
    weights = np.zeros(len(activation))
    for k in range(len(activation)):
        whole = activation[k].sum()
        for u in np.ndindex(*activation.shape[1:]):
            at = (k, *u)
            if d2[at] == 0:
                continue
            alpha = d2[at] / (2 * d2[at] + whole * d3[at])
            weights[k] += alpha * max(d1[at], 0.0)
    return weights


def gradcam_pp(activation: Numbers, gradient: Numbers) -> Numbers:
    weights = gradcam_pp_weights(activation, gradient, gradient**2, gradient**3)
    return relu(np.tensordot(weights, activation, axes=1))


def smooth_gradcam_pp(
    net: nn.Module, layer: str, x: torch.Tensor, score: Score, noise: tuple[float, int, int]
) -> Numbers:
    """Omeiza et al. 2019: the powers of the gradient averaged over noisy scans."""
    share, count, seed = noise
    gradients = [
        full_gradient(net, layer, one, score)[1].double().numpy()
        for one in noisy_scans(x, share, count, seed)
    ]
    activation = activation_of(net, layer, x)[0].detach().double().numpy()
    d1, d2, d3 = (np.mean([g**p for g in gradients], axis=0) for p in (1, 2, 3))
    weights = gradcam_pp_weights(activation, d1, d2, d3)
    return relu(np.tensordot(weights, activation, axes=1))


def xgradcam(activation: Numbers, gradient: Numbers) -> Numbers:
    """Fu et al. 2020, equation 8, without the ReLU; Zhao et al. 2018 (Respond-CAM) is the same."""
    out = np.zeros(activation.shape[1:])
    for a, g in zip(activation, gradient, strict=True):
        weight = 0.0
        for u in np.ndindex(*a.shape):
            weight += g[u] * a[u] / a.sum() if a.sum() else 0.0
        out += weight * a
    return out


def layercam(activation: Numbers, gradient: Numbers) -> Numbers:
    """Jiang et al. 2021, equations 4 to 6."""
    out = np.zeros(activation.shape[1:])
    for u in np.ndindex(*out.shape):
        for k in range(len(activation)):
            out[u] += max(gradient[(k, *u)], 0.0) * activation[(k, *u)]
    return relu(out)


def eigen(stack: Numbers, along: Numbers) -> Numbers:
    """Bany Muhammad and Yeasin 2020: the SVD of cells x channels, projected on its first vector."""
    matrix = stack.reshape(len(stack), -1).T
    _, _, rows = np.linalg.svd(matrix, full_matrices=False)
    projected = (matrix @ rows[0]).reshape(stack.shape[1:])
    return relu(projected if (projected * along).sum() >= 0 else -projected)


def kpca(activation: Numbers) -> Numbers:
    """Karmani et al. 2024: kernel PCA over all cells, cells x cells, sigmoid kernel."""
    cells = activation.reshape(len(activation), -1).T
    cells = cells - cells.mean(axis=0)
    count, channels = cells.shape
    kernel = np.zeros((count, count))
    for a in range(count):
        for b in range(count):
            kernel[a, b] = np.tanh(float(cells[a] @ cells[b]) / channels + 1.0)
    centre = np.eye(count) - np.full((count, count), 1.0 / count)
    values, vectors = np.linalg.eigh(centre @ kernel @ centre)
    projected = (np.sqrt(values[-1]) * vectors[:, -1]).reshape(activation.shape[1:])
    return relu(projected if (projected**3).sum() >= 0 else -projected)


def hessian_at(net: nn.Module, layer: str, x: torch.Tensor, score: Score) -> Numbers:
    """All second derivatives of the score by the layer's numbers, (n, n)."""
    activation = activation_of(net, layer, x).detach()

    def of(flat: torch.Tensor) -> torch.Tensor:
        return score_at(net, layer, x, score, flat.reshape(activation.shape))

    second = torch.autograd.functional.hessian(of, activation.flatten())
    return np.asarray(second.double().numpy())


def shapleycam(activation: Numbers, gradient: Numbers, hessian: Numbers) -> Numbers:
    """Cai 2025: weights mean(g - H A / 2), with the whole Hessian written out."""
    bent = (hessian @ activation.ravel()).reshape(activation.shape)
    out = np.zeros(activation.shape[1:])
    for k in range(len(activation)):
        out += (gradient[k] - 0.5 * bent[k]).mean() * activation[k]
    return out


def seg_xres_cam(activation: Numbers, gradient: Numbers, window: int) -> Numbers:
    """Hasany et al. 2023: each gradient becomes the mean of its window, the last ones cut off."""
    out = np.zeros(activation.shape[1:])
    for k, u in product(range(len(activation)), np.ndindex(*out.shape)):
        corner = tuple(slice(n - n % window, n - n % window + window) for n in u)
        out[u] += gradient[k][corner].mean() * activation[(k, *u)]
    return out


def reads(voxels: int, cells: int, start: float, jump: float) -> Numbers:
    """Weights (voxels, cells): linear between centres at start + n * jump, held beyond the last."""
    table = np.zeros((voxels, cells))
    for v in range(voxels):
        at = min(max((v - start) / jump, 0.0), cells - 1.0)
        low = min(int(at), cells - 1)
        table[v, low] += 1 - (at - low)
        table[v, min(low + 1, cells - 1)] += at - low
    return table


def read_between(cells: Numbers, shape: Sequence[int], start: float, jump: float) -> Numbers:
    """A map on cells at start + n * jump, linear between them and constant beyond the last."""
    a, b, c = (reads(n, m, start, jump) for n, m in zip(shape, cells.shape, strict=True))
    return np.asarray(np.einsum("xi,yj,zk,ijk->xyz", a, b, c, cells))


def handed_out(cells: Numbers, shape: Sequence[int], start: float, jump: float) -> Numbers:
    """Each cell's amount over the voxels that read it, in proportion; the sum is kept."""
    a, b, c = (reads(n, m, start, jump) for n, m in zip(shape, cells.shape, strict=True))
    out = np.zeros(tuple(shape))
    for i, j, k in np.ndindex(*cells.shape):
        one = np.einsum("x,y,z->xyz", a[:, i], b[:, j], c[:, k])
        out += cells[i, j, k] * one / one.sum()
    return out
