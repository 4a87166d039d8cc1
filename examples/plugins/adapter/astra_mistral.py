"""Mistral for astra: a dense model whose checkpoint has transformers' own tensor names."""

from astracli.models.adapter import ModelAdapter
from astracli.models.adapter_tools import dense_memory_shape, dense_shapes, load_checkpoint, wire_map


def shapes(config):
    """{tensor name: shape} of every trained tensor, from config.json alone."""
    return dense_shapes(config, head_dim=None, head_norms=False)


def load(path, *, attention="sdpa"):
    """The model in fp32. transformers is imported here, not above: listing adapters must cost nothing."""
    from transformers import MistralForCausalLM

    return load_checkpoint(MistralForCausalLM, path, attention=attention)


ADAPTER = ModelAdapter(
    name="mistral",
    model_types=("mistral",),
    summary="Mistral 7B and models of its shape (dense)",
    load_for_training=load,
    load_for_serving=load,
    memory_shape=lambda config: dense_memory_shape(config, shapes(config)),
    wire_tensors=lambda model: wire_map(model, shapes(model.config.to_dict())),
    shapes=shapes,
)
