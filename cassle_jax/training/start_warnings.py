"""Warns at the start of a run of an ω that gives the image away, and of late settings."""

from collections.abc import Iterator

from cassle_jax.augment import DESCRIPTORS
from cassle_jax.methods.build import Conditioning
from cassle_jax.training.run import Run

_REVEALED = {
    "color_diff": (
        "together with the jitter it reveals the image's mean colour, so ω alone solves a part of "
        "the objective; palette describes the jitter without the image "
        "(--config=…:conditioning=leak_free)"
    )
}
_REVEALED_BY_OTHERS = (
    "it may reveal which image it is, and ω alone may then solve a part of the objective; "
    "python -m cassle_jax.evaluate --tasks=leak measures that of the run"
)


def omega_warnings(run: Run) -> Iterator[str]:
    """Yields one line per setting with which ω misses its purpose."""
    yield from _leaks(run.conditioning)
    # An objective gains nothing by predicting an ω that the encoder sees.
    shown = {name.partition(".")[0] for name in run.conditioning.descriptors}
    predicted = [each.name for each in run.auxiliaries if shown & {*each.descriptors}]
    if predicted and run.conditioning.injection == "image":
        yield (
            "conditioning.injection='image' shows ω to the encoder, so what "
            f"{', '.join(predicted)} predicts need not be read off the image; "
            "conditioning.injection='concat' keeps ω in the projector"
        )


def late_warnings(run: Run) -> Iterator[str]:
    """Yields one line per setting whose effect would begin after the run's end."""
    epochs, start = run.clock.epochs, run.conditioning.start_epoch
    if start >= epochs:
        yield (
            f"conditioning.start_epoch={start:g} is not within the run's {epochs:g} epochs, so no "
            "image is projected with ω; use a smaller value"
        )
    yield from run.method.late_settings(epochs, run.clock.total_steps)


def _leaks(conditioning: Conditioning) -> Iterator[str]:
    """Yields what ω gives away of the image, or of the pairing of views."""
    leaking: dict[str, list[str]] = {}
    for name in conditioning.descriptors:
        descriptor = name.partition(".")[0]
        if DESCRIPTORS[descriptor].from_image:
            leaking.setdefault(descriptor, []).append(name)
    for descriptor, names in leaking.items():
        yield (
            f"conditioning.descriptors has {', '.join(names)}, which is computed from the image: "
            f"{_REVEALED.get(descriptor, _REVEALED_BY_OTHERS)}"
        )
    if conditioning.relative and conditioning.descriptors and conditioning.into != "predictor":
        yield (
            "conditioning.relative=True gives the two views opposite ω, so ω alone matches them "
            "and solves most of the objective; conditioning.into='predictor' keeps ω out of the "
            "embeddings that are matched"
        )
