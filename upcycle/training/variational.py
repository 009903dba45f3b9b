"""The variational term that trains a learned sigma (Nichol & Dhariwal, arXiv 2102.09672), as Meta's DiT adds it.

Facts from facebookresearch/DiT, `diffusion/gaussian_diffusion.py`: with its defaults the loss is the noise's MSE plus
this term with weight 1, in bits per dimension. Equal to that code on golden data (tests/golden/README.md).
"""

import math

import torch

from upcycle.models.chunked_dit import ChunkedDiT

HALF_BIN = 1 / 255  # of 256 pixel values in [-1, 1]; Meta keeps it for latents too
LEAST_PROBABILITY = 1e-12


def noise_schedule(student: ChunkedDiT) -> torch.Tensor:
    """The betas behind `ChunkedDiT.alpha_bar`, fp64 [T]: log(1 - alpha_bar) in fp32 would be off at the first steps."""
    c = student.config
    power = 0.5 if c.beta_schedule == "scaled_linear" else 1.0
    ends = c.beta_start**power, c.beta_end**power
    return torch.linspace(*ends, c.num_train_timesteps, dtype=torch.float64) ** (1 / power)


class VariationalBound:
    """One term of the variational bound for each sample, with gradient for the sigma channels only.

    Make it once: it holds the schedule's tables, computed in fp64 and kept in fp32 on the device of ``betas`` [T].
    """

    def __init__(self, betas: torch.Tensor):
        betas = betas.double()
        alpha_bar = (1 - betas).cumprod(0)
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        variance = betas * (1 - before) / (1 - alpha_bar)  # of q(x_{t-1} | x_t, x_0)
        variance[0] = variance[1]  # it is 0 at t = 0, where the log has no value
        tables = [
            (1 / alpha_bar).sqrt(),
            (1 / alpha_bar - 1).sqrt(),
            betas * before.sqrt() / (1 - alpha_bar),
            variance.log(),
            betas.log(),
        ]
        self._tables = torch.stack(tables).float()

    def __call__(
        self, output: torch.Tensor, x0: torch.Tensor, x_t: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and -log p(x_0 | x_1) at t = 0, in bits per dimension.

        Args:
            output: the model's, [B, 2C, H, W]: epsilon, then v, which places the log variance between the posterior's
                (v = -1) and log beta (v = 1).
            x0, x_t: [B, C, H, W].
            timestep: int64 [B].

        Returns:
            fp32 [B].
        """
        epsilon, v = output.float().chunk(2, dim=1)
        x_scale, epsilon_scale, x0_scale, least, most = self._tables[:, timestep, None, None, None]
        # Both means hold the same multiple of x_t, so that they differ by what x_0 contributes. Meta does not clip x_0.
        error = x0_scale * (x0 - (x_scale * x_t - epsilon_scale * epsilon.detach()))
        log_variance = least + (v + 1) / 2 * (most - least)
        kl = (log_variance - least + (least - log_variance).exp() + error**2 * (-log_variance).exp() - 1) / 2
        # At t = 0 the posterior's mean is x_0 itself, and ``error`` is that of the predicted mean.
        nats = torch.where((timestep == 0)[:, None, None, None], -_log_likelihood(x0, error, log_variance), kl)
        return nats.flatten(1).mean(1) / math.log(2)


def _log_likelihood(x0: torch.Tensor, error: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Log probability of the bin of ``x0`` under a Gaussian ``error`` away from it; the outermost bins are open."""
    inverse = (-log_variance / 2).exp()
    below_upper = _normal_cdf(inverse * (error + HALF_BIN))
    below_lower = _normal_cdf(inverse * (error - HALF_BIN))
    probability = torch.where(x0 > 0.999, 1 - below_lower, below_upper - below_lower)
    probability = torch.where(x0 < -0.999, below_upper, probability)
    return probability.clamp(min=LEAST_PROBABILITY).log()


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The approximation by tanh of the standard normal's CDF (the one of tanh-GELU); Meta's values have it in them."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
