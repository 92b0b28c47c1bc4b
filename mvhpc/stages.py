"""The table of stages. Whoever must know something of all stages reads it here: the command line, ``submit.py``, the
pipeline, export, fingerprints and run folders."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mvhpc.runtime.importing import resolve


@dataclass(frozen=True)
class Stage:
    """One stage.

    Its preset files are ``configs/NAME/*.yaml``.

    Attributes:
        name: of the stage.
        config: ``module:class`` of its configuration. Modules are imported when they are needed, since some are slow.
        run: ``module:function`` of ``run(config, run) -> summary``; empty for a stage that trains ``task``.
        inputs: configuration key -> the stage whose result it names; empty where no stage makes it.
        out: where its result lies below a project's root. ``{split}`` is the folder of one cross-validation fold,
            ``{query}`` says what is wanted given what.
        help: one line.
        command: words that start it after ``mvhpc``; empty for what the ``shards`` command does.
        examples: complete commands.
        flags: flag -> help; a flag sets the configuration key of its name.
        task: ``module:class`` of what it trains, a :class:`mvhpc.training.task.Task`; empty for other stages. Its
            output folder is its run folder, and it goes on from checkpoints.
        uses_nodes: whether it can be divided among several nodes.
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
    task: str = ""
    uses_nodes: bool = False

    @property
    def trains(self) -> bool:
        """Whether it trains networks."""
        return bool(self.task)

    def config_class(self) -> type:
        """The dataclass of its configuration."""
        found: type = resolve(self.config)
        return found

    def run_folder(self, out: str | Path) -> Path:
        """Where configuration, journal and log are kept: the output of a stage that trains, else ``OUT.run`` beside."""
        path = Path(out)
        return path if self.trains else path.with_name(path.name + ".run")


DATA = "packed data set"
JOINT_MODEL = "run folder of the joint model"
SPLIT = "train, validation, test or all"

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
            "pack",
            config="mvhpc.data_stages:PackConfig",
            run="mvhpc.data_stages:run_pack",
            inputs={"source": "phantom"},
            out="packed",
            help="pack a BIDS tree or CSV into shards",
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
            inputs={"latents": "encode", "vae": "vae"},
            out="{split}joint",
            help="train the joint diffusion of latents, numbers and categories",
            command="train joint",
            examples=(
                "mvhpc train joint --config paper latents=runs/latents vae=runs/vae out=runs/joint compute.workers=4",
            ),
            uses_nodes=True,
        ),
        Stage(
            "baseline",
            config="mvhpc.training.baseline:BaselineConfig",
            run="",
            task="mvhpc.training.baseline:BaselineTask",
            inputs={"data": "pack"},
            out="{split}baselines/{query}",
            help="train a DenseNet121 for one question alone, to compare with",
            command="train baseline",
            examples=("mvhpc train baseline data=runs/packed want=age given=[image,sex] out=runs/densenet-age",),
            uses_nodes=True,
        ),
        Stage(
            "predict",
            config="mvhpc.inference.predictor:PredictConfig",
            run="mvhpc.inference.predict:run",
            inputs={"model": "joint", "data": "pack"},
            out="{split}predictions/{query}.tsv",
            help="answer a question about every subject of a packed data set",
            command="predict",
            examples=(
                "mvhpc predict --model runs/joint --data runs/packed --split test --given image,sex --want age "
                "--out age.tsv",
                "mvhpc predict --model runs/joint --data runs/packed --given image --want age,sex --draws 100 "
                "--out both.tsv",
            ),
            flags={
                "model": "run folder of a joint model or a baseline",
                "data": DATA,
                "split": SPLIT,
                "given": "variables that are known, by comma; empty for none",
                "want": "variables to predict, by comma",
                "samples": "chains per subject, for models that are asked by chains",
                "draws": "joint draws per subject of all that is wanted, into a second table",
                "out": "TSV file to write, one row a subject",
            },
            uses_nodes=True,
        ),
        Stage(
            "generate",
            config="mvhpc.inference.generate:GenerateConfig",
            run="mvhpc.inference.generate:run",
            inputs={"model": "joint"},
            out="synthetic",
            help="make synthetic people, as a BIDS tree",
            command="generate",
            examples=(
                "mvhpc generate --model runs/joint --count 100 --out synthetic",
                "mvhpc generate --model runs/joint --count 8 --given age=70,sex=F --out women70",
            ),
            flags={
                "model": JOINT_MODEL,
                "count": "number of people",
                "given": "what is fixed, as name=value,name=value",
                "out": "BIDS tree to write",
            },
        ),
        Stage(
            "translate",
            config="mvhpc.inference.translate:TranslateConfig",
            run="mvhpc.inference.translate:run",
            inputs={"model": "joint", "data": "pack"},
            out="{split}translations/{query}",
            help="draw one volume of every subject from the others: a contrast that was not taken",
            command="translate",
            examples=(
                "mvhpc translate --model runs/joint --data runs/packed --given image,age --want t2w "
                "--out synthetic-t2w",
            ),
            flags={
                "model": JOINT_MODEL,
                "data": DATA,
                "split": SPLIT,
                "given": "variables that are known, by comma",
                "want": "the volume to draw",
                "out": "BIDS derivative to write",
            },
        ),
        Stage(
            "inpaint",
            config="mvhpc.inference.inpaint:InpaintConfig",
            run="mvhpc.inference.inpaint:run",
            inputs={"model": "joint", "image": "", "mask": ""},
            out="inpainted.nii.gz",
            help="fill in the part of a volume that a mask does not call known",
            command="inpaint",
            examples=("mvhpc inpaint --model runs/joint --image scan.nii.gz --mask known.nii.gz --out filled.nii.gz",),
            flags={
                "model": JOINT_MODEL,
                "image": "NIfTI volume",
                "mask": "NIfTI volume, non-zero where the image is known",
                "given": "what is known besides, as name=value,name=value",
                "samples": "completions to draw",
                "out": "NIfTI file to write",
            },
        ),
    )
}
TRAINED = [stage.name for stage in STAGES.values() if stage.trains]
