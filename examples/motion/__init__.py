"""Motion, a modality that Seawall does not know: `model.plugin: examples/motion` imports this package.

`encoder.py` is what any new modality needs: an encoder and a processor, registered with transformers. The other two
stand in for a data set and for pretrained weights, so that the example is trained from nothing: `gestures.py` is the
micro world as motion, `blueprint.py` the architecture to pretrain.
"""

from .blueprint import build_model, build_processor, states, tower
from .encoder import MotionEncoder, MotionEncoderConfig, MotionProcessor
from .gestures import MEDIUM

__all__ = [
    "MEDIUM",
    "MotionEncoder",
    "MotionEncoderConfig",
    "MotionProcessor",
    "build_model",
    "build_processor",
    "states",
    "tower",
]
