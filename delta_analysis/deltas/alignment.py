"""Which tensor of the base belongs to which of the fine-tune, and what has no counterpart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import pandas as pd

from delta_analysis._errors import NotHomologousError, one_of
from delta_analysis.checkpoints import (
    Checkpoint,
    Converted,
    InFile,
    InMemory,
    LoraProduct,
    ModelMap,
    OnStored,
    TensorReference,
    bare_name,
    input_embedding,
    model_class,
    model_map,
    output_head,
    reading_order,
)

Vocabulary = Literal["common", "error"]
VOCABULARIES = ("common", "error")
COMPARED = "compared"


@dataclass(frozen=True)
class Match:
    """A tensor name of either side, with what is compared under it.

    Attributes
    ----------
    tensor : the name, the fine-tuned side's where it has one.
    status : `compared`, `only in base`, `only in finetuned`, `shape differs` or `skipped`.
    finetuned, base : where the two weights come from, cut to the rows that both have if these are
        compared; None where a side has none.
    base_name : what the base calls its weight.
    """

    tensor: str
    status: str
    reason: str
    finetuned: TensorReference | None = field(repr=False)
    base: TensorReference | None = field(repr=False)
    base_name: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is compared."""
        return () if self.finetuned is None else self.finetuned.shape


def align(base: Checkpoint | None, finetuned: Checkpoint, vocab: Vocabulary) -> list[Match]:
    """Every tensor name of either side, matched by name, by layer, then by name.

    Names that differ by the prefix of a wrapping module only are the same; a head that the base ties
    to its embeddings is compared with these. Matrices over vocabularies of different sizes are
    compared in the rows that both have (`vocab="common"`) or refused (`"error"`).
    """
    if vocab not in VOCABULARIES:
        raise ValueError(one_of("vocab", vocab, VOCABULARIES))
    partners, converted = ({}, []) if base is None else _partners(base, finetuned)
    turned = finetuned if base is None else _with_turned_factors(finetuned, base, partners)
    made_of = {name for match in converted for each in (match.finetuned, match.base) for name in _stored(each)}
    matches = [_match(name, partners.get(name), base, turned, vocab) for name in finetuned if name not in made_of]
    matches += converted
    taken = set(partners.values()) | made_of
    if base is not None:
        matches += [_only_in_base(name, base, finetuned) for name in base if name not in taken]
    known = {match.tensor for match in matches} | taken
    for side in (finetuned, base):
        for name, reason in side.skipped.items() if side is not None else ():
            if name not in known:
                known.add(name)
                matches.append(Match(name, "skipped", reason, None, None))
    return sorted(matches, key=lambda match: reading_order(match.tensor))


def _partners(base: Checkpoint, finetuned: Checkpoint) -> tuple[dict[str, str], list[Match]]:
    """Fine-tuned name -> the base's name of the same weight; and what is the same only inside the model."""
    partners = {name: name for name in finetuned if name in base}
    converted: list[Match] = []
    left = [[name for name in side if name not in partners] for side in (finetuned, base)]
    if all(left):
        # Two sides with equal names never ask transformers.
        renamed, converted = _by_parameter(base, finetuned, *left)
        partners.update(renamed)
    ours, theirs = (_bare_names(name for name in side if name not in partners) for side in (finetuned, base))
    partners.update({name: theirs[bare] for bare, name in ours.items() if bare in theirs})
    head, embedding = output_head(finetuned), input_embedding(base)
    if head and embedding and head not in partners and base.ties_head and output_head(base) is None:
        partners[head] = embedding
    return partners, converted


def _by_parameter(
    base: Checkpoint, finetuned: Checkpoint, ours: list[str], theirs: list[str]
) -> tuple[dict[str, str], list[Match]]:
    """Names that become the same parameter of the model, as transformers loads the two sides."""
    # An adapter and a bare file of weights have the other side's configuration.
    tuned_config, base_config = finetuned.config or base.config, base.config or finetuned.config
    tuned_class = model_class(tuned_config, finetuned.shapes)
    alike = tuned_config.get("model_type") == base_config.get("model_type")
    base_class = tuned_class if alike else model_class(base_config, base.shapes)
    if tuned_class is None or base_class is None:
        return {}, []
    tuned_side = _parameters(finetuned, ours, model_map(tuned_config, finetuned.shapes, tuned_class))
    base_side = _parameters(base, theirs, model_map(base_config, base.shapes, base_class))
    renamed: dict[str, str] = {}
    converted = []
    for parameter, (name, tuned) in tuned_side.items():
        partner, start = base_side.get(parameter, ("", None))
        if start is None:
            continue
        if isinstance(tuned, Converted) or isinstance(start, Converted):
            if tuned.shape == start.shape:
                parts = max(_stored(tuned), _stored(start), key=len)
                reason = f"made of {len(parts)} stored tensors such as {parts[0]}"
                converted.append(Match(parameter, COMPARED, reason, tuned, start, parameter))
        else:
            renamed[name] = partner
    return renamed, converted


def _parameters(side: Checkpoint, names: list[str], found: ModelMap) -> dict[str, tuple[str, TensorReference]]:
    """Parameter, or the one that it is tied to -> the stored name and where it comes from."""
    left = set(names)
    present = {parameter for placement in found.placements for parameter in placement.shapes}
    made: dict[str, tuple[str, TensorReference]] = {}
    for placement in found.placements:
        if not left.issuperset(placement.stored):
            continue
        parts = tuple(side.references[name] for name in placement.stored)
        for parameter in placement.shapes:
            # A matrix that is stored under its second name only is known by its first.
            root = found.tied.get(parameter, parameter)
            known = parameter if root in present else root
            reference: TensorReference = Converted(parameter, placement, parts) if placement.converts else parts[0]
            made[known] = parameter if placement.converts else placement.stored[0], reference
    return made


def _stored(reference: TensorReference | None) -> tuple[str, ...]:
    return reference.placement.stored if isinstance(reference, Converted) else ()


def _bare_names(names: Iterable[str]) -> dict[str, str]:
    """Bare name -> name, where only one name has it."""
    bare = {name: bare_name(name) for name in names}
    count = Counter(bare.values())
    return {short: name for name, short in bare.items() if count[short] == 1}


def _with_turned_factors(finetuned: Checkpoint, base: Checkpoint, partners: dict[str, str]) -> Checkpoint:
    """The adapter with those factors turned that its one flag has the wrong way round.

    peft keeps the flag of the last module that it wrapped, which is wrong for modules of another kind.
    """
    shapes = {
        name: base.references[partners[name]].shape
        for name, reference in finetuned.references.items()
        if isinstance(reference, LoraProduct) and name in partners
    }
    turned = {
        name: replace(product, transposed=not product.transposed)
        for name, product in finetuned.references.items()
        if isinstance(product, LoraProduct) and name in shapes and product.shape != shapes[name] == product.shape[::-1]
    }
    square = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == shape[1]]
    if turned and square:
        raise NotHomologousError(
            f"{finetuned.source}: fan_in_fan_out is wrong for {next(iter(turned))!r}, and whether it is for the square "
            f"{square[0]!r} cannot be told; merge the adapter into its base with peft's merge_and_unload() and "
            "save_pretrained, then open that folder as the fine-tune"
        )
    return replace(finetuned, references={**finetuned.references, **turned})


def _match(name: str, partner: str | None, base: Checkpoint | None, finetuned: Checkpoint, vocab: Vocabulary) -> Match:
    tuned = finetuned.references[name]
    if base is None or partner is None:
        if base is not None:
            return Match(name, "only in finetuned", "the base has no tensor of this name", tuned, None)
        return Match(name, COMPARED, "" if finetuned.is_delta else "difference from zero", tuned, None)
    start = base.references[partner]
    reason = "" if partner == name else f"with {partner} of the base"
    if tuned.shape == start.shape:
        return Match(name, COMPARED, reason, tuned, start, partner)
    shapes = f"{start.shape} against {tuned.shape}"
    grown = _has_row_a_token(name, tuned, finetuned) and _has_row_a_token(partner, start, base)
    if not grown or tuned.shape[1:] != start.shape[1:]:
        return Match(name, "shape differs", shapes, tuned, start, partner)
    if vocab == "error":
        raise NotHomologousError(
            f"{base.source} and {finetuned.source}: {name!r} covers vocabularies of different sizes, {shapes}; "
            "give vocab='common' to compare the rows that both have"
        )
    rows = min(tuned.shape[0], start.shape[0])
    rest = f"the first {rows} rows; {max(tuned.shape[0], start.shape[0]) - rows} more "
    rest += "in finetuned" if tuned.shape[0] > rows else "in base"
    return Match(
        name, COMPARED, "; ".join(filter(None, (reason, rest))), _first(tuned, rows), _first(start, rows), partner
    )


def _has_row_a_token(name: str, reference: TensorReference, side: Checkpoint) -> bool:
    """Whether this is the embeddings, the output head or its bias, with a row for each token, and can be cut."""
    embedding, head = input_embedding(side), output_head(side)
    head_bias = name.endswith("bias") and any(part in name for part in ("lm_head", "embed_out", "cls.predictions"))
    cuttable = isinstance(reference, InMemory | OnStored) or (
        isinstance(reference, InFile) and reference.strides is None
    )
    if not (cuttable and embedding and reference.shape and (name in (embedding, head) or head_bias)):
        return False
    return reference.shape[0] == side.references[embedding].shape[0]


def _first(reference: TensorReference, rows: int) -> TensorReference:
    """The first rows of a tensor."""
    if isinstance(reference, InFile):
        return replace(reference, shape=(rows, *reference.shape[1:]))
    return InMemory(reference.read()[:rows])


def _only_in_base(name: str, base: Checkpoint, finetuned: Checkpoint) -> Match:
    reason = "the fine-tuned checkpoint has no tensor of this name"
    if name in finetuned.skipped:
        reason = finetuned.skipped[name]
    elif finetuned.is_delta:
        reason = "the fine-tune leaves it as it is"
    elif name == output_head(base) and finetuned.ties_head:
        reason = f"the fine-tuned model ties its head to {input_embedding(finetuned)}"
    return Match(name, "only in base", reason, None, base.references[name], name)


def coverage_table(matches: list[Match], base: Checkpoint | None, finetuned: Checkpoint) -> pd.DataFrame:
    """One row a tensor name on either side; the columns are those of `Delta.coverage`."""
    rows = []
    for match in matches:
        # The sides' own references, since those of a match may be cut.
        sides = {
            "base": base.references.get(match.base_name or match.tensor, match.base) if base is not None else None,
            "finetuned": finetuned.references.get(match.tensor, match.finetuned),
        }
        row: dict[str, object] = {"tensor": match.tensor, "status": match.status, "reason": match.reason}
        for key, reference in sides.items():
            row[f"{key}_shape"] = str(reference.shape) if reference else ""
            row[f"{key}_dtype"] = str(reference.dtype).removeprefix("torch.") if reference else ""
        row["numel"] = max(math.prod(reference.shape) if reference else 0 for reference in sides.values())
        row["numel_compared"] = math.prod(match.finetuned.shape) if match.finetuned and match.status == COMPARED else 0
        rows.append(row)
    return pd.DataFrame(rows)
