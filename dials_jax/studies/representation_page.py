"""The page of a representation study: each claim of Goel et al., its figures, and what was found.

Sentences follow from the numbers and their intervals.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from dials_jax.reporting import html, skipping_plots
from dials_jax.reporting.publish import Chapter, Figure, Table, file_name
from dials_jax.skipping.similarity import choice_shares, choose_static_layers
from dials_jax.studies import neighbour_plots
from dials_jax.studies import representation_plots as plots
from dials_jax.studies.claims import Claim, Evidence, check_claims, early_layers
from dials_jax.studies.profile import Profile

NUM_DECODED = 32  # tokens, of Goel, Figures 4 and 6
SKIPPED_SHARE = 0.1875  # of the layers: 6 of 32 in Goel, Figure 8
NOTE = (
    "Neighbouring [MASK] tokens have one embedding, so neighbours are more alike in a diffusion "
    "model while much is masked, whatever it has learned; figures and claims show the end, too."
)


def representation_chapters(
    profiles: Mapping[str, Profile],
    adapted: Collection[str] = (),
    num_decoded: int = NUM_DECODED,
) -> list[Chapter]:
    """One chapter per claim, then norms and what Algorithm 1 would skip.

    Args:
      profiles: by label.
      adapted: labels of the diffusion models that continue a causal one.
      num_decoded: tokens, where figures show the middle of a trajectory.
    """
    claims = check_claims(profiles, adapted)
    of_claims = (_redundancy_figures, _recency_figures, _shape_figures)
    return [
        *(
            Chapter(claim.title, claim_html(claim), list(figures(profiles, num_decoded)))
            for claim, figures in zip(claims, of_claims, strict=True)
        ),
        Chapter("Norms", html.paragraph(_norm_sentence(profiles)), list(_norm_figures(profiles))),
        Chapter("What Algorithm 1 would skip", "", list(_choice_figures(profiles))),
        Chapter("Neighbouring tokens in every layer", "", list(_grid_figures(profiles))),
    ]


def claim_results(claims: Collection[Claim]) -> list[dict[str, Any]]:
    """What results.json says of the claims."""
    return [
        {
            "claim": claim.sentence,
            "verdict": claim.verdict,
            "untested": claim.untested,
            "evidence": [
                {"what": e.what, "value": e.value, "low": e.low, "high": e.high}
                for e in claim.evidence
            ],
        }
        for claim in claims
    ]


def claim_html(claim: Claim) -> str:
    """The claim, its numbers, and what they say."""
    numbers = ((e.what, _with_interval(e)) for e in claim.evidence)
    return (
        html.paragraph(f"Claim: {claim.sentence}")
        + html.definition_list(numbers)
        + html.paragraph(claim_sentence(claim))
    )


def claim_sentence(claim: Claim) -> str:
    """What was found, in words that follow from the intervals."""
    match claim.verdict:
        case "not tested":
            return f"Not tested: that takes {claim.needs}."
        case "supported":
            found = f"Supported: {_count(len(claim.evidence))} above 0."
        case "not supported":
            below = "; ".join(e.what for e in claim.evidence if e.sign < 0)
            found = f"Not supported: these lie below 0: {below}."
        case _:
            unsure = "; ".join(e.what for e in claim.evidence if e.sign == 0)
            found = f"Undecided: the intervals of these do not leave out 0: {unsure}."
    return f"{found} Not tested: {claim.untested}." if claim.untested else found


def _count(number: int) -> str:
    names = {1: "the interval lies", 2: "both intervals lie"}
    return names.get(number, f"all {number} intervals lie")


def _with_interval(evidence: Evidence) -> str:
    if np.isnan([evidence.low, evidence.high]).any():
        return f"{evidence.value:+.4f}, without an interval"
    low, high = (f"{x:+.4f}" for x in (evidence.low, evidence.high))
    return f"{evidence.value:+.4f} (95 % interval over sequences: {low} to {high})"


# ---------------------------------------------------------------------------------------- numbers


def profile_table(profiles: Mapping[str, Profile]) -> Table:
    """A line per model: cosines of layers and of neighbours in answers, norms and sinks."""
    header = ("model", "layers", "early layers", "late layers", "lowest layer", "neighbours",
              "neighbours, at the end", "norm, last / first", "sink positions", "sequences",
              "seconds")  # fmt: skip
    lines = []
    for label, profile in profiles.items():
        early = early_layers(profile.num_layers)
        layer, token, end = map(
            profile.over_sequences,
            (profile.sequence_layer, profile.sequence_token, profile.end_token),
        )
        norm = profile.norm.pooled((0, 2)).mean
        cosines = (layer[early], layer[early.stop :], layer.min(), token[1:], end[1:])
        lines.append(
            (
                label,
                str(profile.num_layers),
                *(f"{np.mean(x):.3f}" if np.isfinite(x).any() else "-" for x in cosines),
                f"{norm[-1] / norm[1]:.1f}",
                str(int((profile.sinks.sum(axis=0) > 0).sum())),
                str(profile.num_sequences),
                f"{profile.seconds:.1f}",
            )
        )
    return Table(header, lines)


PROFILE_LEGEND = (
    ("early, late layers", "Mean cosine of a layer's input and output in answers: of the first "
     "half without layer 0, whose input is an embedding, and of the second half."),
    ("neighbours", "Mean cosine of neighbouring tokens in answers, over all hidden states but the "
     "embedding, and over all steps; at the end: in each sequence's last model "
     "call, of written tokens that differ. " + NOTE),
    ("norm, last / first", "Mean L2 norm of what leaves the last layer and what leaves layer 0."),
    ("sink positions", "How many positions are a sink in any hidden state."),
)  # fmt: skip


# ---------------------------------------------------------------------------------------- figures


def _redundancy_figures(profiles: Mapping[str, Profile], num_decoded: int) -> Iterator[Figure]:
    """Goel, Figures 3, 4 and 5, and the same by step."""
    yield Figure(
        "depth",
        "Mean cosine of each layer's input and output in answers. Left: the band is a standard "
        "deviation over steps. Right: a 95 % interval of the mean over sequences.",
        plots.depth_curves,
        {"profiles": profiles},
    )
    heatmap = "Cosine of each layer's input and output by position, on one scale for all models"
    # A trajectory that is shorter has only one end.
    shortest = min(profile.facts.gen_length for profile in profiles.values())
    if shortest > num_decoded:
        caption = f"{heatmap}, where {num_decoded} tokens are decoded."
        data = {"profiles": profiles, "num_decoded": num_decoded}
        yield Figure(f"layers_{num_decoded}", caption, plots.layer_heatmaps, data)
    yield Figure(
        "layers_end", f"{heatmap}, where all tokens are decoded.", plots.layer_heatmaps,
        {"profiles": profiles},
    )  # fmt: skip
    if any(profile.num_bins > 1 for profile in profiles.values()):
        caption = "The same in answers by denoising step."
        yield Figure("layers_steps", caption, plots.step_heatmaps, {"profiles": profiles})


def _recency_figures(profiles: Mapping[str, Profile], num_decoded: int) -> Iterator[Figure]:
    """Goel, Figures 6 and 9 to 12, and the change near new tokens."""
    shortest = min(profile.facts.gen_length for profile in profiles.values())
    data = {"profiles": profiles, "num_decoded": num_decoded if shortest > num_decoded else None}
    yield Figure(
        "neighbours",
        f"Cosine of each token with the next one at chosen depths. {NOTE}",
        neighbour_plots.neighbour_rows,
        data,
    )
    yield Figure(
        "neighbours_quarters",
        "The same by quarter of the depth, where all tokens are decoded. A band reaches from the "
        "lowest to the highest layer of a quarter.",
        neighbour_plots.neighbour_quarters,
        {"profiles": profiles},
    )
    if any(profile.change.mean.size for profile in profiles.values()):
        yield Figure(
            "change",
            "How far a state moves from one step to the next, by the signed distance to the "
            "nearest token that was decoded in between; the ends hold all distances beyond them. "
            "A causal model's states never change.",
            plots.change_curves,
            {"profiles": profiles},
        )


def _shape_figures(profiles: Mapping[str, Profile], num_decoded: int) -> Iterator[Figure]:
    """What the correlations of the third claim compare."""
    if len(profiles) > 1:
        caption = "Depth profiles at equal mean and deviation, which is what correlations see."
        yield Figure("shapes", caption, plots.depth_shapes, {"profiles": profiles})


def _norm_sentence(profiles: Mapping[str, Profile]) -> str:
    """Names the sinks of each model."""
    parts = []
    for label, profile in profiles.items():
        mean = profile.norm.pooled((0, 2)).mean
        named = [
            f"position {profile.positions[i]}, "
            f"{profile.largest_norm[state, i] / mean[state]:.1f} times the mean of hidden state "
            f"{state}"
            for state, i in plots.named_sinks(profile)
        ]
        factor = profile.facts.sink_factor
        parts.append(
            f"{label}: {'; '.join(named)}." if named else f"{label}: no norm exceeds {factor:g} "
            "times the median of its hidden state."
        )  # fmt: skip
    return "Sinks, positions of exceptional norm. " + " ".join(parts)


def _norm_figures(profiles: Mapping[str, Profile]) -> Iterator[Figure]:
    """Goel, Figure 7."""
    caption = (
        "Mean and largest L2 norm of hidden states; points name sinks by position and multiple of "
        "the mean."
    )
    yield Figure("norms", caption, plots.norm_curves, {"profiles": profiles})


def _choice_figures(profiles: Mapping[str, Profile]) -> Iterator[Figure]:
    """Goel, Figures 8 and 2."""
    shares, grids = {}, {}
    for label, profile in profiles.items():
        prompts = profile.prompt_layer[np.isfinite(profile.prompt_layer).all(axis=1)]
        count = max(1, round(SKIPPED_SHARE * profile.num_layers))
        if len(prompts) and profile.num_layers > 1:
            shares[f"{label}, {count} of {profile.num_layers}"] = {
                rule: choice_shares(prompts, count, None, adjacent)
                for rule, adjacent in (("neighbours allowed", True), ("no neighbours", False))
            }
            gates = np.ones((profile.facts.steps, profile.num_layers), bool)
            gates[:, list(choose_static_layers(prompts.mean(axis=0), count, None))] = False
            grids[label] = gates
    if shares:
        caption = (
            "How often each layer is among the most similar ones of a prompt, without a threshold: "
            "Algorithm 1, prompt by prompt. A model is named with how many layers are chosen."
        )
        yield Figure("choices", caption, skipping_plots.choice_bars, {"shares": shares})
    for label, gates in grids.items():
        caption = f"{label}: the same choice for all prompts, without neighbours, as a static skip."
        data = {"executed": gates, "title": label}
        name = f"skipped_{file_name(label)}"
        yield Figure(name, caption, skipping_plots.skipping_grid, data)
        return  # one shows what is meant


def _grid_figures(profiles: Mapping[str, Profile]) -> Iterator[Figure]:
    """Goel, Figures 13 and 14, of each model."""
    for label, profile in profiles.items():
        yield Figure(
            f"neighbours_{file_name(label)}",
            f"{label}: cosine of each token with the next one within every hidden state, where all "
            "tokens are decoded.",
            neighbour_plots.neighbour_grid,
            {"profile": profile},
        )
