"""Router decisions along a sampling run."""

import torch

MAPS = 7


class Trajectory:
    """Records a few router decisions of a sampling run: lists over calls of x_t [n, C, H, W] and [n, H, W]."""

    def __init__(self, student: torch.nn.Module, count: int, steps: int):
        self.x_t: list[torch.Tensor] = []
        self.probability: list[torch.Tensor] = []
        self.mask: list[torch.Tensor] = []
        self.timesteps: list[int] = []
        self._student, self._count = student, min(count, 4)
        self._wanted = {round(i * (steps - 1) / (MAPS - 1)) for i in range(MAPS)}
        self._call = 0

    def __enter__(self) -> "Trajectory":
        self._handle = self._student.register_forward_hook(self._look, with_kwargs=True)
        return self

    def __exit__(self, *_) -> None:
        self._handle.remove()

    def _look(self, module, args, kwargs, output) -> None:
        if self._call in self._wanted:
            x_t = args[0][: self._count].cpu()
            self.x_t.append(x_t)
            for name in ("probability", "mask"):
                getattr(self, name).append(
                    getattr(output.routing, name)[: self._count].unflatten(1, x_t.shape[-2:]).cpu()
                )
            self.timesteps.append(int(kwargs["timestep"][0]))
        self._call += 1
