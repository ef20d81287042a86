"""Names of transformers without documentation that training uses; apart, because they import its trainer.

The version that they were read in is `TESTED` of `transformers.py`; `tests/upstream/` compares them with the one
installed.
"""

from __future__ import annotations

from transformers.activations import ACT2FN as ACT2FN
from transformers.loss.loss_utils import LOSS_MAPPING as LOSS_MAPPING
from transformers.loss.loss_utils import ForCausalLMLoss as ForCausalLMLoss
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES as MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES as MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.trainer import TRAINER_STATE_NAME as TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices as get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR as PREFIX_CHECKPOINT_DIR
from transformers.trainer_utils import has_length as has_length
from transformers.trainer_utils import rotate_checkpoints as rotate_checkpoints

UNDOCUMENTED = {
    "activations.ACT2FN": "Liger changes entries of it for the whole process, which are put back",
    "loss.loss_utils.LOSS_MAPPING": "whether a model's own loss is the plain one of next tokens",
    "loss.loss_utils.ForCausalLMLoss": "that plain loss",
    "models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "which classes take text with labels of next tokens",
    "models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "likewise with images",
    "models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "which classes take images with labels",
    "models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES": "which classes take text with hidden tokens",
    "models.auto.modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "which classes take sources and targets",
    "models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "which classes take texts with labels",
    "models.auto.modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "which classes take words with tags",
    "trainer.TRAINER_STATE_NAME": "the file that a trainer writes last into a checkpoint",
    "trainer_pt_utils.get_length_grouped_indices": "the order of `group_by_length`, within the batches of a step",
    "trainer_utils.PREFIX_CHECKPOINT_DIR": "how a checkpoint's directory is called",
    "trainer_utils.has_length": "whether rows can be counted before they are read",
    "trainer_utils.rotate_checkpoints": "older checkpoints go when the new one is complete, adapter and all",
}
