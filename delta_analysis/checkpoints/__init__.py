"""Any checkpoint as a lazy, read-only mapping from name to tensor."""

from delta_analysis.checkpoints.checkpoint import Checkpoint, Source, open_checkpoint, tokenizer_folder
from delta_analysis.checkpoints.configs import config_differences, text_settings
from delta_analysis.checkpoints.hub import TOKENIZER, has_tokenizer
from delta_analysis.checkpoints.lora import STORED_WHOLE, LoraProduct, OnStored
from delta_analysis.checkpoints.names import (
    NO_LAYER,
    bare_name,
    input_embedding,
    output_head,
    parse_name,
    reading_order,
)
from delta_analysis.checkpoints.paths import (
    find_input,
    find_root,
    resolve,
    sha256,
    writable_folder,
    written_whole,
    zoo_names,
)
from delta_analysis.checkpoints.placement import Converted, ModelMap, Placement, model_class, model_map, settings_of
from delta_analysis.checkpoints.provenance import content_hash, file_hashes, versions
from delta_analysis.checkpoints.published import PREFIX, known_pairs, pair_sources
from delta_analysis.checkpoints.tensors import InFile, InMemory, TensorReference

__all__ = [
    "NO_LAYER",
    "PREFIX",
    "STORED_WHOLE",
    "TOKENIZER",
    "Checkpoint",
    "Converted",
    "InFile",
    "InMemory",
    "LoraProduct",
    "ModelMap",
    "OnStored",
    "Placement",
    "Source",
    "TensorReference",
    "bare_name",
    "config_differences",
    "content_hash",
    "file_hashes",
    "find_input",
    "find_root",
    "has_tokenizer",
    "input_embedding",
    "known_pairs",
    "model_class",
    "model_map",
    "open_checkpoint",
    "output_head",
    "pair_sources",
    "parse_name",
    "reading_order",
    "resolve",
    "settings_of",
    "sha256",
    "text_settings",
    "tokenizer_folder",
    "versions",
    "writable_folder",
    "written_whole",
    "zoo_names",
]
