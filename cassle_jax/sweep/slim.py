"""Settings that the tables of slim encoders share: those of CIFAR-10, and heads of the field."""

# Twelve epochs of CIFAR-10 at 32 pixels, ResNet-18 of width 8.
VARIANTS = {
    "plain": ("conditioning=none",),
    "CASSLE": ("conditioning=cassle",),
    "CASSLE + plain branch": ("conditioning=cassle", "conditioning.plain_branch=0.5"),
}
BASE = (
    "data.source=folder",
    "epochs=12",
    "batch_size=256",
    "encoder.small_images=False",
    "encoder.width=8",
    "optimizer.name=adamw",
    "optimizer.base_learning_rate=0.004",
    "optimizer.weight_decay=1e-4",
    "optimizer.warmup_epochs=1.0",
    "checkpoint.every_steps=100000",
)
METHODS = {
    "simclr": ("method.projector_hidden=256",),
    "moco_v2": ("method.projector_hidden=256", "method.momentum=0.99", "method.queue_size=16384"),
    "barlow_twins": (
        "method.projector_hidden=512",
        "method.projector_out=512",
        "method.vector_rate=1.0",
    ),
}
# Heads of the other methods in docs/field.md, sized for the quickstart's 64 features.
HEADS = (
    "equimod.hidden=256",
    "equimod.out=128",
    "sie.hidden=256",
    "sie.out=256",
    "stl.code=32",
)
