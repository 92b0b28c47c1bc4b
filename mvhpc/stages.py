"""The table of stages, read by the command line, ``submit.py``, the pipeline, export, fingerprints and run folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvhpc.runtime.importing import resolve


@dataclass(frozen=True)
class Stage:
    """One stage. Its presets are ``configs/NAME/*.yaml``.

    Attributes:
        name: of the stage.
        config: ``module:class`` of its configuration, imported on use, since some modules are slow to import.
        run: ``module:function`` of ``run(config, run) -> summary``; empty for a stage that trains ``task``.
        inputs: configuration key of a file or folder, whose content counts in place of its name -> the stage that makes
            it; empty if no stage does.
        out: path of its result below a project's root. ``{split}`` is the folder of a cross-validation fold,
            ``{query}`` the name of a query, ``{name}`` that of a baseline's network.
        help: one line.
        command: words after ``mvhpc``; empty for stages of the ``shards`` command.
        examples: complete commands.
        flags: flag -> help; a flag sets the configuration key of its name.
        lists: the flags that take several words.
        files: ``module:function`` of ``files(config) -> paths`` of the files of its result, where there are several.
        task: ``module:class`` of a :class:`mvhpc.training.task.Task`, for a stage that trains; else empty. The output
            folder of such a stage is its run folder, and it resumes from checkpoints.
        uses_nodes: whether it can run on several nodes.
        resumes: whether it continues where it was interrupted, though it trains nothing; its journal has ``metrics``
            where it has advanced.
        check: ``module:function`` of ``check(schema, config)``, which refuses unknown variables; empty: none.
    """

    name: str
    config: str
    run: str
    inputs: Mapping[str, str]
    out: str
    help: str
    command: str = ""
    examples: tuple[str, ...] = ()
    flags: Mapping[str, str] = field(default_factory=dict)
    lists: tuple[str, ...] = ()
    files: str = ""
    task: str = ""
    uses_nodes: bool = False
    resumes: bool = False
    check: str = ""

    @property
    def trains(self) -> bool:
        """Whether it trains networks."""
        return bool(self.task)

    def config_class(self) -> type:
        """The dataclass of its configuration."""
        found: type = resolve(self.config)
        return found

    def run_folder(self, out: str | Path) -> Path:
        """Folder of configuration, journal and log: the output of a stage that trains, else ``OUT.run`` beside it."""
        path = Path(out)
        return path if self.trains else path.with_name(path.name + ".run")

    def run_name(self, config: Any) -> str:
        """A short name of a run: ``vae``, ``age | image, sex``, ``vit: age | image``, ``vae (fold-2)``,
        ``generate (women70)``.

        A result in the place that a project has for it is not named.
        """
        want = getattr(config, "want", ())
        want, given = [want] if isinstance(want, str) else list(want), list(getattr(config, "given", ()))
        name, query = getattr(config, "name", self.name), query_name(want, given)
        usual = Path(self.out.format(split="", query=query, name=name))
        if "{query}" in self.out:
            text = f"{', '.join(want)} | {', '.join(given) or 'nothing'}"
            name = text if self.name == "predict" else f"{name}: {text}"
        out = Path(config.out)
        if out.parts[-len(usual.parts) :] != usual.parts:
            return f"{name} ({out.name.removesuffix(usual.suffix)})"
        above = out.parts[-len(usual.parts) - 1 : -len(usual.parts)]
        fold = next((part for part in above if part.startswith("fold-")), "")
        return f"{name} ({fold})" if fold and "{split}" in self.out else name


def query_name(want: Sequence[str], given: Sequence[str]) -> str:
    """The file name of a query's predictions: ``age-given-image-sex``."""
    return f"{'-'.join(want)}-given-{'-'.join(given) or 'nothing'}"


DATA = "packed data set"
JOINT_MODEL = "run folder of the joint model"
SPLIT = "train, validation, test or all"
PART = f"{SPLIT}; default: test of the data that the model was trained on, all of other data"

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "phantom",
            config="mvhpc.data_stages:PhantomConfig",
            run="mvhpc.data_stages:run_phantom",
            inputs={},
            out="source",
            help="make procedural brains with a known joint law",
        ),
        Stage(
            "preprocess",
            config="mvhpc.data_stages:PreprocessConfig",
            run="mvhpc.data_stages:run_preprocess",
            inputs={"source": "phantom", "template": ""},
            out="derivative",
            help="make a BIDS derivative of raw scans, in the space of a template",
            uses_nodes=True,
            resumes=True,
        ),
        Stage(
            "pack",
            config="mvhpc.data_stages:PackConfig",
            run="mvhpc.data_stages:run_pack",
            inputs={"source": "phantom", "exclude": "", "pseudonymise": ""},
            out="packed",
            help="pack a BIDS tree or CSV into shards",
            uses_nodes=True,
            resumes=True,
        ),
        Stage(
            "vae",
            config="mvhpc.training.vae:VAEConfig",
            run="",
            task="mvhpc.training.vae:VAETask",
            inputs={"data": "pack"},
            out="{split}vae",
            help="train the autoencoder of the volumes",
            command="train vae",
            examples=(
                "mvhpc train vae --config demo",
                "mvhpc train vae data=runs/packed out=runs/vae training.epochs=100",
            ),
            uses_nodes=True,
        ),
        Stage(
            "encode",
            config="mvhpc.inference.encode:EncodeConfig",
            run="mvhpc.inference.encode:run",
            inputs={"data": "pack", "vae": "vae"},
            out="{split}latents",
            help="encode all volumes to latents",
            command="encode",
            examples=("mvhpc encode data=runs/packed vae=runs/vae out=runs/latents",),
        ),
        Stage(
            "joint",
            config="mvhpc.training.joint:JointConfig",
            run="",
            task="mvhpc.training.joint:JointTask",
            inputs={"latents": "encode", "vae": "vae", "scalars": "scalars"},
            out="{split}joint",
            help="train the joint diffusion of latents, numbers and categories",
            command="train joint",
            examples=(
                "mvhpc train joint latents=runs/latents vae=runs/vae scalars=runs/scalars out=runs/joint",
                "mvhpc train joint --config paper latents=runs/latents vae=runs/vae out=runs/joint compute.workers=4",
            ),
            uses_nodes=True,
        ),
        Stage(
            "scalars",
            config="mvhpc.training.scalars:ScalarsConfig",
            run="",
            task="mvhpc.training.scalars:ScalarsTask",
            inputs={"data": "pack"},
            out="{split}scalars",
            help="train the model that predicts scalars from voxels and tissue maps",
            command="train scalars",
            examples=(
                "mvhpc train scalars data=runs/packed out=runs/scalars",
                "mvhpc train scalars data=runs/packed out=runs/scalars training.epochs=100 encoder.spacing=2",
            ),
            uses_nodes=True,
        ),
        Stage(
            "baseline",
            config="mvhpc.training.baseline:BaselineConfig",
            run="",
            task="mvhpc.training.baseline:BaselineTask",
            inputs={"data": "pack"},
            out="{split}baselines/{name}/{query}",
            help="train a network for a single query, for comparison: DenseNet121, ViT or BRAID",
            command="train baseline",
            examples=(
                "mvhpc train baseline name=vit want=age given=image,sex",
                "mvhpc train baseline data=runs/packed want=age given=image,sex out=runs/densenet-age",
            ),
            uses_nodes=True,
            check="mvhpc.training.baseline:check_query",
        ),
        Stage(
            "predict",
            config="mvhpc.inference.predictor:PredictConfig",
            run="mvhpc.inference.predict:run",
            files="mvhpc.inference.prediction_tables:files",
            inputs={"model": "joint", "data": "pack"},
            out="{split}predictions/{query}.tsv",
            help="predict variables of every subject of a packed data set, given others",
            command="predict",
            examples=(
                "mvhpc predict --model runs/joint --data runs/packed --given image,sex --want age --out age.tsv",
                "mvhpc predict --model runs/joint --data runs/packed --given image --want age,sex --draws 100 "
                "--out both.tsv",
                "mvhpc predict --bids raw --model runs/joint --out answers     raw scans: mvhpc predict --bids --help",
            ),
            flags={
                "model": "run folder of a model of scalars, a joint model or a baseline",
                "data": DATA,
                "split": PART,
                "given": "known variables, separated by commas; may be empty",
                "want": "variables to predict, separated by commas",
                "samples": "chains per subject, for models whose U-Net predicts scalars",
                "draws": "joint draws of the wanted variables per subject, in a second table",
                "out": "TSV file to write, one row per subject",
            },
            uses_nodes=True,
            resumes=True,
            check="mvhpc.inference.predictor:check_config",
        ),
        Stage(
            "evaluate",
            config="mvhpc.inference.evaluate:EvaluateConfig",
            run="mvhpc.inference.evaluate:run",
            inputs={"runs": "", "generation": "", "data": "pack"},
            out="evaluation",
            help="compare trained models: the paper's tables, with intervals, calibration and figures",
            command="evaluate",
            examples=(
                "mvhpc evaluate --runs runs/joint runs/baselines/*/* --data runs/packed --split test --out comparison",
                "mvhpc evaluate --runs runs/ours runs/theirs --names ours theirs --data new-site --out new-site",
            ),
            flags={
                "runs": "run folders of stages scalars, joint and baseline",
                "names": "their rows, one for each run; runs of one name are folds of one row",
                "generation": "results of `mvhpc evaluate-generation` of these models, for the FID in table 1",
                "data": DATA,
                "split": PART,
                "out": "folder of tables and figures to write",
            },
            lists=("runs", "names", "generation"),
        ),
        Stage(
            "calibrate",
            config="mvhpc.inference.calibrate:CalibrateConfig",
            run="mvhpc.inference.calibrate:run",
            inputs={"model": "scalars", "data": ""},
            out="{split}calibrated",
            help="calibrate a model of scalars for a new site, by some labelled people of it",
            command="calibrate",
            examples=("mvhpc calibrate --model runs/scalars --data new-site --out runs/scalars-new-site",),
            flags={
                "model": "run folder of stage scalars or joint",
                "data": "packed people of the new site, with labels",
                "split": SPLIT,
                "site": "name of the site (default: that of the folder of the data)",
                "out": "model folder to write",
            },
        ),
        Stage(
            "generate",
            config="mvhpc.inference.generate:GenerateConfig",
            run="mvhpc.inference.generate:run",
            inputs={"model": "joint"},
            out="synthetic",
            help="generate synthetic people, as a BIDS tree",
            command="generate",
            examples=(
                "mvhpc generate --model runs/joint --count 100 --out synthetic",
                "mvhpc generate --model runs/joint --count 8 --given age=70,sex=F --out women70",
            ),
            flags={
                "model": JOINT_MODEL,
                "count": "number of people",
                "given": "fixed variables, as name=value,name=value",
                "out": "BIDS tree to write",
            },
            check="mvhpc.inference.generate:check_query",
        ),
        Stage(
            "evaluate-generation",
            config="mvhpc.inference.generation_comparison:EvaluateGenerationConfig",
            run="mvhpc.inference.evaluate_generation:run",
            inputs={"model": "joint", "data": "pack", "drawn": "", "features": ""},
            out="{split}generation",
            help="measure the quality of drawn volumes beside real ones: FID, diversity, copies, age and sex",
            command="evaluate-generation",
            examples=(
                "mvhpc evaluate-generation --features runs/densenet-age --out quality",
                "mvhpc evaluate-generation --features squeezenet1_1-b8a52dc0.pth --out quality-squeezenet",
                "mvhpc evaluate-generation --data runs/packed --drawn synthetic --features runs/densenet-age "
                "--out quality-synthetic",
            ),
            flags={
                "model": JOINT_MODEL,
                "data": DATA,
                "drawn": "BIDS tree of drawn people, in place of drawing one for each real person",
                "features": "run folder of a baseline that reads the volume alone, or a file of weights",
                "split": f"the real people: {SPLIT}",
                "count": "number of people (default: all of the part)",
                "out": "folder to write",
            },
        ),
        Stage(
            "translate",
            config="mvhpc.inference.translate:TranslateConfig",
            run="mvhpc.inference.translate:run",
            inputs={"model": "joint", "data": "pack"},
            out="{split}translations/{query}",
            help="sample one volume of every subject given others, such as a missing contrast",
            command="translate",
            examples=(
                "mvhpc translate --model runs/joint --data runs/packed --given image,age --want t2w "
                "--out synthetic-t2w",
            ),
            flags={
                "model": JOINT_MODEL,
                "data": DATA,
                "split": PART,
                "given": "known variables, separated by commas",
                "want": "volume to sample",
                "out": "BIDS derivative to write",
            },
            check="mvhpc.inference.translate:check_query",
        ),
        Stage(
            "inpaint",
            config="mvhpc.inference.inpaint:InpaintConfig",
            run="mvhpc.inference.inpaint:run",
            files="mvhpc.inference.inpaint:files",
            inputs={"model": "joint", "image": "", "mask": ""},
            out="inpainted.nii.gz",
            help="fill in the part of a volume that a mask excludes",
            command="inpaint",
            examples=("mvhpc inpaint --model runs/joint --image scan.nii.gz --mask known.nii.gz --out filled.nii.gz",),
            flags={
                "model": JOINT_MODEL,
                "image": "NIfTI volume",
                "mask": "NIfTI volume, non-zero where the image is known",
                "given": "further known variables, as name=value,name=value",
                "samples": "number of completions",
                "out": "NIfTI file to write",
            },
        ),
    )
}
TRAINED = [stage.name for stage in STAGES.values() if stage.trains]
