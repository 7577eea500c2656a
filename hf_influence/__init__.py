"""Find out which fine-tuning examples help and which hurt, and get back a better dataset.

capture = GradientCapture("runs/sst2", query_dataset=validation)      # from hf_influence.callbacks
Trainer(model=peft_model, ..., callbacks=[capture]).train()
scores = attribute("runs/sst2")                                      # higher = more worth keeping
curated = DatasetFilter(drop=0.05).apply(train, scores)               # a datasets.Dataset
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi
__version__ = "0.1.0"
