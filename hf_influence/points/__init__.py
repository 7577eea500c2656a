"""Parameter points: states of the trainable values at which gradients or losses are taken, and the way into them.

points = parameter_dropout(n=5)                          # or checkpoints(folder), continued_sgd(...), laplace(...)
collect_at(model, {"train": train, "query": validation}, "runs/sst2", points)
scores = attribute("runs/sst2", method="ip_ensemble")
"""

from hf_influence.points.checkpoints import checkpoints
from hf_influence.points.collect_at import collect_at
from hf_influence.points.continued_sgd import continued_sgd
from hf_influence.points.laplace import laplace
from hf_influence.points.parameter_dropout import parameter_dropout
from hf_influence.points.point import Point, present

__all__ = ["Point", "checkpoints", "collect_at", "continued_sgd", "laplace", "parameter_dropout", "present"]
