"""Names of models that canonizers look for; no network here is one of them."""

from . import resnet as resnet
