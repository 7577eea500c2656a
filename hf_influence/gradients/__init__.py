"""Per-example gradients: hooks, rules for each kind of layer, compression, and the pass over a dataset."""

from hf_influence.gradients.capture import per_sample_gradients
from hf_influence.gradients.collect import collect
from hf_influence.gradients.compress import dropout, gaussian
from hf_influence.gradients.losses import losses
from hf_influence.gradients.verify import verify

__all__ = ["collect", "dropout", "gaussian", "losses", "per_sample_gradients", "verify"]
