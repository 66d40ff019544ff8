"""limbeck inside other trainers. Each module is imported only when it is asked for, with the library it serves.

from limbeck.integrations.transformers import DistillationTrainer
from limbeck.integrations.lightning import DistillationModule
"""
