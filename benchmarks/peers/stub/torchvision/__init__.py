"""Stands in for torchvision, whose two-dimensional helpers grad-cam and zennit import."""

from . import models as models
from . import ops as ops
from . import transforms as transforms
