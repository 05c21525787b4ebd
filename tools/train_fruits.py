"""Train and judge the small MobileNetV2 that the package ships as the `fruits` weights.

Training needs the photo sets of ``--data`` (``fruits360`` and ``grocery``, each with a ``Training``
and a ``Test`` folder of class folders). Only ``Training`` is ever learned from. ``Test`` is read
when a final set of weights is reported, never to choose between two.

    python tools/train_fruits.py --data DATA --output fruits_dask/weights/fruits.weights.h5
    python tools/train_fruits.py evaluate --weights fruits_dask/weights/fruits.weights.h5 --px 128
    KERAS_HOME=... python tools/train_fruits.py evaluate --weights imagenet --alpha 1.0 --px 224
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
import typer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Pixels: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
Names: TypeAlias = npt.NDArray[np.str_]
Step: TypeAlias = Callable[[Pixels, Ints], tf.Tensor]

SETS = ("fruits360", "grocery")
ALPHA = 0.35
"""Width of the shipped MobileNetV2; the feature count stays 1280 below 1.0."""
CACHE_RATIO = 1.25
"""Photos wait in memory this much larger than the net sees them, so that a crop stays sharp."""
SMALLEST_MOVING_VARIANCE = 6.1e-5
"""The smallest normal float16: below it a stored moving variance loses digits."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Photos:
    """Decoded photos of one split of one set."""

    pixels: Pixels
    """(n_images, px, px, 3) uint8, RGB"""
    labels: Names
    """(n_images,) class folder of each photo, behind the name of its set"""

    def take(self, rows: Bools) -> Photos:
        """Keep the marked photos."""
        return Photos(pixels=self.pixels[rows], labels=self.labels[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a training run depends on besides the photos."""

    px: int
    """side of the square that the net is trained on at the end, pixels"""
    warm_px: int
    """side during the first `warm_share` of the epochs, pixels: cheaper, and it regularizes"""
    warm_share: float
    """share of the epochs at `warm_px`, 0 to 1"""
    epochs: int
    """passes over all grocery photos and a fresh sample of Fruits-360"""
    n_fruits360: int
    """Fruits-360 photos drawn per epoch: its frames are near duplicates"""
    batch_size: int
    """photos per step"""
    learning_rate: float
    """peak of the warm-up and cosine schedule"""
    weight_decay: float
    """decoupled, on kernels only"""
    seed: int
    """of initial weights, order and augmentation"""


def list_photos(folder: Path) -> list[Path]:
    """List the photos of one split, sorted, so that a seed means the same order everywhere."""
    paths = sorted(folder.glob("*/*.jpg"))
    if not paths:
        raise typer.BadParameter(f"no */*.jpg under {folder}: expected one folder per class")
    return paths


def load_photos(data: Path, name: str, split: str, px: int) -> Photos:
    """Decode and resize a split exactly as the package does before it featurizes.

    Parameters
    ----------
    data
        Folder that holds the sets.
    name
        Set, one of `SETS`.
    split
        ``Training`` or ``Test``.
    px
        Side of the square that the whole photo is resized to.

    Returns
    -------
    Photos
        In the order of the sorted paths.
    """
    paths = list_photos(data / name / split)
    pixels = np.empty((len(paths), px, px, 3), np.uint8)
    for row, path in enumerate(paths):
        pixels[row] = keras.utils.load_img(path, target_size=(px, px), interpolation="bilinear")
    return Photos(pixels=pixels, labels=np.array([f"{name}/{path.parent.name}" for path in paths]))


def build_net(px: int | None, alpha: float = ALPHA, weights: str | None = None) -> keras.Model:
    """Build MobileNetV2 without top, averaged to one vector per photo."""
    return keras.applications.MobileNetV2(
        input_shape=(px, px, 3), alpha=alpha, include_top=False, weights=weights, pooling="avg"
    )


def build_classifier(net: keras.Model, n_classes: int) -> keras.Model:
    """Put a linear head on the features, which is what the probe will ask of them."""
    # Keras leaves 0.999, which remembers the first epochs for too long in a run of a few thousand
    # steps.
    for layer in net.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.99
    head = [keras.layers.Dropout(0.2), keras.layers.Dense(n_classes)]
    return keras.Sequential([net, *head])


def uniform(n: int, low: float, high: float) -> tf.Tensor:
    """Draw one number per photo, shaped to scale (n, height, width, channel)."""
    return tf.random.uniform((n, 1, 1, 1), low, high)


def draw_transforms(n: int, source_px: int, px: int) -> tf.Tensor:
    """Draw crop, stretch, flip and rotation as one affine map per photo.

    Returns
    -------
    tf.Tensor
        (n, 8) float32, output to input, as `tf.raw_ops.ImageProjectiveTransformV3` wants it.
    """
    side = tf.sqrt(tf.random.uniform((n,), 0.3, 1.0))
    stretch = tf.exp(tf.random.uniform((n,), -0.2, 0.2))
    angle = tf.random.normal((n,), stddev=0.26)
    flip = 2.0 * tf.round(tf.random.uniform((n,))) - 1.0
    ratio = source_px / px
    wide, high = ratio * side * stretch, ratio * side / stretch
    a, b = flip * wide * tf.cos(angle), -high * tf.sin(angle)
    c, d = flip * wide * tf.sin(angle), high * tf.cos(angle)
    room = (1.0 - side) * source_px / 2
    x = source_px / 2 + room * tf.random.uniform((n,), -1.0, 1.0)
    y = source_px / 2 + room * tf.random.uniform((n,), -1.0, 1.0)
    half, zero = (px - 1) / 2, tf.zeros((n,))
    rows = [a, b, x - half * (a + b), c, d, y - half * (c + d), zero, zero]
    return tf.stack(rows, axis=1)


def jitter_colour(images: tf.Tensor, n: int) -> tf.Tensor:
    """Vary light, contrast, saturation and white balance; hue stays, as it names the fruit."""
    images = images * uniform(n, 0.7, 1.3)
    images = images * tf.random.uniform((n, 1, 1, 3), 0.92, 1.08)
    mean = tf.reduce_mean(images, axis=(1, 2, 3), keepdims=True)
    images = mean + (images - mean) * uniform(n, 0.7, 1.3)
    grey = tf.reduce_mean(images, axis=3, keepdims=True)
    images = grey + (images - grey) * uniform(n, 0.6, 1.4)
    return tf.clip_by_value(images, 0.0, 255.0)


def erase(images: tf.Tensor, n: int, px: int) -> tf.Tensor:
    """Grey out one box on half of the photos, so that no single spot decides."""
    size = tf.random.uniform((n, 1, 2), 0.15, 0.45) * px
    size *= 1.0 - tf.round(tf.random.uniform((n, 1, 1)))
    centre = tf.random.uniform((n, 1, 2), 0.0, float(px))
    offset = tf.abs(tf.range(px, dtype=tf.float32)[None, :, None] - centre) < size / 2
    box = offset[:, :, None, 0] & offset[:, None, :, 1]
    return tf.where(box[..., None], 127.5, images)


def augment(pixels: tf.Tensor, px: int) -> tf.Tensor:
    """Turn cached photos into a batch of training inputs, (n, px, px, 3) in -1 to 1."""
    n, source_px = pixels.shape[0], pixels.shape[1]
    images = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(pixels, tf.float32),
        transforms=draw_transforms(n, source_px, px),
        output_shape=(px, px),
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="REFLECT",
    )
    images = erase(jitter_colour(images, n), n, px)
    return keras.applications.mobilenet_v2.preprocess_input(images)


def mix(images: tf.Tensor, targets: tf.Tensor, n: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Blend half of the photos with another one of the batch (mixup), targets alike.

    References
    ----------
    Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018, arXiv:1710.09412.
    """
    blend = tf.maximum(uniform(n, -0.5, 0.5), 0.0)
    images = images * (1.0 - blend) + images[::-1] * blend
    share = blend[:, :, 0, 0]
    return images, targets * (1.0 - share) + targets[::-1] * share


def draw_epoch(is_fruits360: Bools, recipe: Recipe, rng: np.random.Generator) -> Iterator[Ints]:
    """Yield full batches of rows: every grocery photo once, a fresh sample of Fruits-360."""
    fruits = rng.choice(np.flatnonzero(is_fruits360), recipe.n_fruits360, replace=False)
    rows = rng.permutation(np.concatenate([fruits, np.flatnonzero(~is_fruits360)]))
    n_batches = len(rows) // recipe.batch_size
    yield from np.split(rows[: n_batches * recipe.batch_size], n_batches)


def make_optimizer(recipe: Recipe, n_steps: int) -> keras.optimizers.Optimizer:
    """AdamW on a warmed-up cosine, with an average of the weights to keep at the end."""
    warm = n_steps // 20
    schedule = keras.optimizers.schedules.CosineDecay(
        recipe.learning_rate / 100,
        n_steps - warm,
        alpha=0.002,
        warmup_target=recipe.learning_rate,
        warmup_steps=warm,
    )
    optimizer = keras.optimizers.AdamW(
        schedule,
        weight_decay=recipe.weight_decay,
        global_clipnorm=5.0,
        use_ema=True,
        ema_momentum=0.998,
    )
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    return optimizer


def make_step(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, n_classes: int, px: int
) -> Step:
    """Trace one training step: augment, mix, forward, backward, update."""
    loss_of = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)

    def step(pixels: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        n = pixels.shape[0]
        images, wanted = mix(augment(pixels, px), tf.one_hot(targets, n_classes), n)
        with tf.GradientTape() as tape:
            loss = loss_of(wanted, model(images, training=True))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    return tf.function(step, autograph=False)  # type: ignore[no-any-return]


def fit(photos: Photos, recipe: Recipe) -> keras.Model:
    """Train from random weights and return the net with averaged weights.

    Parameters
    ----------
    photos
        Training photos of both sets, at `CACHE_RATIO` times `recipe.px`.
    recipe
        Sizes, schedule and seed.

    Returns
    -------
    keras.Model
        MobileNetV2 without top; its batch statistics still have to be measured.
    """
    keras.utils.set_random_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    classes, targets = np.unique(photos.labels, return_inverse=True)
    is_fruits360 = np.char.startswith(photos.labels, "fruits360/")
    net = build_net(None)
    model = build_classifier(net, len(classes))
    n_rows = recipe.n_fruits360 + int((~is_fruits360).sum())
    optimizer = make_optimizer(recipe, recipe.epochs * (n_rows // recipe.batch_size))
    optimizer.build(model.trainable_variables)
    steps = {
        px: make_step(model, optimizer, len(classes), px) for px in (recipe.warm_px, recipe.px)
    }
    start = time.monotonic()
    for epoch in range(recipe.epochs):
        px = recipe.warm_px if epoch < recipe.warm_share * recipe.epochs else recipe.px
        losses = [
            steps[px](photos.pixels[rows], targets[rows])
            for rows in draw_epoch(is_fruits360, recipe, rng)
        ]
        typer.echo(
            f"epoch {epoch + 1}/{recipe.epochs} px {px} loss {np.mean(losses):.3f} "
            f"{time.monotonic() - start:.0f} s"
        )
    optimizer.finalize_variable_values(model.trainable_variables)
    return net


def calibrate(net: keras.Model, pixels: Pixels, batch_size: int = 256) -> None:
    """Measure the batch statistics anew, on whole photos at the size of use.

    The ones from training belong to other weights (those before averaging), to crops and to another
    size.

    Parameters
    ----------
    net
        Changed in place.
    pixels
        (n_images, px, px, 3) uint8, in random order.
    batch_size
        Photos per measurement; every batch weighs the same in the mean.
    """
    norms = [layer for layer in net.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for k in range(len(pixels) // batch_size):
        for layer in norms:
            layer.momentum = k / (k + 1)
        batch = pixels[k * batch_size : (k + 1) * batch_size].astype(np.float32)
        net(keras.applications.mobilenet_v2.preprocess_input(batch), training=True)


def calibration_pixels(train: dict[str, Photos], n_fruits360: int, seed: int) -> Pixels:
    """Mix both sets as an epoch does."""
    rng = np.random.default_rng(seed)
    fruits = train["fruits360"].pixels
    few = fruits[rng.choice(len(fruits), n_fruits360, replace=False)]
    return rng.permutation(np.concatenate([few, train["grocery"].pixels]))


def save_float16(net: keras.Model, path: Path) -> None:
    """Write the weights in float16, under a temporary name until the file is whole.

    A float32 MobileNetV2 of the same shape reads the file with a plain ``load_weights``.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float16")
    try:
        half = build_net(None)
    finally:
        keras.config.set_dtype_policy(before)
    half.set_weights(net.get_weights())
    if not all(np.isfinite(array).all() for array in half.get_weights()):
        raise FloatingPointError("a weight is beyond the range of float16 (65504)")
    temporary = path.with_name(f"tmp-{path.name}")
    half.save_weights(temporary)
    temporary.replace(path)


def smallest_variance(net: keras.Model) -> float:
    """Find the smallest moving variance: float16 could round it to zero."""
    return min(
        float(np.min(layer.moving_variance))
        for layer in net.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    )


def featurize(net: keras.Model, pixels: Pixels) -> Floats:
    """Compute the features of photos, (n_images, 1280) float32."""

    def infer(batch: tf.Tensor) -> tf.Tensor:
        images = tf.cast(batch, tf.float32)
        return net(keras.applications.mobilenet_v2.preprocess_input(images), training=False)

    signature = [tf.TensorSpec((None, *pixels.shape[1:]), tf.uint8)]
    traced = tf.function(infer, input_signature=signature, autograph=False)
    batches = np.array_split(pixels, range(64, len(pixels), 64))
    return np.concatenate([traced(batch).numpy() for batch in batches])


def probe(net: keras.Model, train: Photos, test: Photos) -> float:
    """Score a linear classifier on standardized features: the share of `test` it names right."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    classifier.fit(featurize(net, train.pixels), train.labels)
    return float(classifier.score(featurize(net, test.pixels), test.labels))


def is_held_out(labels: Names, share: float) -> Bools:
    """Mark the last photos of each class: neighbours by name may show one shelf, so no shuffle."""
    held = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        held[rows[len(rows) - round(share * len(rows)) :]] = True
    return held


def validate(net: keras.Model, data: Path, holdout: float, px: int, recipe: Recipe) -> None:
    """Print the probe on the held-out part of grocery Training at one input size."""
    training = {name: load_photos(data, name, "Training", px) for name in SETS}
    held = is_held_out(training["grocery"].labels, holdout)
    kept, judged = training["grocery"].take(~held), training["grocery"].take(held)
    calibrate(
        net, calibration_pixels({**training, "grocery": kept}, recipe.n_fruits360, recipe.seed)
    )
    share = probe(net, kept, judged)
    typer.echo(f"validation grocery px {px}: {share:.2%} of {len(judged.labels)}")


def judge(net: keras.Model, data: Path, px: int) -> None:
    """Print the probe on the Test photos of both sets."""
    for name in SETS:
        train, test = (load_photos(data, name, split, px) for split in ("Training", "Test"))
        typer.echo(f"test {name} px {px}: {probe(net, train, test):.2%} of {len(test.labels)}")


def load_training(data: Path, px: int, holdout: float) -> Photos:
    """Load what may be learned from: Training of both sets without the held-out part."""
    parts = [load_photos(data, name, "Training", px) for name in SETS]
    parts[1] = parts[1].take(~is_held_out(parts[1].labels, holdout))
    return Photos(
        pixels=np.concatenate([part.pixels for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
    )


def load_net(path: Path, px: int) -> keras.Model:
    """Read a weights file into a float32 net, as the package does."""
    net = build_net(px)
    net.load_weights(path)
    return net


DataOption = Annotated[Path, typer.Option(help="folder that holds fruits360/ and grocery/")]
PxOption = Annotated[int, typer.Option(help="input size of use, pixels")]


@app.callback(invoke_without_command=True)
def train(  # noqa: PLR0917 - Typer passes options by name
    context: typer.Context,
    data: DataOption = Path("../shared/data"),
    output: Annotated[Path, typer.Option(help="weights file to write")] = Path(
        "fruits_dask/weights/fruits.weights.h5"
    ),
    px: PxOption = 128,
    train_px: Annotated[int, typer.Option(help="size of the crops at the end")] = 128,
    warm_px: Annotated[int, typer.Option(help="size of the crops at first")] = 96,
    warm_share: Annotated[float, typer.Option(help="share of the epochs at --warm-px")] = 0.6,
    epochs: Annotated[int, typer.Option(min=1)] = 160,
    n_fruits360: Annotated[int, typer.Option(help="Fruits-360 photos per epoch")] = 600,
    batch_size: Annotated[int, typer.Option(min=2)] = 64,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.05,
    holdout: Annotated[float, typer.Option(help="share of grocery Training to choose by")] = 0.0,
    seed: int = 20,
) -> None:
    """Train, write float16 weights, and report the probe.

    With --holdout the report is on that part of Training at several sizes and Test stays unread.
    """
    if context.invoked_subcommand:
        return
    recipe = Recipe(
        px=train_px,
        warm_px=warm_px,
        warm_share=warm_share,
        epochs=epochs,
        n_fruits360=n_fruits360,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        seed=seed,
    )
    start = time.monotonic()
    net = fit(load_training(data, round(CACHE_RATIO * train_px), holdout), recipe)
    typer.echo(f"trained in {time.monotonic() - start:.0f} s: {recipe}")
    finish(net, recipe, data=data, output=output, px=px, holdout=holdout)


def finish(
    net: keras.Model, recipe: Recipe, *, data: Path, output: Path, px: int, holdout: float
) -> None:
    """Calibrate for the size of use, write, read back and report."""
    training = {name: load_photos(data, name, "Training", px) for name in SETS}
    held = is_held_out(training["grocery"].labels, holdout)
    training["grocery"] = training["grocery"].take(~held)
    calibrate(net, calibration_pixels(training, recipe.n_fruits360, recipe.seed))
    if smallest_variance(net) < SMALLEST_MOVING_VARIANCE:
        typer.echo("a moving variance is below the normal numbers of float16", err=True)
    save_float16(net, output)
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    typer.echo(
        f"{output}: {output.stat().st_size} bytes, sha256 {digest}, "
        f"smallest moving variance {smallest_variance(net):.2e}"
    )
    if not holdout:
        judge(load_net(output, px), data, px)
    for size in (96, 112, 128, 160) if holdout else ():
        validate(load_net(output, size), data, holdout, size, recipe)


@app.command()
def evaluate(
    weights: Annotated[str, typer.Option(help="a weights file, or imagenet")],
    data: DataOption = Path("../shared/data"),
    px: PxOption = 128,
    alpha: Annotated[float, typer.Option(help="width of the net; imagenet is at 1.0")] = ALPHA,
) -> None:
    """Print the linear-probe accuracy of given weights on the Test photos of both sets."""
    if weights == "imagenet":
        judge(build_net(px, alpha, weights), data, px)
    else:
        judge(load_net(Path(weights), px), data, px)


if __name__ == "__main__":
    app()
