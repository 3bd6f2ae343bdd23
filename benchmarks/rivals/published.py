"""MoCo-v2 in PyTorch with kornia on the device, with the published settings and tuned.

Published: float32 (with TF32 in convolutions, PyTorch's default), two crops on the host with
Pillow, and kornia 0.4.1's jitter, grayscale, flip, blur and normalisation on the device. Tuned:
channels_last, the workload's bfloat16, torch.compile, TF32 matrix products, a fused optimiser, and
a separable blur. Both let cuDNN search for its fastest algorithms. Written from the method's
description.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from PIL import Image

from benchmarks.contest import NotComparableError, TimedCall
from benchmarks.workload import Workload
from cassle_jax.data.pipeline import usable_cpus

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
QUEUE, WIDTH, TEMPERATURE, MOMENTUM = 65_536, 128, 0.2, 0.999


def kornia_chain(size: int, *, tuned: bool):
    """The published augmentations of one view on the device, after the crop on the host."""
    import torch
    from kornia import augmentation as kornia

    return torch.nn.Sequential(
        kornia.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        kornia.RandomGrayscale(p=0.2),
        kornia.RandomHorizontalFlip(),
        random_blur(size, separable=tuned),
        kornia.Normalize(
            *(torch.tensor(x, device=torch_device() if tuned else "cpu") for x in (MEAN, STD))
        ),
    )


def random_blur(size: int, *, separable: bool):
    """Blurs half of the images; kornia 0.4.1 has one σ per batch and a two-dimensional kernel."""
    import torch
    from kornia.filters import gaussian_blur2d, get_gaussian_kernel1d
    from torch.nn import functional

    kernel = int(0.1 * size) // 2 * 2 + 1

    class RandomBlur(torch.nn.Module):
        def forward(self, images):
            sigma = float(torch.empty(()).uniform_(0.1, 2.0))
            if separable:
                blurred = self.by_rows_and_columns(images, sigma)
            else:
                blurred = gaussian_blur2d(images, (kernel, kernel), (sigma, sigma))
            chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
            return torch.where(chosen, blurred, images)

        def by_rows_and_columns(self, images, sigma):
            taps = get_gaussian_kernel1d(kernel, sigma).to(images, non_blocking=True)
            taps = taps.expand(3, 1, 1, kernel)
            half = kernel // 2
            padded = functional.pad(images, (half, half, half, half), "reflect")
            rows = functional.conv2d(padded, taps, groups=3)
            return functional.conv2d(rows, taps.mT, groups=3)

    return RandomBlur()


def augmentation(work: Workload, *, tuned: bool) -> TimedCall:
    """Augments both views of a batch of finished crops on the device."""
    import torch

    chain = kornia_chain(work.views_size, tuned=tuned)
    device, shape = torch_device(), (work.views_batch, 3, work.views_size, work.views_size)
    views = [torch.rand(shape, device=device) for _ in range(2)]
    torch.backends.cudnn.benchmark = True

    @torch.no_grad()
    def once():
        for _ in range(work.steps):
            result = [chain(view) for view in views]
        _wait(device)
        return result

    once()
    return once


class Pairs:
    """Two crops per image."""

    def __init__(self, files: Sequence[Path], crop: Callable):
        self.files, self.crop = files, crop

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        with Image.open(self.files[index], formats=("JPEG",)) as file:
            image = file.convert("RGB")
        return self.crop(image), self.crop(image)


def loader(files: Sequence[Path], batch: int, size: int) -> TimedCall:
    """Reads all files once: Pillow, two random crops per image, one worker per CPU."""
    import torch
    from torchvision import transforms

    crop = transforms.Compose(
        [transforms.RandomResizedCrop(size, scale=(0.2, 1.0)), transforms.ToTensor()]
    )
    batches = torch.utils.data.DataLoader(
        Pairs(files, crop),
        batch,
        shuffle=True,
        num_workers=usable_cpus(),
        drop_last=True,
        persistent_workers=True,
        # A forked worker may inherit a lock of one of JAX's threads, and wait forever.
        multiprocessing_context="forkserver",
    )

    def once():
        return sum(len(first) for first, _ in batches)

    once()
    return once


def step(work: Workload, *, tuned: bool) -> TimedCall:
    """Trains MoCo-v2 on two finished crops on the device."""
    import torch
    from torch.nn import functional

    device = torch_device()
    chain = kornia_chain(work.size, tuned=tuned)

    online = _network(work.encoder).to(device)
    target = copy.deepcopy(online).requires_grad_(False)
    layout = torch.channels_last if tuned else torch.contiguous_format
    online, target = online.to(memory_format=layout), target.to(memory_format=layout)
    optimizer = torch.optim.SGD(
        online.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, fused=tuned or None
    )
    queue = functional.normalize(torch.randn(QUEUE, WIDTH, device=device))
    head = {"place": 0}
    crops = [torch.rand(work.batch, 3, work.size, work.size, device=device) for _ in range(2)]
    low = work.dtype == "bfloat16" and tuned

    def loss_of(first, second):
        with torch.autocast(device, torch.bfloat16, enabled=low):
            queries = functional.normalize(online(first).float())
            with torch.no_grad():
                keys = functional.normalize(target(second).float())
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, queries @ queue.T], 1) / TEMPERATURE
        labels = torch.zeros(len(logits), dtype=torch.long, device=device)
        return functional.cross_entropy(logits, labels), keys

    compiled = torch.compile(loss_of) if tuned else loss_of

    def one_step():
        with torch.no_grad():
            first, second = (chain(crop).to(memory_format=layout) for crop in crops)
        loss, keys = compiled(first, second)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            old, new = list(target.parameters()), list(online.parameters())
            torch._foreach_lerp_(old, new, 1 - MOMENTUM)
            place = head["place"]
            queue[place : place + len(keys)] = keys.detach()
            head["place"] = (place + len(keys)) % QUEUE

    def once():
        # Global settings, as both variants alternate in one process.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high" if tuned else "highest")
        for _ in range(work.steps):
            one_step()
        _wait(device)

    once()
    return once


def _network(encoder: str):
    """A torchvision ResNet whose last layer is MoCo-v2's projector."""
    import torch
    import torchvision

    model = getattr(torchvision.models, encoder)(num_classes=WIDTH)
    width = model.fc.in_features
    model.fc = torch.nn.Sequential(
        torch.nn.Linear(width, width, bias=False),
        torch.nn.BatchNorm1d(width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, WIDTH),
    )
    return model


def torch_device() -> str:
    """PyTorch's device.

    Raises:
      NotComparableError: JAX uses an accelerator, but PyTorch does not support it.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if jax.default_backend() != "cpu":
        raise NotComparableError("the installed PyTorch does not support this device")
    return "cpu"


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
