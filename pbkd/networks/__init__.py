"""Networks as blocks: specs, the modules built from them, named architectures, weights."""

from pbkd.networks.block_network import BlockNetwork, build_block, fold_norms, on_meta, spec_of
from pbkd.networks.builders import ForeignSettings, allow_import
from pbkd.networks.cost import cost_of, feature_shapes
from pbkd.networks.features import FeatureNetwork, Features
from pbkd.networks.spec import AnySpec, BlockSpec, ConvSpec, NetworkSpec, TracedPart, TracedSpec, read_spec
from pbkd.networks.weights import fresh, initialize_fresh, load_weights, maskable_weights, weights_digest
from pbkd.networks.zoo import AnyNetworkSettings, NetworkSettings, architecture, settings_of

__all__ = [
    "AnyNetworkSettings",
    "AnySpec",
    "BlockNetwork",
    "BlockSpec",
    "ConvSpec",
    "FeatureNetwork",
    "Features",
    "ForeignSettings",
    "NetworkSettings",
    "NetworkSpec",
    "TracedPart",
    "TracedSpec",
    "allow_import",
    "architecture",
    "build_block",
    "cost_of",
    "feature_shapes",
    "fold_norms",
    "fresh",
    "initialize_fresh",
    "load_weights",
    "maskable_weights",
    "on_meta",
    "read_spec",
    "settings_of",
    "spec_of",
    "weights_digest",
]
