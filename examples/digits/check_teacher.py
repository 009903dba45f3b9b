"""Sample from the stored teacher, draw a grid and ask a classifier of real digits what it sees.

python examples/digits/check_teacher.py --teacher upcycle/assets/digits/teacher --grid samples.png
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from PIL import Image
from sklearn.svm import SVC

from upcycle.training.digits import NUM_CLASSES, load_digits

GUIDANCE = (1.0, 2.0)


@torch.no_grad()
def sample(
    transformer: DiTTransformer2DModel,
    scheduler: DDIMScheduler,
    labels: torch.Tensor,
    guidance: float = 1.0,
    steps: int = 50,
    seed: int = 0,
) -> torch.Tensor:
    """Labels [n] to images [n, c, h, w] in [-1, 1].

    Not `DiTPipeline`: that takes 1000 for the null class, which a model of ten classes does not have.
    """
    config = transformer.config
    null = torch.full_like(labels, config.num_embeds_ada_norm)
    shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        time = t.expand(len(labels))
        eps = transformer(x, timestep=time, class_labels=labels).sample[:, : config.in_channels]
        if guidance != 1.0:
            free = transformer(x, timestep=time, class_labels=null).sample[:, : config.in_channels]
            eps = free + guidance * (eps - free)
        x = scheduler.step(eps, t, x).prev_sample
    return x.clamp(-1, 1)


def draw(columns: list[list[torch.Tensor]], path: Path, zoom: int = 3) -> None:
    """Save groups of columns side by side; a group is a list of rows of images [k, 1, h, w] in [-1, 1]."""
    groups = []
    for rows in columns:
        lines = [torch.cat([_frame(image[0]) for image in row], dim=1) for row in rows]
        group = torch.cat(lines, dim=0)
        groups += [group, torch.ones(group.shape[0], 4)]
    picture = ((torch.cat(groups[:-1], dim=1) + 1) * 127.5).round().to(torch.uint8)
    image = Image.fromarray(picture.numpy())
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path, optimize=True)


def _frame(image: torch.Tensor) -> torch.Tensor:
    """A grey line of one pixel right of and below an image [h, w]."""
    return torch.nn.functional.pad(image, (0, 1, 0, 1), value=0.0)


def check(teacher: Path, grid: Path, per_class: int = 50, seed: int = 0) -> dict[str, float]:
    """Accuracy of the samples' labels under an SVM trained on real digits, and the distance to the nearest one."""
    transformer = DiTTransformer2DModel.from_pretrained(teacher, subfolder="transformer")
    scheduler = DDIMScheduler.from_pretrained(teacher, subfolder="scheduler")
    images, labels = load_digits("train")
    val_images, val_labels = load_digits("val")
    classifier = SVC().fit(images.flatten(1).numpy(), labels.numpy())

    def nearest(x: torch.Tensor) -> float:
        """Mean distance (root of the mean square) from images [n, 1, 16, 16] to their nearest training image."""
        return (torch.cdist(x.flatten(1), images.flatten(1)).min(1).values / x[0].numel() ** 0.5).mean().item()

    result = {
        "classifier accuracy, held-out digits": classifier.score(val_images.flatten(1).numpy(), val_labels.numpy()),
        "distance to the nearest training digit, held-out digits": nearest(val_images),
    }
    columns = [[val_images[val_labels == c][:4] for c in range(NUM_CLASSES)]]
    wanted = torch.arange(NUM_CLASSES).repeat_interleave(per_class)
    for guidance in GUIDANCE:
        made = sample(transformer, scheduler, wanted, guidance, seed=seed)
        accuracy = classifier.score(made.flatten(1).numpy(), wanted.numpy())
        result[f"classifier accuracy, {len(wanted)} samples, guidance {guidance:g}"] = accuracy
        result[f"distance to the nearest training digit, samples, guidance {guidance:g}"] = nearest(made)
        columns.append(list(made.unflatten(0, (NUM_CLASSES, per_class))[:, :8]))
    draw(columns, grid)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("upcycle/assets/digits/teacher"))
    parser.add_argument("--grid", type=Path, default=Path("samples.png"))
    parser.add_argument("--samples-per-class", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, value in check(args.teacher, args.grid, args.samples_per_class, args.seed).items():
        print(f"{name}: {value:.4f}")
