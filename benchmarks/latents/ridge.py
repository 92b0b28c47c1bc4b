"""Linear prediction of age and sex from latents, for comparison with the joint model.

    python -m benchmarks.latents.ridge runs/ixi/fold-1/latents fold-1-of-3

Ridge regression of age and ridge classification of sex on standardised latents. It is fitted to the people whom the
joint model's scalar networks are trained on, the training and the validation part, with mirrored latents too. The
strength is chosen by cross-validation over these people, with both versions of a person in one fold.
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
