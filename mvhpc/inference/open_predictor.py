"""The predictor of a configuration, by the kind of its model."""

from mvhpc.inference.baseline_predictor import BaselinePredictor
from mvhpc.inference.groups import GroupedPredictor
from mvhpc.inference.predictor import PredictConfig, Predictor
from mvhpc.inference.scalars_predictor import ScalarsPredictor
from mvhpc.models.bundle import BaselineModel, JointModel, load
from mvhpc.models.known_answer import check_known_answer
from mvhpc.models.model_folder import ModelError
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.runtime.devices import resolve_device


def open_predictor(config: PredictConfig) -> GroupedPredictor:
    """Load the model of ``config`` and make it ready for its query.

    Raises:
        ConfigError: a query that the model does not take, or data on another grid.
        ModelError: no model there, one that predicts nothing, a damaged one, or one whose known answer is another here.
    """
    model = load(config.model, resolve_device(config.compute.device))
    check_known_answer(config.model, model)
    if isinstance(model, JointModel):
        return Predictor(config, model) if model.scalars is None else ScalarsPredictor(config, model.scalars)
    if isinstance(model, BaselineModel):
        return BaselinePredictor(config, model)
    if isinstance(model, ScalarsModel):
        return ScalarsPredictor(config, model)
    raise ModelError(f"model={config.model} is an autoencoder; give the run folder of stage scalars, joint or baseline")
