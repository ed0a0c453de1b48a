"""The parts of a model that gradients are compared by."""

from torch import nn

from memdlm.backbone import Backbone

ALL = "all"
EMBEDDING, HEAD, EMBEDDING_AND_HEAD = "embedding", "head", "embedding and head"
BELOW, FINAL_NORM = "layers below", "final norm"
ATTENTION, FFN, NORMS = "adapted attention", "adapted FFN", "adapted norms"
# In the order of the forward pass.
GROUPS = (EMBEDDING, EMBEDDING_AND_HEAD, BELOW, ATTENTION, FFN, NORMS, FINAL_NORM, HEAD, ALL)


def trained_groups(model: nn.Module, backbone: Backbone) -> dict[str, list[str]]:
    """Sort the trained parameters of a model by where they stand.

    "Adapted" are the layers from the first with fast weights on, "below" those before it. A norm in
    an adapted layer's attention counts as a norm; its router and experts count as FFN.

    Args:
        model: as for `MemDLMObjective`.
        backbone: its split, with the memory's boundary.

    Returns:
        Group to qualified names, in the order of `GROUPS`, `ALL` with every name last; no empty
        group. A tied head is one group with the embedding.

    Raises:
        ValueError: no trained parameter, or one that stands in no group.
    """
    places = _places(backbone)
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) not in places:
            raise ValueError(f"model must have no trained parameter in no group, got {name}")
        found[places[id(parameter)]].append(name)
        found[ALL].append(name)
    if not found[ALL]:
        raise ValueError("model must have a trained parameter, got none")
    return {group: names for group, names in found.items() if names}


def _places(backbone: Backbone) -> dict[int, str]:
    """The group of each parameter, by its id."""
    decoder = backbone.decoder
    places = {id(parameter): EMBEDDING for parameter in decoder.embed_tokens.parameters()}
    for part in backbone.head():
        if part is not None:
            places[id(part)] = EMBEDDING_AND_HEAD if id(part) in places else HEAD
    places |= {id(parameter): FINAL_NORM for parameter in decoder.norm.parameters()}
    first = backbone.boundary // 2
    for index, layer in enumerate(backbone.layers):
        for name, parameter in layer.named_parameters():
            group = BELOW if index < first else _place_in_layer(name)
            if group is not None:
                places[id(parameter)] = group
    return places


def _place_in_layer(name: str) -> str | None:
    if "norm" in name:
        return NORMS
    return {"self_attn": ATTENTION, "mlp": FFN}.get(name.partition(".")[0])
