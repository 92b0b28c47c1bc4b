"""What a linear reader makes of the latents: a yardstick for the joint model's own answers.

    python benchmarks/ridge_on_latents.py runs/ixi/fold-1/latents fold-1-of-3

Ridge regression of age and ridge classification of sex on standardised latents, the mirrored ones too in training, of
the people that the joint model's readers learn from: the training and the validation part. Its strength by
cross-validation over them, both versions of a person on one side.
"""

import argparse

import numpy as np
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from shards.dataset import open_dataset

STRENGTHS = np.logspace(-1, 5, 13)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents", help="folder of packed latents")
    parser.add_argument("split", nargs="?", default="default")
    options = parser.parse_args()
    dataset = open_dataset(options.latents)
    for variable, model, score in (("age", Ridge(), "neg_mean_absolute_error"), ("sex", RidgeClassifier(), "accuracy")):
        train, test = (
            [
                key
                for part in parts
                for key in dataset.keys(part, options.split)
                if dataset.values(key)[variable] is not None
            ]
            for parts in (("train", "validation"), ("test",))
        )
        y, truth = (np.array([dataset.values(key)[variable] for key in keys]) for keys in (train, test))
        versions = ("image", "image_mirrored")
        x = np.stack([dataset.read(key, version).ravel() for version in versions for key in train]).astype(float)
        others = np.stack([dataset.read(key, "image").ravel() for key in test]).astype(float)
        strength = {f"{type(model).__name__.lower()}__alpha": STRENGTHS}
        search = GridSearchCV(make_pipeline(StandardScaler(), model), strength, scoring=score, cv=GroupKFold(10))
        found = search.fit(x, np.tile(y, 2), groups=np.tile(np.arange(len(y)), 2)).predict(others)
        if variable == "age":
            by_mean = np.abs(y.mean() - truth).mean()
            print(f"age error {np.abs(found - truth).mean():.1f} years ({by_mean:.1f} by the mean)")
        else:
            print(f"sex accuracy {(found == truth).mean():.2f}")


if __name__ == "__main__":
    main()
